"""Joining the processes of a run, whatever has started them: torchrun, accelerate launch, Slurm or
Ray Train, each of which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import resource
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from configs.errors import ConfigError
from configs.training import TrainConfig
from train.sharding import hidden_from_accelerate

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from accelerate import Accelerator

# How long processes wait for one that makes an index, or downloads or uploads a checkpoint. torch's
# own limit is ten minutes on GPUs.
_PATIENCE: Final = timedelta(hours=3)
# Variables in which launchers, the last ones of MPI, tell the number of processes.
_COUNTS: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_first_process() -> bool:
    """Returns whether this is the only process of a run, or the one with rank 0."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes of the GPU that this process has used so far; without one, of the
    machine's memory.
    """
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def check_launcher() -> None:
    """Raises ConfigError if `accelerate launch` was asked for several processes and started one.

    On CPUs it does so, unless it is given hosts for mpirun. It tells that process the address of
    the main process, which it does for several processes only, but no rank.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and not any(name in os.environ for name in _COUNTS):
        raise ConfigError(
            "accelerate launch was asked for several processes, and has started one: on CPUs it "
            "starts more only with --mpirun_hostfile. Start them with torchrun "
            "--nproc-per-node N -m train.cli run …, or give --num_processes 1 and unset "
            "MASTER_ADDR and MASTER_PORT."
        )


def join_processes(config: TrainConfig, output: Path) -> Accelerator:
    """Returns accelerate's object for this process, connected to the others of the run. Raises
    ConfigError if the run would have another number of processes than the launcher was given.

    output: the run's folder.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    # Without a GPU, accelerate wouldn't connect the processes unless it is told to use CPUs.
    on_cpu = config.model.device == "cpu" or not torch.accelerator.is_available()
    with hidden_from_accelerate():
        accelerator = Accelerator(
            cpu=on_cpu,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(output),
                logging_dir=str(output / "logs"),
                automatic_checkpoint_naming=False,
            ),
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise ConfigError(
            f"the launcher has started {asked} processes (WORLD_SIZE), and accelerate connects "
            f"{accelerator.num_processes} of them. Set model.device=cpu to train on CPUs."
        )
    return accelerator

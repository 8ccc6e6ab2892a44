"""Sets the threads and devices of all models in this process."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from configs.errors import ConfigError

logger = logging.getLogger(__name__)

CUDA: Final = "CUDAExecutionProvider"  # onnxruntime's name
_threads = 0


def pin_threads(count: int) -> None:
    """Makes all models of this process use `count` threads. Call it before stages are set up.

    count: 0 means the number in $OMP_NUM_THREADS, else one for each core.
    """
    global _threads
    import cv2

    _threads = count or int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1
    cv2.setNumThreads(_threads)
    # torch takes seconds to import; a process without a torch model does without it
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(_threads)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Makes torch give the same bits each time, if `wanted`, until the context ends.

    Without it, on GPUs, the backward pass of attention adds its terms in any order. Raises
    ConfigError if an operation in the context has no deterministic algorithm.
    """
    import torch

    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS reads it at its first use, and without it torch refuses deterministic products
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    options.fill_uninitialized_memory = False  # that takes time, and only helps to find errors
    try:
        yield
    except RuntimeError as error:
        if not wanted or "deterministic" not in str(error):
            raise
        raise ConfigError(
            f"{str(error).partition(', but')[0]}. Set deterministic=false: then the last bits of "
            "results vary."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


def has_nvidia_driver() -> bool:
    """Returns whether this machine has an NVIDIA driver; some containers lack its nvidia-smi."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()


@cache
def onnx_device(name: str) -> str:
    """Returns the device on which onnxruntime runs models, cpu or cuda, for a configured name;
    "auto" means cuda if onnxruntime's build and torch can use a GPU.

    Raises ConfigError for cuda on a build without it. With auto, a log line says so where there is
    a GPU that isn't used.
    """
    import onnxruntime

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {name}: expected auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not has_nvidia_driver()):
        return "cpu"
    if CUDA in onnxruntime.get_available_providers():
        import torch

        if name == "auto" and not torch.cuda.is_available():
            return "cpu"
        onnxruntime.preload_dlls()  # CUDA's libraries, from the packages that torch brought
        return "cuda"
    lacking = f"onnxruntime {onnxruntime.__version__} is built without CUDA"
    if name == "cuda":
        raise ConfigError(
            f"device cuda, but {lacking}. `make install GPU=1` installs onnxruntime-gpu instead."
        )
    logger.warning("%s, so faces are detected and embedded on the CPU. See make doctor.", lacking)
    return "cpu"


def onnx_session(path: Path, device: str) -> Any:
    """Returns an onnxruntime session on a device as `onnx_device` takes it, on the CPU with the
    threads that `pin_threads` set. Raises ConfigError as that does. If CUDA fails to start, it does
    so for cuda; with auto, the session is on the CPU, and a log line says so.
    """
    import onnxruntime

    on_cuda = onnx_device(device) == "cuda"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers = [*([CUDA] if on_cuda else []), "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if on_cuda and CUDA not in session.get_providers():
        problem = f"onnxruntime {onnxruntime.__version__} is built with CUDA, and can't start it"
        if device == "cuda":
            raise ConfigError(f"{problem}. Set device=auto, which then uses the CPU.")
        logger.warning("%s, so it uses the CPU. See make doctor.", problem)
    return session


def torch_device(name: str) -> str:
    """Returns the torch device for a configured name; "auto" means cuda if available, else cpu.

    Models call it before they load, so torch has the threads that `pin_threads` set.
    """
    import torch

    if _threads:
        torch.set_num_threads(_threads)
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name

"""Fully sharded data parallel training (FSDP): each process keeps a part of the parameters that
train, of their gradients and optimizer states, and of the frozen UNet.

It is asked for by accelerate's configuration, and done here by torch's `fully_shard`. accelerate's
own preparation doesn't know that the attention processors are modules of the adapter and of the
UNet's blocks, and computes in another precision than without FSDP.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from configs.errors import ConfigError
from configs.training import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.step import TrainedModel

# Variables by which accelerate's launcher passes its configuration on.
_FSDP: Final = "ACCELERATE_USE_FSDP"
_RESHARD: Final = "FSDP_RESHARD_AFTER_FORWARD"
_OTHER_STRATEGIES: Final = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism_config",
}
_REFUSED: Final = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: parameters on the CPU aren't supported. Leave it"
    " out.",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: set gradient_checkpointing="
    "true in the trainer's settings instead.",
    "FSDP_IGNORED_MODULES": "fsdp_ignored_modules: the trainer decides what is sharded. Leave it"
    " out.",
}


def is_asked_for() -> bool:
    """Returns whether accelerate's configuration asks for FSDP."""
    return _is_true(_FSDP)


def check_sharding(config: TrainConfig) -> None:
    """Raises ConfigError if accelerate's configuration asks for a way to divide the training that
    doesn't work, or for FSDP with settings that don't work with it.
    """
    for variable, name in _OTHER_STRATEGIES.items():
        if _is_true(variable):
            raise ConfigError(
                f"accelerate's configuration asks for {name} ({variable}), which the trainer "
                "doesn't have. Use FSDP: accelerate launch --use_fsdp --fsdp_version 2, or one "
                "process for each GPU without it (DDP)."
            )
    if not is_asked_for():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"accelerate's configuration asks for FSDP with fsdp_version={version}: expected 2. "
            "Give --fsdp_version 2, or fsdp_version: 2 in its YAML file."
        )
    for variable, text in _REFUSED.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "false", "none"):
            raise ConfigError(f"accelerate's configuration of FSDP has {text}")
    reshard = os.environ.get(_RESHARD, "true")
    if reshard.lower() not in ("true", "false"):
        raise ConfigError(
            f"accelerate's configuration has fsdp_reshard_after_forward={reshard}: expected true "
            "or false with FSDP 2."
        )
    wrong = {
        f"ray.address={config.ray.address}": bool(config.ray.address),
        f"mixed_precision={config.mixed_precision} (use bf16 or no)": (
            config.mixed_precision == "fp16"
        ),
        f"optim.optimizer={config.optim.optimizer} (use adamw)": config.optim.optimizer != "adamw",
        f"validation_steps={config.validation_steps} (use 0)": config.validation_steps > 0,
        f"compile={config.compile} (use no)": config.compile != "no",
        "channels_last=true (use false)": config.channels_last,
        "ema.on_cpu=true (use false)": bool(config.ema.decay) and config.ema.on_cpu,
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(
            f"these settings don't work with FSDP: {'; '.join(names)}. Change them, or train "
            "without FSDP."
        )


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """A context in which accelerate prepares several processes as without FSDP.

    Afterwards, transformers loads all weights in all processes. With FSDP it may be told to do so
    in the first one only (fsdp_cpu_ram_efficient_loading), and the encoders aren't sharded.
    """
    value = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[_FSDP] = value
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard(trained: TrainedModel, accelerator: Any) -> None:
    """Divides a model among the processes, in place, if FSDP is asked for and there are several.

    Its parameters become DTensors, so make the optimizer and the moving average afterwards. The
    blocks of the UNet are gathered one at a time when they compute; the rest, most of it projector
    and facial encoder, for the whole step.
    """
    if not is_asked_for() or accelerator.num_processes == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = os.environ.get(_RESHARD, "true").lower() == "true"
    blocks = [
        module
        for module in trained.unet.modules()
        if type(module).__name__ in trained.unet._no_split_modules
    ]
    for block in reversed(blocks):  # inner ones first
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    # the adapter has the attention processors too
    of_blocks: set[nn.Parameter] = {
        each for each in trained.parameters() if isinstance(each, DTensor)
    }
    fully_shard(trained, mesh=mesh, ignored_params=of_blocks)


def is_sharded(model: nn.Module) -> bool:
    """Returns whether `shard` has divided a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def prepare(accelerator: Any, trained: TrainedModel, optimizer: Any) -> tuple[nn.Module, Any]:
    """Returns the model that takes part in a step, and the optimizer, wrapped by accelerate."""
    if not is_sharded(trained):
        model, optimizer = accelerator.prepare(trained, optimizer)
        return model, optimizer
    # for evaluation: accelerate only adds autocast
    model = accelerator.prepare_model(trained, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(optimizer)


def without_sync(accelerator: Any, model: nn.Module) -> AbstractContextManager[None]:
    """A context in which gradients of several micro-batches are added up before the processes
    exchange them. Sharded ones are exchanged at once, since a whole gradient may not fit.
    """
    if is_sharded(model):
        return nullcontext()
    context: AbstractContextManager[None] = accelerator.no_sync(model)
    return context


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with the parts of all processes. They must call it together if it is
    sharded.
    """
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(parameter: Tensor, whole_tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor that has an entry for each one of a parameter; the
    tensor itself if the parameter isn't sharded, or has another shape.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or whole_tensor.shape != parameter.shape:
        return whole_tensor
    return distribute_tensor(
        whole_tensor.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,  # each process has the whole
    )


def take_part(value: Any) -> None:
    """Takes part in gathering the sharded tensors of nested dicts, lists and tuples, which the main
    process does, and keeps nothing.
    """
    from torch import Tensor

    if isinstance(value, Tensor):
        whole(value)
    elif isinstance(value, Mapping):
        take_part([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            take_part(item)

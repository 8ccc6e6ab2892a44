"""Offloading: changes of a UNet whose weights diffusers or accelerate keeps elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from configs.errors import ConfigError


def uncompiled(unet: Any) -> Any:
    """Returns the module that `torch.compile` wraps, or the module itself."""
    return getattr(unet, "_orig_mod", unet)


@contextmanager
def resident(unet: Any) -> Iterator[None]:
    """Takes a UNet's offloading hooks off for a change of its modules, and puts them on afterwards.

    With `enable_sequential_cpu_offload` each layer's weights are elsewhere, and new layers would
    have no hooks. Group offloading refers to the layers that there were. The hooks of
    `enable_model_cpu_offload` move the whole UNet, so they stay. Raises ConfigError for a UNet that
    a device_map has spread over devices or disk.
    """
    module: nn.Module = uncompiled(unet)
    offloaded = any(weight.is_meta for weight in module.parameters())
    if offloaded and getattr(module, "hf_device_map", None):
        raise ConfigError(
            "the UNet was loaded with a device_map that keeps weights off its devices, so the "
            "adapter can't be put in or taken out; load it without, and use an offloading method"
        )
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    hooks = [getattr(each, "_hf_hook", None) for each in module.modules()]
    devices = [d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None]
    if offloaded:
        remove_hook_from_module(module, recurse=True)
    try:
        yield
    finally:
        if offloaded:
            cpu_offload(module, devices[0], offload_buffers=len(module._parameters) > 0)
        _maybe_remove_and_reapply_group_offloading(module)

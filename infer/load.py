"""Loads a pipeline from a configuration: finds its adapter, LoRA, base model and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.portraits import InferConfig
from infer.adapter import reading_config
from infer.components import load_lora, precision
from infer.mixin import ConsistentIDMixin
from infer.pipelines import ConsistentIDPipeline, ConsistentIDXLPipeline
from model.base import adapter_path, base_path
from model.checkpoint import AdapterFile, read_adapter
from stages.backends.runtime import torch_device


def load_pipeline(config: InferConfig) -> ConsistentIDMixin:
    """Loads the pipeline of a configuration, on its device, with its adapter.

    Raises ConfigError if the configuration doesn't fit the adapter, WeightsError for weights that
    can't be loaded.
    """
    source = configured_adapter(config)
    adapter = read_adapter(source)
    for name, own in (("spec", adapter.spec.name), ("mode", adapter.mode)):
        requested = getattr(config.model, name)
        if requested not in ("auto", own):
            raise ConfigError(
                f"model.{name}={requested}, but {source} is of {name} {own}. Set "
                f"model.{name}=auto, or use the preset for this adapter."
            )
    device = torch_device(config.model.device)
    dtype = precision(config.dtype, device)
    base = base_of(config, source, adapter)
    options: dict[str, Any] = {}
    if config.model.variant:
        options["variant"] = config.model.variant
    kind = ConsistentIDXLPipeline if adapter.spec.two_text_encoders else ConsistentIDPipeline
    if config.model.image_encoder:
        options["image_encoder"] = None  # the adapter's is loaded when it is needed
    pipe = kind.from_pretrained(base, dtype=dtype, **options)
    pipe.load_consistentid_adapter(
        source,
        dataset=reading_config(source, adapter, config.dataset),
        image_encoder=config.model.image_encoder,
    )
    if config.lora:
        load_lora(pipe, config.lora, merge=config.merge_lora)
    if config.merge_lora:
        pipe.fuse_consistentid()
    if config.offload == "none":
        pipe.to(device)
    elif config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def configured_adapter(config: InferConfig) -> Path:
    """Returns the path of the adapter. Raises ConfigError if none is set or it doesn't exist."""
    if not config.adapter:
        raise ConfigError(
            "no adapter given. Set adapter=FOLDER, the final/ of a training run, or adapter=FILE, "
            "published weights."
        )
    source = Path(adapter_path(config.adapter)).expanduser()
    if not source.exists():
        raise ConfigError(
            f"adapter={config.adapter}: nothing there. A training run writes its adapter to "
            "OUT/final; check the path."
        )
    return source


def base_of(config: InferConfig, source: Path, adapter: AdapterFile) -> str:
    """Returns the base model's folder or hub id.

    It is model.base, else the spec's, else `base/` beside the adapter's folder, where the trainer
    makes the tiny one. Raises ConfigError if there is none.
    """
    if config.model.base or adapter.spec.base:
        return base_path(config.model.base or adapter.spec.base)
    folder = source if source.is_dir() else source.parent
    local = folder.resolve().parent / "base"
    if not local.is_dir():
        raise ConfigError(
            f"adapter={config.adapter} is of spec {adapter.spec.name}, whose base model is made "
            f"locally, but {local} doesn't exist. "
            "Set model.base=FOLDER, the base model that it was trained with."
        )
    return str(local)

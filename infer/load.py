"""From a configuration to a generator: which adapter, which base beneath it, which stages before
it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig, DetectConfig, EmbedConfig, InferConfig
from infer.generator import ConsistentIDGenerator
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, load_adapter, read_adapter
from model.consistentid import ConsistentID, load_base
from stages.backends.runtime import torch_device

DATASET_FILE: Final = "dataset.yaml"  # the trainer keeps it beside the adapter


def load_generator(config: InferConfig) -> ConsistentIDGenerator:
    """The generator of a configuration, on its device.

    Raises ConfigError where the configuration doesn't fit the adapter, WeightsError for weights
    that can't be had.
    """
    import torch

    source = adapter_path(config)
    adapter = read_adapter(source)
    for name, own in (("spec", adapter.spec.name), ("mode", adapter.mode)):
        wanted = getattr(config.model, name)
        if wanted not in ("auto", own):
            raise ConfigError(
                f"model.{name}={wanted}, but {source} is of {name} {own}: "
                f"take model.{name}=auto (the preset may be made for another adapter)"
            )
    dataset = dataset_config(config)
    device, dtype = torch_device(config.model.device), getattr(torch, config.dtype)
    folder = _folder(source)
    base = load_base(
        adapter.spec,
        base_of(config, adapter),
        image_encoder=config.model.image_encoder or None,
        unet=folder / "unet" if (folder / "unet").is_dir() else None,
        device=device,
        dtype=dtype,
        variant=config.model.variant or None,
    )
    if base.vae.config.get("force_upcast"):  # SDXL's overflows in half precision
        base.vae.float()
    model = ConsistentID(adapter.spec, base.unet, adapter.mode)
    load_adapter(adapter, model)
    model.requires_grad_(False).to(device, dtype)
    return ConsistentIDGenerator(base, model, config, dataset, digest=adapter_digest(source))


def adapter_path(config: InferConfig) -> Path:
    """Where the adapter is. Raises ConfigError if none is given or it isn't there."""
    if not config.adapter:
        raise ConfigError(
            "no adapter given: adapter=FOLDER, the final/ of a training run, or a published "
            "weights file"
        )
    source = Path(config.adapter).expanduser()
    if not source.exists():
        raise ConfigError(
            f"adapter={config.adapter}: nothing there. A training run leaves its adapter in "
            "OUT/final."
        )
    return source


def base_of(config: InferConfig, adapter: AdapterFile) -> str:
    """The base model's folder or hub id: as given, else the spec's own, else `base/` beside the
    adapter's folder, where the trainer makes the tiny one. Raises ConfigError if there is none.
    """
    if config.model.base or adapter.spec.base:
        return config.model.base or adapter.spec.base
    near = _folder(adapter_path(config)).resolve().parent / "base"
    if not near.is_dir():
        raise ConfigError(
            f"adapter={config.adapter} is of spec {adapter.spec.name}, whose base is made "
            f"locally, and {near} isn't "
            "there. Say model.base=FOLDER, the base that it was trained on."
        )
    return str(near)


def dataset_config(config: InferConfig) -> DatasetConfig:
    """The data set's configuration: the one given, else the one kept beside the adapter, else the
    defaults; for the published weights those with buffalo_l, whose identities they learnt: another
    embedder's would mean nothing.
    """
    source = adapter_path(config)
    if config.dataset:
        return load(DatasetConfig, config.dataset)
    kept = _folder(source) / DATASET_FILE
    if kept.is_file():
        return load(DatasetConfig, kept)
    if (_folder(source) / CONFIG_FILE).is_file():
        return DatasetConfig()
    return DatasetConfig(
        detect=DetectConfig(weights="det_10g"), embed=EmbedConfig(weights="w600k_r50")
    )


def adapter_digest(source: Path) -> str:
    """sha256 of the adapter's weights file."""
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    with weights.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent

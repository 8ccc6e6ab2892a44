"""Loads a generator from a configuration: finds its adapter, base model and data set stages."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from configs.errors import ConfigError
from configs.load import load
from configs.portraits import InferConfig
from configs.schema import DatasetConfig, DetectConfig, EmbedConfig
from infer.generator import ConsistentIDGenerator
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, load_adapter, read_adapter
from model.consistentid import ConsistentID, load_base
from stages.backends.runtime import torch_device

DATASET_FILE: Final = "dataset.yaml"  # which the trainer writes beside the adapter


def load_generator(config: InferConfig) -> ConsistentIDGenerator:
    """Loads the generator of a configuration, on its device.

    Raises ConfigError if the configuration doesn't fit the adapter, WeightsError for weights that
    can't be loaded.
    """
    import torch

    source = adapter_path(config)
    adapter = read_adapter(source)
    for name, own in (("spec", adapter.spec.name), ("mode", adapter.mode)):
        requested = getattr(config.model, name)
        if requested not in ("auto", own):
            raise ConfigError(
                f"model.{name}={requested}, but {source} is of {name} {own}. Set "
                f"model.{name}=auto, or use the preset for this adapter."
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
    if base.vae.config.get("force_upcast"):  # SDXL's VAE overflows in half precision
        base.vae.float()
    model = ConsistentID(adapter.spec, base.unet, adapter.mode)
    load_adapter(adapter, model)
    model.requires_grad_(False).to(device, dtype)
    return ConsistentIDGenerator(base, model, config, dataset, digest=adapter_digest(source))


def adapter_path(config: InferConfig) -> Path:
    """Returns the path of the adapter. Raises ConfigError if none is set or it doesn't exist."""
    if not config.adapter:
        raise ConfigError(
            "no adapter given. Set adapter=FOLDER, the final/ of a training run, or adapter=FILE, "
            "published weights."
        )
    source = Path(config.adapter).expanduser()
    if not source.exists():
        raise ConfigError(
            f"adapter={config.adapter}: nothing there. A training run writes its adapter to "
            "OUT/final; check the path."
        )
    return source


def base_of(config: InferConfig, adapter: AdapterFile) -> str:
    """Returns the base model's folder or hub id.

    It is model.base, else the spec's, else `base/` beside the adapter's folder, where the trainer
    makes the tiny one. Raises ConfigError if there is none.
    """
    if config.model.base or adapter.spec.base:
        return config.model.base or adapter.spec.base
    local = _folder(adapter_path(config)).resolve().parent / "base"
    if not local.is_dir():
        raise ConfigError(
            f"adapter={config.adapter} is of spec {adapter.spec.name}, whose base model is made "
            f"locally, but {local} doesn't exist. "
            "Set model.base=FOLDER, the base model that it was trained with."
        )
    return str(local)


def dataset_config(config: InferConfig) -> DatasetConfig:
    """Returns the configuration of the stages that read the photograph.

    It is config.dataset, else the file beside the adapter, else the defaults. Published weights
    get the defaults with buffalo_l's detector and embedder, because they were trained with its
    identities; those of another embedder have no meaning to them.
    """
    source = adapter_path(config)
    if config.dataset:
        return load(DatasetConfig, config.dataset)
    path = _folder(source) / DATASET_FILE
    if path.is_file():
        return load(DatasetConfig, path)
    if (_folder(source) / CONFIG_FILE).is_file():
        return DatasetConfig()
    return DatasetConfig(
        detect=DetectConfig(weights="det_10g"), embed=EmbedConfig(weights="w600k_r50")
    )


def adapter_digest(source: Path) -> str:
    """Returns the sha256 of the adapter's weights file."""
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    with weights.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent

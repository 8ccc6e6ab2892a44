"""Checkpoints: safetensors with the published prefixes, and a JSON beside them that says what they
are.

    adapter.safetensors   image_proj_model.*  adapter_modules.*  FacialEncoder.*
    adapter.json          format, mode, spec (every field), step, versions, and what the caller adds

Published `.bin` files are read too, without unpickling anything but tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import WeightsError
from model.consistentid import ConsistentID
from model.spec import SPECS, ModelSpec
from stages.regions import Mode

FORMAT: Final = 1
WEIGHTS_FILE: Final = "adapter.safetensors"
CONFIG_FILE: Final = "adapter.json"
_PREFIXES: Final = ("image_proj_model", "adapter_modules", "FacialEncoder")
_ALIASES: Final = {"image_proj": "image_proj_model"}  # ConsistentID-v1.bin's name for it


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """A checkpoint in memory: flat state, and what it was made for."""

    state: dict[str, Tensor]
    spec: ModelSpec
    mode: Mode
    config: dict[str, Any]


def save_adapter(
    model: ConsistentID, folder: Path, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint of the adapter; the JSON comes last, so a folder with one is whole.
    Returns the folder.

    config: JSON-ready, e.g. step and name of the data set; mode, spec and versions are added.
    """
    import diffusers
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    _written(folder / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    whole = {
        **(config or {}),
        "format": FORMAT,
        "mode": model.mode,
        "spec": asdict(model.spec),
        "versions": {name: str(version) for name, version in versions.items()},
    }
    text = json.dumps(whole, indent=2, sort_keys=True) + "\n"
    _written(folder / CONFIG_FILE, lambda path: path.write_text(text))
    return folder


def read_adapter(source: Path) -> AdapterFile:
    """Read a folder written by `save_adapter`, its .safetensors, or a published .bin or
    .safetensors.

    A file without a JSON beside it is a published one: legacy mode, its size told by its weights.
    Raises WeightsError.
    """
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    if not weights.is_file():
        raise WeightsError(
            f"{source}: no adapter there; expected a folder with {WEIGHTS_FILE}, or a weights file"
        )
    state = _flat_state(weights)
    described = weights.with_name(CONFIG_FILE)
    if weights.name == WEIGHTS_FILE and described.is_file():
        config = json.loads(described.read_text())
        if config.get("format") != FORMAT:
            raise WeightsError(
                f"{described}: format {config.get('format')}, this version reads {FORMAT}; "
                "update it"
            )
        return AdapterFile(
            state=state, spec=_spec_of(config, described), mode=config["mode"], config=config
        )
    spec = _published_spec(state, weights)
    return AdapterFile(
        state=state, spec=spec, mode="legacy", config={"mode": "legacy", "published": weights.name}
    )


def load_adapter(source: Path | AdapterFile, model: ConsistentID) -> dict[str, Any]:
    """Load a checkpoint into a model of the same spec and mode; returns its config.

    Every key must be there once with the right shape: WeightsError names those that aren't.
    """
    adapter = source if isinstance(source, AdapterFile) else read_adapter(source)
    if adapter.mode != model.mode:
        raise WeightsError(
            f"the checkpoint is of {adapter.mode} mode, the model of {model.mode}; set mode "
            "accordingly"
        )
    own = model.state_dict()
    faults = (
        _listed("missing", own.keys() - adapter.state.keys()),
        _listed("unexpected", adapter.state.keys() - own.keys()),
        _listed(
            "mis-shaped",
            (
                f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
                for key, value in adapter.state.items()
                if key in own and value.shape != own[key].shape
            ),
        ),
    )
    if any(faults):
        raise WeightsError(
            f"the checkpoint doesn't fit model {model.spec.name!r}: "
            f"{'; '.join(filter(None, faults))}; "
            f"it was made for {adapter.spec.name!r}, load it with that model and its base"
        )
    model.load_state_dict(adapter.state, strict=True)
    return adapter.config


def save_unet(unet: Any, folder: Path) -> Path:
    """Write a UNet that was trained too, in diffusers' layout and without the adapter's processors
    in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in unet.state_dict().items()
        if ".processor." not in key
    }
    _written(
        folder / "diffusion_pytorch_model.safetensors",
        lambda path: save_file(state, path, metadata={"format": "pt"}),
    )
    unet.save_config(folder)
    return folder


def _written(path: Path, write: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    write(partial)
    partial.replace(path)


def _flat_state(weights: Path) -> dict[str, Tensor]:
    try:
        if weights.suffix == ".safetensors":
            nested: Mapping[str, Any] = load_file(weights)
        else:
            nested = torch.load(weights, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise WeightsError(
            f"{weights}: not a readable weights file ({error}); download it again"
        ) from error
    # torch raises pickle.UnpicklingError, a bare Exception, for what isn't tensors
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise WeightsError(
            f"{weights}: holds more than tensors and is not loaded; get it from its author"
        ) from error
    flat: dict[str, Tensor] = {}
    for key, value in nested.items():
        parts = (
            {f"{key}.{inner}": tensor for inner, tensor in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        for name, tensor in parts.items():
            head, _, rest = name.partition(".")
            flat[f"{_ALIASES.get(head, head)}.{rest}"] = tensor
    heads = {key.partition(".")[0] for key in flat}
    if heads != set(_PREFIXES):
        raise WeightsError(
            f"{weights}: holds {', '.join(sorted(heads)) or 'nothing'}; expected "
            f"{', '.join(_PREFIXES)} "
            "(an adapter of ConsistentID, not a base model or a LoRA)"
        )
    return flat


def _spec_of(config: Mapping[str, Any], path: Path) -> ModelSpec:
    known = {field.name for field in fields(ModelSpec)}
    values = config.get("spec")
    if (
        not isinstance(values, dict)
        or not set(values) <= known
        or config.get("mode") not in ("legacy", "corrected")
    ):
        raise WeightsError(
            f"{path}: no valid spec and mode in it; the file is damaged or of a newer version"
        )
    return ModelSpec(**{**values, "hooked": tuple(values.get("hooked", ()))})


def _published_spec(state: Mapping[str, Tensor], path: Path) -> ModelSpec:
    norm = state.get("image_proj_model.norm.weight")
    width = 0 if norm is None else len(norm)
    for spec in SPECS.values():
        if spec.base and spec.cross_attention_dim == width:
            return spec
    raise WeightsError(
        f"{path}: ID tokens {width} wide; known are those of SD 1.5 (768) and SDXL (2048)"
    )


def _listed(kind: str, keys: Iterable[str]) -> str:
    names = sorted(keys)
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(names)} {kind} ({shown})" if names else ""

"""Adapter checkpoints: a folder of weights and of the configuration that they need.

    adapter.safetensors   image_proj_model.*  adapter_modules.*  FacialEncoder.*
    adapter.json          format, mode, spec (every field), versions, and the caller's entries

The key prefixes are those of the published weights. Published `.bin` files are read too; only
tensors in them are unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
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
_ALIASES: Final = {"image_proj": "image_proj_model"}  # prefix in ConsistentID-v1.bin → ours


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """A checkpoint in memory.

    state: flat, dotted keys. config: the contents of adapter.json; of a published file its name
    and mode.
    """

    state: dict[str, Tensor]
    spec: ModelSpec
    mode: Mode
    config: dict[str, Any]


def save_adapter(
    model: ConsistentID,
    folder: Path,
    config: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint of the adapter to `folder` and returns the folder.

    The JSON is written last, so a folder that has one is complete. config: entries for the JSON,
    e.g. the step and the data set's digest; format, mode, spec and versions are added. state: an
    earlier copy of the model's weights, which are written in place of those that it has now.
    """
    import diffusers
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    weights = _on_cpu(model.state_dict() if state is None else state)
    _write_atomically(
        folder / WEIGHTS_FILE, lambda path: save_file(weights, path, metadata={"format": "pt"})
    )
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    content = {
        **(config or {}),
        "format": FORMAT,
        "mode": model.mode,
        "spec": asdict(model.spec),
        "versions": {name: str(version) for name, version in versions.items()},
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    _write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text))
    return folder


def read_adapter(source: Path) -> AdapterFile:
    """Reads a folder that `save_adapter` wrote, its .safetensors, or a published weights file.

    A file without adapter.json beside it is taken for a published one: its mode is legacy, its
    spec follows from the width of its weights. Raises WeightsError if there is no adapter, if it
    can't be read, or if its format is newer.
    """
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    if not weights.is_file():
        raise WeightsError(
            f"{source}: no adapter there; check the path. "
            f"Expected a folder with {WEIGHTS_FILE}, or a weights file."
        )
    state = _flat_state(weights)
    config_path = weights.with_name(CONFIG_FILE)
    if weights.name == WEIGHTS_FILE and config_path.is_file():
        config = json.loads(config_path.read_text())
        if config.get("format") != FORMAT:
            raise WeightsError(
                f"{config_path}: format {config.get('format')}, but this version reads format "
                f"{FORMAT}; update consistentid-pipeline"
            )
        return AdapterFile(
            state=state, spec=_spec_of(config, config_path), mode=config["mode"], config=config
        )
    spec = _published_spec(state, weights)
    return AdapterFile(
        state=state, spec=spec, mode="legacy", config={"mode": "legacy", "published": weights.name}
    )


def load_adapter(source: Path | AdapterFile, model: ConsistentID) -> dict[str, Any]:
    """Loads a checkpoint into a model of the same spec and mode, and returns its config.

    Raises WeightsError if the modes differ, or if keys are missing, unexpected or of another
    shape; the message names them.
    """
    adapter = source if isinstance(source, AdapterFile) else read_adapter(source)
    if adapter.mode != model.mode:
        raise WeightsError(
            f"the checkpoint was made in {adapter.mode} mode, the model in {model.mode}; set "
            f"model.mode={adapter.mode}"
        )
    own = model.state_dict()
    faults = (
        _key_summary("missing", own.keys() - adapter.state.keys()),
        _key_summary("unexpected", adapter.state.keys() - own.keys()),
        _key_summary(
            "mis-shaped",
            (
                f"{key} {tuple(value.shape)}, expected {tuple(own[key].shape)}"
                for key, value in adapter.state.items()
                if key in own and value.shape != own[key].shape
            ),
        ),
    )
    if any(faults):
        raise WeightsError(
            f"the checkpoint doesn't fit model {model.spec.name!r}: "
            f"{'; '.join(filter(None, faults))}. "
            f"It was made for {adapter.spec.name!r}; load it with that model and its base."
        )
    model.load_state_dict(adapter.state, strict=True)
    return adapter.config


def save_unet(unet: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Writes a trained UNet to `folder` in diffusers' layout and returns the folder.

    state: an earlier copy of `unet_state(unet)`, which is written in place of the present weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = _on_cpu(unet_state(unet) if state is None else state)
    _write_atomically(
        folder / "diffusion_pytorch_model.safetensors",
        lambda path: save_file(weights, path, metadata={"format": "pt"}),
    )
    unet.save_config(folder)
    return folder


def unet_state(unet: Any) -> dict[str, Tensor]:
    """Returns a UNet's weights without the adapter's attention processors, which are modules of
    it.
    """
    return {key: value for key, value in unet.state_dict().items() if ".processor." not in key}


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file beside `path`, then renames it to `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    write(partial)
    partial.replace(path)


def _flat_state(weights: Path) -> dict[str, Tensor]:
    """Reads a weights file, nested by prefix or flat, as dotted keys under the current prefixes."""
    try:
        if weights.suffix == ".safetensors":
            nested: Mapping[str, Any] = load_file(weights)
        else:
            nested = torch.load(weights, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise WeightsError(
            f"{weights}: not a readable weights file ({error}); download it again."
        ) from error
    except pickle.UnpicklingError as error:  # what torch raises for anything but tensors
        raise WeightsError(
            f"{weights}: contains objects other than tensors, which are not loaded for safety; "
            "get the file from its author."
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
            f"{', '.join(_PREFIXES)}. Name a ConsistentID adapter, not a base model or a LoRA."
        )
    return flat


def _spec_of(config: Mapping[str, Any], path: Path) -> ModelSpec:
    spec_fields = {field.name for field in fields(ModelSpec)}
    values = config.get("spec")
    if (
        not isinstance(values, dict)
        or not set(values) <= spec_fields
        or config.get("mode") not in ("legacy", "corrected")
    ):
        raise WeightsError(
            f"{path}: no valid spec and mode in it; the file is damaged or of a newer version. "
            "Save the adapter again, or update consistentid-pipeline."
        )
    return ModelSpec(**{**values, "hooked": tuple(values.get("hooked", ()))})


def _published_spec(state: Mapping[str, Tensor], path: Path) -> ModelSpec:
    norm = state.get("image_proj_model.norm.weight")
    width = 0 if norm is None else len(norm)
    for spec in SPECS.values():
        if spec.base and spec.cross_attention_dim == width:
            return spec
    raise WeightsError(
        f"{path}: ID tokens are {width} wide; expected 768 (SD 1.5) or 2048 (SDXL). Name an "
        "adapter of one of these models."
    )


def _key_summary(kind: str, keys: Iterable[str]) -> str:
    """Returns the number of keys and the first four of them; "" for none."""
    names = sorted(keys)
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{len(names)} {kind} ({shown})" if names else ""

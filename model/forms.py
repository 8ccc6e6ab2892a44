"""The forms in which an adapter is stored: reading all of them, and writing each.

    adapter     a folder with adapter.safetensors and adapter.json (model.checkpoint)
    published   .bin: a dict FacialEncoder, image_proj or image_proj_model, adapter_modules
    ip-adapter  .bin or .safetensors: image_proj and ip_adapter, as IP-Adapter's FaceID-Plus files

A training state, as accelerate saves the whole model with its UNet, can be read. Equal input gives
equal bytes in all forms.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import ConfigError, WeightsError
from model.attention import IdentityCrossAttention, LoRASelfAttention
from model.checkpoint import (
    CONFIG_FILE,
    PREFIXES,
    WEIGHTS_FILE,
    AdapterFile,
    published_adapter,
    read_adapter,
    write_adapter,
)
from model.facial_encoder import facial_encoder
from model.projector import identity_projector
from model.spec import PARTS, ModelSpec
from model.weights_file import check_fit, read_weights, write_atomically

_TRAINING_STATES: Final = ("model.safetensors", "pytorch_model.bin")  # accelerate's names
_COMPANION: Final = "dataset.yaml"  # which the trainer writes beside an adapter
_SECTIONS: Final = ("down_blocks", "up_blocks", "mid_block")  # diffusers' order of processors

# Widths of the UNet's transformer blocks and how many in a row have them, in diffusers' order of
# attention processors: down, up, mid. Each block has two processors. The UNet of small is that of
# configs.base_model.DenoiserConfig's defaults.
_BLOCKS: Final = {
    "tiny": ((48, 1), (96, 1), (96, 2), (48, 2), (96, 1)),
    "small": ((96, 1), (128, 1), (128, 2), (96, 2), (128, 1)),
    "sd15": ((320, 2), (640, 2), (1280, 2), (1280, 3), (640, 3), (320, 3), (1280, 1)),
    "sdxl": ((640, 4), (1280, 20), (1280, 30), (640, 6), (1280, 10)),
}

# what diffusers' class for FaceID-Plus projectors fixes
_FACEID_PLUS: Final = {
    "num_tokens": 4,
    "identity_hidden": 1024,
    "projector_depth": 4,
    "dim_head": 64,
}


def expected_state(spec: ModelSpec) -> dict[str, Tensor]:
    """Returns the state of an adapter on the spec's own UNet, on the meta device.

    Its keys are in the order of the modules. Raises WeightsError for a spec with another name than
    those of `model.spec.SPECS`, whose UNet isn't known.
    """
    if spec.name not in _BLOCKS:
        raise WeightsError(
            f"the adapter is for model {spec.name!r}; only those for {', '.join(_BLOCKS)} can be "
            "converted"
        )
    width = spec.cross_attention_dim
    with torch.device("meta"):
        processors = nn.ModuleList(
            processor
            for hidden, count in _BLOCKS[spec.name]
            for _ in range(count)
            for processor in (
                LoRASelfAttention(hidden, hidden, spec),
                IdentityCrossAttention(hidden, width, spec),
            )
        )
        parts = zip(
            PREFIXES, (identity_projector(spec), facial_encoder(spec), processors), strict=True
        )
        return {
            f"{prefix}.{key}": value
            for prefix, part in parts
            for key, value in part.state_dict().items()
        }


def read_any(source: Path) -> AdapterFile:
    """Reads an adapter in our form or the published one, or a training state.

    Its state has the keys and shapes of its spec, in order. A training state is taken for one of
    the published form's trainer: mode legacy, and the embedder of the published files. Raises
    WeightsError for anything else; for a wrong key the message names the first, what was given and
    what was expected.
    """
    adapter = _without_json(source) or read_adapter(source)
    expected = expected_state(adapter.spec)
    if fault := check_fit(adapter.state, expected):
        raise WeightsError(
            f"{source} doesn't fit model {adapter.spec.name!r}: {fault}. Convert the file that its "
            "author published, or that the trainer saved."
        )
    return replace(adapter, state={key: adapter.state[key] for key in expected})


def _without_json(source: Path) -> AdapterFile | None:
    """Reads a published file or a training state; returns None if `source` is neither."""
    path = source
    if source.is_dir() and not (source / WEIGHTS_FILE).exists():
        path = next((source / n for n in _TRAINING_STATES if (source / n).is_file()), source)
    if not path.is_file() or path.name == WEIGHTS_FILE:
        return None
    weights = read_weights(path)
    if not any(key.startswith("unet.") for key in weights):
        return published_adapter(weights, path)
    adapter = published_adapter(_without_unet(weights), path)
    config = {name: value for name, value in adapter.config.items() if name != "published"}
    return replace(adapter, config={**config, "training_state": path.name})


def _without_unet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the adapter's part of a training state.

    The processors are modules of the UNet too, and safetensors keeps a tensor under the first of
    its names, which is that in the UNet.
    """
    state = {key: value for key, value in weights.items() if not key.startswith("unet.")}
    processors = [key for key in weights if key.startswith("unet.") and ".processor." in key]
    paths = sorted({key.partition(".processor.")[0] for key in processors}, key=_place)
    number = {path: index for index, path in enumerate(paths)}
    for key in processors:
        path, _, rest = key.partition(".processor.")
        state.setdefault(f"adapter_modules.{number[path]}.{rest}", weights[key])
    return state


def _place(path: str) -> tuple[int, list[tuple[int, str]]]:
    """Returns by what diffusers orders attention layers. path: of a layer, from `unet.` on."""
    section, *parts = path.split(".")[1:]
    order = _SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS)
    return order, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def cast(adapter: AdapterFile, dtype: torch.dtype | None) -> AdapterFile:
    """Returns the adapter with its weights in `dtype`; None: as they are.

    Each tensor then has memory of its own. Raises WeightsError for a weight that isn't finite in
    that type.
    """
    state = {}
    for key, value in adapter.state.items():
        state[key] = value.to(dtype or value.dtype, copy=True).contiguous()
        if not bool(torch.isfinite(state[key]).all()):
            raise WeightsError(
                f"{adapter.source}: {key} has values that are not finite in {state[key].dtype}, "
                f"given {value.dtype}. Convert with --dtype same or bfloat16; if they were not "
                "finite before, the adapter is damaged."
            )
    return replace(adapter, state=state)


def write_published(adapter: AdapterFile, target: Path) -> None:
    """Writes a `.bin` as the published ones: the projector's key is `image_proj` for SD 1.5, and
    `image_proj_model` for SDXL. Raises WeightsError for an adapter that lacks parts.
    """
    _check_parts(adapter, PARTS, "the published form")
    nested = _nested(adapter.state)
    content = {
        "FacialEncoder": nested["FacialEncoder"],
        _projector_key(adapter.spec): nested["image_proj_model"],
        "adapter_modules": nested["adapter_modules"],
    }
    write_atomically(target, lambda path: _save(content, path))


def write_ip_adapter(adapter: AdapterFile, target: Path) -> None:
    """Writes projector, ID attention and LoRA as IP-Adapter's FaceID-Plus files have them, in
    safetensors if `target` ends so.
    """
    nested = _nested(adapter.state)
    content = {"image_proj": nested["image_proj_model"], "ip_adapter": nested["adapter_modules"]}
    if target.suffix.lower() != ".safetensors":
        write_atomically(target, lambda path: _save(content, path))
        return
    flat = {f"{name}.{key}": value for name, part in content.items() for key, value in part.items()}
    write_atomically(target, lambda path: save_file(flat, path, metadata={"format": "pt"}))


def faceid_plus(adapter: AdapterFile) -> AdapterFile:
    """Returns the adapter without its facial encoder; it may lack that and the LoRA. Raises
    WeightsError without projector, and for one of other sizes than FaceID-Plus has.
    """
    _check_parts(adapter, ("projector",), "IP-Adapter's FaceID-Plus form")
    spec = adapter.spec
    wrong = [
        f"{name} {getattr(spec, name)}, expected {value}"
        for name, value in _FACEID_PLUS.items()
        if getattr(spec, name) != value
    ]
    if wrong:
        raise WeightsError(
            f"{adapter.source}: IP-Adapter's FaceID-Plus form has a projector of fixed sizes; "
            f"given {'; '.join(wrong)}. Convert an adapter of sd15 or sdxl."
        )
    state = {k: value for k, value in adapter.state.items() if not k.startswith("FacialEncoder.")}
    return replace(adapter, state=state)


def write_folder(adapter: AdapterFile, target: Path) -> None:
    """Writes an adapter folder with what the source has beside the adapter (dataset.yaml).

    A folder that it replaces is there until the new one is complete.
    """
    source = adapter.source if adapter.source.is_dir() else adapter.source.parent
    own = "format" in adapter.config  # there was an adapter.json
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write_adapter(partial, adapter.state, adapter.spec, adapter.mode, adapter.config)
        if own and (source / _COMPANION).is_file():
            shutil.copyfile(source / _COMPANION, partial / _COMPANION)
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, *, folder: bool, overwrite: bool) -> None:
    """Raises ConfigError for a target that exists, unless it is of the same kind and `overwrite` is
    set; a folder is replaced only if all in it belongs to an adapter.
    """
    if not target.exists() or (folder and target.is_dir() and not any(target.iterdir())):
        return
    if folder != target.is_dir():
        kinds = ("a folder", "a file")
        there, expected = kinds if target.is_dir() else kinds[::-1]
        raise ConfigError(f"{target} is {there}, expected {expected}; name another TARGET.")
    if not overwrite:
        raise ConfigError(f"{target} exists; name another TARGET, or pass --overwrite.")
    names = {path.name for path in target.iterdir()} if folder else set()
    if others := sorted(names - {CONFIG_FILE, WEIGHTS_FILE, _COMPANION}):
        raise ConfigError(
            f"{target} holds {', '.join(others[:4])}, which are no part of an adapter, and is not "
            "overwritten; name another TARGET."
        )


def _check_parts(adapter: AdapterFile, needed: Sequence[str], form: str) -> None:
    """Raises WeightsError for an adapter that lacks one of the parts that a form has."""
    if lacking := [part for part in needed if not adapter.spec.has(part)]:
        raise WeightsError(
            f"{adapter.source}: the adapter has no {', no '.join(lacking)}, and {form} can't state "
            "that. Convert it with --to adapter, or convert an adapter with all parts."
        )


def _projector_key(spec: ModelSpec) -> str:
    return "image_proj_model" if spec.two_text_encoders else "image_proj"


def _nested(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the state by prefix."""
    nested: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in PREFIXES}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        nested[head][rest] = value
    return nested


def _save(content: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # with a path, torch writes the file's name into it
        torch.save(dict(content), file)

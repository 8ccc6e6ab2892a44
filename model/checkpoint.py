"""Adapter checkpoints: a folder of weights and of the configuration that they need.

    adapter.safetensors   image_proj_model.*  adapter_modules.*  FacialEncoder.*
    adapter.json          format, mode, spec (every field), embedder, versions, the caller's entries

The key prefixes are those of the published weights. Published `.bin` files are read too; only
tensors in them are unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import WeightsError
from model.consistentid import ConsistentID
from model.spec import (
    PUBLISHED_EMBEDDER,
    SPECS,
    Embedder,
    ModelSpec,
    spec_from_json,
    spec_to_json,
)
from model.weights_file import beside, check_fit, read_weights, summary_of
from stages.regions import Mode

FORMAT: Final = 1
WEIGHTS_FILE: Final = "adapter.safetensors"
CONFIG_FILE: Final = "adapter.json"
PREFIXES: Final = ("image_proj_model", "FacialEncoder", "adapter_modules")
_ALIASES: Final = {"image_proj": "image_proj_model"}  # prefix in ConsistentID-v1.bin → ours
_WIDTH_KEY: Final = "image_proj_model.norm.weight"
_RANK_KEY: Final = "adapter_modules.0.to_q_lora.down.weight"
_FOREIGN: Final = {  # prefix in a file of another kind → its name
    "ip_adapter": "an IP-Adapter",
    "id_encoder": "a PhotoMaker file",
    "lora_weights": "a PhotoMaker file",
    "down_blocks": "a UNet",
    "base_model": "a LoRA",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """A checkpoint in memory.

    source: where it was read. state: flat, dotted keys; the tensors may be mapped from the file.
    embedder: of the identities that it was trained with, None if an older adapter.json doesn't
    state it. config: the contents of adapter.json; of a published file its name, mode and embedder.
    """

    source: Path
    state: dict[str, Tensor]
    spec: ModelSpec
    mode: Mode
    embedder: Embedder | None
    config: dict[str, Any]


def save_adapter(
    model: ConsistentID,
    folder: Path,
    config: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint of the adapter to `folder` and returns the folder.

    config: entries for the JSON, e.g. the step and the data set's digest; see `write_adapter`.
    state: an earlier copy of the model's weights, which are written in place of those that it has
    now.
    """
    weights = model.state_dict() if state is None else state
    return write_adapter(folder, weights, model.spec, model.mode, config or {})


def write_adapter(
    folder: Path,
    state: Mapping[str, Tensor],
    spec: ModelSpec,
    mode: Mode,
    config: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint to `folder` and returns the folder.

    The JSON is written last, so a folder that has one is complete. One that is replaced is removed
    before the weights are. config: entries for the JSON, to which format, mode, spec and versions
    are added.
    """
    import diffusers
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    content = {
        **config,
        "format": FORMAT,
        "mode": mode,
        "spec": spec_to_json(spec),
        "versions": {name: str(version) for name, version in versions.items()},
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    weights, described = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    with beside(weights) as partial, beside(described) as partial_text:
        partial_text.write_text(text)
        save_file(_on_cpu(state), partial, metadata={"format": "pt"})
        described.unlink(missing_ok=True)
        partial.replace(weights)
        partial_text.replace(described)
    return folder


def read_adapter(source: Path) -> AdapterFile:
    """Reads a folder that `save_adapter` wrote, its .safetensors, or a published weights file.

    Raises WeightsError if there is no adapter, or if a file of it is damaged, of another program or
    of a newer format; the message names the file, what it holds and what was expected.
    """
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    if not weights.is_file():
        raise WeightsError(f"{source}: no adapter there{_instead(source)}")
    if weights.name != WEIGHTS_FILE:
        return published_adapter(read_weights(weights), weights)
    path = weights.with_name(CONFIG_FILE)
    if not path.exists():
        raise WeightsError(
            f"{weights.parent}: no {CONFIG_FILE} there, so the adapter was not written to its end, "
            "or copied in part. Copy the whole folder again, or use an earlier checkpoint."
        )
    try:
        config = _config_in(path)
        spec, mode = spec_from_json(config.get("spec")), _mode_in(config)
        embedder = _embedder_in(config)
    except ValueError as error:
        raise WeightsError(
            f"{path}: {error}. The file is damaged, or of another program or version. Copy the "
            "adapter's folder again, or update consistentid-pipeline."
        ) from error
    return AdapterFile(
        source=source,
        state=_state(read_weights(weights), weights, spec),
        spec=spec,
        mode=mode,
        embedder=embedder,
        config=config,
    )


def published_adapter(weights: Mapping[str, Tensor], path: Path) -> AdapterFile:
    """Returns the adapter of a file without adapter.json, in the form of the published ones.

    Its mode is legacy, its embedder that of the published files; its spec follows from the width of
    its weights, and the rank from the first LoRA. weights: by dotted key, under either name of the
    projector. path: where they were read. Raises WeightsError for weights of something else.
    """
    state = _state(weights, path)
    width, rank = (_first_side(state, key, path) for key in (_WIDTH_KEY, _RANK_KEY))
    specs = {spec.cross_attention_dim: spec for spec in SPECS.values()}
    if width not in specs:
        widths = ", ".join(f"{spec.cross_attention_dim} ({name})" for name, spec in SPECS.items())
        raise WeightsError(
            f"{path}: ID tokens are {width} wide, expected {widths}. Name an adapter of one of "
            "these models."
        )
    return AdapterFile(
        source=path,
        state=state,
        spec=replace(specs[width], lora_rank=rank),
        mode="legacy",
        embedder=PUBLISHED_EMBEDDER,
        config={"mode": "legacy", "published": path.name, "embedder": asdict(PUBLISHED_EMBEDDER)},
    )


def load_adapter(source: Path | AdapterFile, model: ConsistentID) -> dict[str, Any]:
    """Loads a checkpoint into a model of the same spec and mode, and returns its config.

    Raises WeightsError if the modes or the parts differ, or if keys are missing, unexpected or of
    another shape; the message names the first of them.
    """
    adapter = source if isinstance(source, AdapterFile) else read_adapter(source)
    if adapter.mode != model.mode:
        raise WeightsError(
            f"{adapter.source}: the checkpoint was made in {adapter.mode} mode, the model in "
            f"{model.mode}; set model.mode={adapter.mode}"
        )
    if adapter.spec.without != model.spec.without:
        raise WeightsError(
            f"{adapter.source}: the checkpoint lacks {_listed(adapter.spec)}, the model lacks "
            f"{_listed(model.spec)}; set model.without=[{','.join(adapter.spec.without)}]"
        )
    _check_adapter(adapter, model)
    model.load_state_dict(adapter.state, strict=True)
    return adapter.config


def build_adapter(
    adapter: AdapterFile, unet: Any, dtype: torch.dtype, device: torch.device | str
) -> ConsistentID:
    """Puts a checkpoint into `unet` and returns the model, frozen, in `dtype` on `device`.

    Unlike a new model that `load_adapter` fills, it never has weights of its own: its modules are
    made on the meta device, and get copies of the checkpoint's tensors. Raises WeightsError as
    `load_adapter` does; the UNet then has the processors that it had before.
    """
    before = dict(unet.attn_processors)
    try:
        with torch.device("meta"):
            model = ConsistentID(adapter.spec, unet, adapter.mode)
        _check_adapter(adapter, model)
        # copies: on CPUs, the last bit of a product depends on where a mapped tensor begins
        state = {
            key: value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            for key, value in adapter.state.items()
        }
        model.load_state_dict(state, strict=True, assign=True)
    except BaseException:
        unet.set_attn_processor(before)
        raise
    return model.requires_grad_(False).eval()


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _listed(spec: ModelSpec) -> str:
    return ", ".join(spec.without) or "no part"


def _check_adapter(adapter: AdapterFile, model: ConsistentID) -> None:
    if fault := check_fit(adapter.state, model.state_dict()):
        raise WeightsError(
            f"{adapter.source} doesn't fit model {model.spec.name!r} on this UNet: {fault}. It was "
            f"made for {adapter.spec.name!r}; load it with that model and its base."
        )


def _prefixes(spec: ModelSpec | None) -> list[str]:
    """Returns the PREFIXES under which an adapter has weights. None: it has all parts."""
    parts = (("projector",), ("facial_encoder",), ("projector", "lora"))
    return [
        prefix
        for prefix, any_of in zip(PREFIXES, parts, strict=True)
        if spec is None or any(spec.has(part) for part in any_of)
    ]


def _state(
    weights: Mapping[str, Tensor], path: Path, spec: ModelSpec | None = None
) -> dict[str, Tensor]:
    """Returns the weights under the current prefixes. Raises WeightsError for other prefixes than
    those of the spec.
    """
    heads, expected = dict.fromkeys(key.partition(".")[0] for key in weights), _prefixes(spec)
    if sorted(_ALIASES.get(head, head) for head in heads) != sorted(expected):
        kind = next((name for head, name in _FOREIGN.items() if head in heads), "")
        if {"unet", "FacialEncoder"} <= heads.keys():
            kind = "a training state, of which python -m model.convert makes an adapter"
        elif not kind and any("lora" in key for key in weights):
            kind = "a LoRA"
        raise WeightsError(
            f"{path}: holds {summary_of(list(heads))}; expected {', '.join(expected)}"
            f"{' (image_proj is accepted as the first)' if PREFIXES[0] in expected else ''}, each "
            "once. Name a ConsistentID adapter"
            f"{f'; this looks like {kind}' if kind else ', not a base model or a LoRA'}."
        )
    parts = {key: key.partition(".") for key in weights}
    return {
        f"{_ALIASES.get(head, head)}.{rest}": weights[key] for key, (head, _, rest) in parts.items()
    }


def _first_side(state: Mapping[str, Tensor], key: str, path: Path) -> int:
    """Returns a weight's first dimension. Raises WeightsError if there is no such weight."""
    shape = state[key].shape if key in state else ()
    if not shape or not shape[0]:
        what = f"of shape {tuple(shape)}" if key in state else "not in it"
        raise WeightsError(
            f"{path}: {key} is {what}; expected a tensor, by which the model's sizes are "
            "recognised. Get the file from its author again."
        )
    return int(shape[0])


def _instead(source: Path) -> str:
    """Returns the end of an error message: what the path holds, and what was expected."""
    if not source.is_dir():
        return f"; check the path. Expected a folder with {WEIGHTS_FILE}, or a weights file."
    names = sorted(path.name for path in source.iterdir())
    return (
        f". The folder holds {summary_of(names)}; expected {WEIGHTS_FILE} and {CONFIG_FILE}. Name "
        "the folder of an adapter, or a published weights file itself."
    )


def _config_in(path: Path) -> dict[str, Any]:
    """Returns the contents of adapter.json. Raises ValueError if it has none of this format."""
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"it can't be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it isn't JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"it holds a JSON {type(config).__name__}, expected an object")
    version = config.get("format")
    if type(version) is not int:
        raise ValueError(f"its format is {version!r}, expected the number {FORMAT}")
    if version != FORMAT:
        raise ValueError(f"it has format {version}, but this version reads format {FORMAT}")
    return config


def _mode_in(config: Mapping[str, Any]) -> Mode:
    modes: tuple[Mode, ...] = get_args(Mode)
    for mode in modes:
        if mode == config.get("mode"):
            return mode
    raise ValueError(f"mode is {config.get('mode')!r}, expected {' or '.join(modes)}")


def _embedder_in(config: Mapping[str, Any]) -> Embedder | None:
    entry = config.get("embedder")
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.keys() != {"name", "sha256"}:
        raise ValueError(f"embedder is {entry!r}, expected an object with name and sha256")
    try:
        return Embedder(**entry)
    except ValueError as error:
        raise ValueError(f"embedder.{error}") from error

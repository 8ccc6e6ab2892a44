"""The weights with which training starts: those of an adapter, or of an IP-Adapter what fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from configs.errors import WeightsError
from configs.training import PARTS
from model.checkpoint import WEIGHTS_FILE, load_adapter, published_adapter
from model.consistentid import ConsistentID, part_of
from model.spec import PUBLISHED_EMBEDDER, Embedder
from model.weights_file import in_order, read_weights

# IP-Adapter's names → ours. Its FaceID-Plus files have the same projector, and number the attention
# processors in the same order; other kinds share the ID attention.
_IP_ADAPTER: Final = {"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"}


def load_start(source: Path, model: ConsistentID, embedder: Embedder | None = None) -> str:
    """Loads the weights with which training starts; the rest of the model stays as it is.

    source: an adapter's folder, a published file, or an IP-Adapter's file, of which the weights are
    taken that the model has with the same shape. embedder: of the data's identities.

    Returns a text for the user: of each part how many weights were taken, what of the file was
    left, and whether the file is for other identity embeddings than the data's. Raises WeightsError
    as `load_adapter` does, and for an IP-Adapter of which nothing fits.
    """
    read, left, theirs = _load(source, model, model.state_dict())
    count, whole = Counter(map(part_of, read)), Counter(map(part_of, model.state_dict()))
    lines = [f"weights of {source}, by part:"]
    for part in PARTS:
        if whole[part]:
            rest = "; the others start at their initial values" if count[part] < whole[part] else ""
            lines.append(f"  {part:<14}  {count[part]} of {whole[part]}{rest}")
    if left:
        key, fault = next(iter(left.items()))
        lines.append(f"  {len(left)} in the file are not used, the first is {key}: {fault}")
    if embedder and theirs and count["projector"] and theirs != embedder:
        lines.append(
            f"  They are for identity embeddings of {theirs.name}; those of the data are of "
            f"{embedder.name}, which the projector has to learn first."
        )
    return "\n".join(lines)


def _load(
    source: Path, model: ConsistentID, expected: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, str], Embedder | None]:
    """Loads the weights. Returns the keys that were taken, those that were not with the reason, and
    the model of the file's identity embeddings.
    """
    if not source.is_file() or source.name == WEIGHTS_FILE:
        config = load_adapter(source, model)
        entry = config.get("embedder")
        return [*expected], {}, Embedder(**entry) if entry else None
    weights = read_weights(source)
    if {key.partition(".")[0] for key in weights} != _IP_ADAPTER.keys():
        load_adapter(published_adapter(weights, source), model)
        return [*expected], {}, PUBLISHED_EMBEDDER
    renamed = {
        f"{_IP_ADAPTER[head]}.{rest}": value
        for key, value in weights.items()
        for head, _, rest in (key.partition("."),)
    }
    left = {key: fault for key in in_order(renamed) if (fault := _fault(key, renamed, expected))}
    taken = {key: value for key, value in renamed.items() if key not in left}
    if not taken:
        key, fault = next(iter(left.items()))
        raise WeightsError(
            f"{source}: none of this IP-Adapter's weights fits model {model.spec.name!r}, the "
            f"first is {key}: {fault}. Use one for the same base model, of the kind FaceID-Plus."
        )
    model.load_state_dict(taken, strict=False)
    return [*taken], left, PUBLISHED_EMBEDDER


def _fault(key: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    if key not in expected:
        return "the model has no such weight"
    shape, needed = tuple(weights[key].shape), tuple(expected[key].shape)
    if shape != needed:
        return f"of shape {shape}, expected {needed}"
    return "" if weights[key].is_floating_point() else f"{weights[key].dtype}, expected floats"

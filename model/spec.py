"""The table of model variants. The tiny one has the same type as the large ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Final, get_type_hints

from stages.regions import Mode

__all__ = [
    "PARTS",
    "PUBLISHED_EMBEDDER",
    "SPECS",
    "TOKEN_LIMIT",
    "Embedder",
    "Mode",
    "ModelSpec",
    "spec_from_json",
    "spec_named",
    "spec_to_json",
]

PARTS: Final = ("projector", "facial_encoder", "lora")  # that an adapter may lack
TOKEN_LIMIT: Final = 77  # CLIP's text length, BOS and EOS included
_LARGEST: Final = 65_536  # of a size in a spec; a larger one is a damaged file
_DEEPEST: Final = 64  # of a depth, so that a damaged file doesn't cost minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """The model that computes identity embeddings; those of another one have no meaning to an
    adapter.

    name: of its weights, in the table of weights. sha256: of its weights file, in hexadecimal.
    """

    name: str
    sha256: str

    def __post_init__(self) -> None:
        """Raises ValueError for fields that aren't a name and a digest."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name is {self.name!r}, expected the name of weights")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 is {self.sha256!r}, expected 64 hexadecimal digits")


# of buffalo_l, with which the published weights were trained
PUBLISHED_EMBEDDER: Final = Embedder(
    name="w600k_r50", sha256="4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model variant: the base model that it adapts, and the sizes of the adapter's parts.

    base, image_encoder: hub ids ("" = made locally, see model.tiny; "small" = model.base's).
    resolution: side of training images, in pixels. cross_attention_dim: width C of a text token.
    vision_dim, vision_size: the image encoder's hidden width V and the side S of its input, in
    pixels. hooked: names of the UNet's blocks whose attention the localisation loss reads.
    shortcut: whether the projector adds the resampler's output to the projected identity, in place
    of returning it alone (the reference's `ProjPlusModel`; the published weights differ in this).
    detail_prefix: what legacy mode puts between prompt and facial description. template: the facial
    description at inference; corrected mode uses it only where the record has none. without: the
    PARTS that the adapter doesn't have, in their order. Without projector the ID tokens are zero
    and there is no ID attention; without facial_encoder the regions' nouns keep their text tokens;
    without lora the attention has the base's projections. Raises ValueError for other names, or all
    of the parts.
    """

    name: str
    base: str
    image_encoder: str
    resolution: int
    cross_attention_dim: int
    vision_dim: int
    vision_size: int
    hooked: tuple[str, ...]
    num_tokens: int = 4
    lora_rank: int = 128
    identity_hidden: int = 1024
    projector_depth: int = 4
    facial_dim: int = 1024
    facial_depth: int = 8
    facial_heads: int = 16
    dim_head: int = 64
    shortcut: bool = False
    two_text_encoders: bool = False
    detail_prefix: str = "Detail:"
    template: str = "The person has one face, one nose, two eyes, two ears, and one mouth."
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [part for part in self.without if part not in PARTS]
        if unknown or len(set(self.without)) == len(PARTS):
            raise ValueError(
                f"without is {list(self.without)}, expected some of {', '.join(PARTS)}, not all"
            )
        ordered = tuple(part for part in PARTS if part in self.without)
        object.__setattr__(self, "without", ordered)

    def has(self, part: str) -> bool:
        """Whether the adapter has one of the PARTS."""
        return part not in self.without

    @property
    def projector_heads(self) -> int:
        return self.cross_attention_dim // self.dim_head


SPECS: Final[dict[str, ModelSpec]] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="tiny",
            base="",
            image_encoder="",
            resolution=64,
            cross_attention_dim=128,
            vision_dim=96,
            vision_size=56,
            hooked=("down_blocks.1", "mid_block", "up_blocks.0"),
            lora_rank=16,
            identity_hidden=256,
            projector_depth=1,
            facial_dim=128,
            facial_depth=1,
            facial_heads=4,
            dim_head=32,
            shortcut=True,
        ),
        ModelSpec(
            name="small",
            base="small",
            image_encoder="",
            resolution=64,
            cross_attention_dim=64,
            vision_dim=96,
            vision_size=56,
            hooked=("down_blocks.1", "up_blocks.1"),
            lora_rank=32,
            identity_hidden=256,
            projector_depth=1,
            facial_dim=96,
            facial_depth=1,
            facial_heads=4,
            dim_head=32,
            shortcut=True,
        ),
        ModelSpec(
            name="sd15",
            base="SG161222/Realistic_Vision_V6.0_B1_noVAE",
            image_encoder="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            resolution=512,
            cross_attention_dim=768,
            vision_dim=1280,
            vision_size=224,
            hooked=("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2"),
        ),
        ModelSpec(
            name="sdxl",
            base="stabilityai/stable-diffusion-xl-base-1.0",
            image_encoder="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            resolution=1024,
            cross_attention_dim=2048,
            vision_dim=1280,
            vision_size=224,
            hooked=("down_blocks.2", "mid_block", "up_blocks.1"),
            shortcut=True,
            two_text_encoders=True,
            detail_prefix="; Detail:",
            template="The person has one face, one nose, two eyes, two ears, and a mouth.",
        ),
    )
}


def spec_named(name: str, without: Iterable[str] = ()) -> ModelSpec:
    """Returns the variant with that name, without some of its PARTS. Raises ValueError if there is
    none, or for what `without` can't be.
    """
    if name not in SPECS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(SPECS)}")
    return replace(SPECS[name], without=tuple(without))


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """Returns the spec's fields for JSON. An empty `without` is left out, so that adapters with all
    parts can be read by programs that don't have the field.
    """
    return {name: v for name, v in asdict(spec).items() if name != "without" or v}


def spec_from_json(values: object) -> ModelSpec:
    """Returns the spec of which `values` is `spec_to_json`, read from JSON.

    A field that has a default may be missing. Raises ValueError, which names the first wrong field,
    its value, and what was expected.
    """
    if not isinstance(values, dict):
        raise ValueError(f"spec is {_shown(values)}, expected an object with the model's sizes")
    types = get_type_hints(ModelSpec)
    for field in fields(ModelSpec):
        if field.name not in values and field.default is MISSING:
            raise ValueError(f"spec.{field.name} is missing, expected {_expected(field.name)}")
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"spec.{name} is a field that this version doesn't have")
        valid = type(value) is types[name]
        if types[name] is int:
            valid = valid and 1 <= value <= _largest(name)
        elif types[name] == tuple[str, ...]:
            valid = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not valid:
            raise ValueError(f"spec.{name} is {_shown(value)}, expected {_expected(name)}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ModelSpec(**{**values, **lists})


def _largest(name: str) -> int:
    return _DEEPEST if name.endswith("depth") else _LARGEST


def _expected(name: str) -> str:
    kinds = {
        int: f"a whole number from 1 to {_largest(name):,}",
        str: "a text",
        bool: "true or false",
    }
    return kinds.get(get_type_hints(ModelSpec)[name], "a list of texts")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""The table of model variants. The tiny one has the same type as the large ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stages.regions import Mode

__all__ = ["SPECS", "TOKEN_LIMIT", "Mode", "ModelSpec", "spec_named"]

TOKEN_LIMIT: Final = 77  # CLIP's text length, BOS and EOS included


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model variant: the base model that it adapts, and the sizes of the adapter's parts.

    base, image_encoder: hub ids ("" = made locally, see model.tiny). resolution: side of training
    images, in pixels. cross_attention_dim: width C of a text token. vision_dim, vision_size: the
    image encoder's hidden width V and the side S of its input, in pixels. hooked: names of the
    UNet's blocks whose attention the localisation loss reads. shortcut: whether the projector adds
    the resampler's output to the projected identity, in place of returning it alone (the
    reference's `ProjPlusModel`; the published weights differ in this). detail_prefix: what legacy
    mode puts between prompt and facial description. template: the facial description at inference;
    corrected mode uses it only where the record has none.
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


def spec_named(name: str) -> ModelSpec:
    """Returns the variant with that name. Raises ValueError if there is none."""
    if name not in SPECS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(SPECS)}")
    return SPECS[name]

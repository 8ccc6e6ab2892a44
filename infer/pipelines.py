"""ConsistentID as pipelines of diffusers, each with the mixin before diffusers' own class."""

from __future__ import annotations

import diffusers

from infer.mixin import ConsistentIDMixin

__all__ = [
    "ConsistentIDControlNetPipeline",
    "ConsistentIDImg2ImgPipeline",
    "ConsistentIDInpaintPipeline",
    "ConsistentIDPipeline",
    "ConsistentIDXLControlNetPipeline",
    "ConsistentIDXLImg2ImgPipeline",
    "ConsistentIDXLInpaintPipeline",
    "ConsistentIDXLPipeline",
]


class ConsistentIDPipeline(ConsistentIDMixin, diffusers.StableDiffusionPipeline):
    """Images of a person with Stable Diffusion 1.5."""


class ConsistentIDImg2ImgPipeline(ConsistentIDMixin, diffusers.StableDiffusionImg2ImgPipeline):
    """Another image, changed to show a person."""


class ConsistentIDInpaintPipeline(ConsistentIDMixin, diffusers.StableDiffusionInpaintPipeline):
    """Another image, of which a part is replaced by a person."""


class ConsistentIDControlNetPipeline(
    ConsistentIDMixin, diffusers.StableDiffusionControlNetPipeline
):
    """Images of a person whose composition a ControlNet determines."""


class ConsistentIDXLPipeline(ConsistentIDMixin, diffusers.StableDiffusionXLPipeline):
    """Images of a person with SDXL."""


class ConsistentIDXLImg2ImgPipeline(ConsistentIDMixin, diffusers.StableDiffusionXLImg2ImgPipeline):
    """See `ConsistentIDImg2ImgPipeline`; with SDXL."""


class ConsistentIDXLInpaintPipeline(ConsistentIDMixin, diffusers.StableDiffusionXLInpaintPipeline):
    """See `ConsistentIDInpaintPipeline`; with SDXL."""


class ConsistentIDXLControlNetPipeline(
    ConsistentIDMixin, diffusers.StableDiffusionXLControlNetPipeline
):
    """See `ConsistentIDControlNetPipeline`; with SDXL."""

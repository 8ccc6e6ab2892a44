"""Settings of the generator, each with its only default. Presets are in configs/infer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.common import check as _check


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModelConfig:
    """The model of an adapter. The adapter states its spec and mode; another value than auto makes
    a run with a different adapter fail.
    """

    spec: Literal["auto", "tiny", "small", "sd15", "sdxl"] = "auto"
    mode: Literal["auto", "corrected", "legacy"] = "auto"
    # hub id or folder in diffusers layout; "": the spec's default (tiny, small: base/ beside the
    # adapter's folder)
    base: str = ""
    # hub id or folder; "": image_encoder/ of a local base, else the spec's default
    image_encoder: str = ""
    variant: str = ""  # of the base's files, as in diffusers, for example fp16
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionStrength:
    """The weight of the photograph in each region's token: 0 is the word alone, 1 the word fused
    with the region's image, as in training; more exaggerates.
    """

    face: float = 1.0
    ears: float = 1.0
    eyes: float = 1.0
    nose: float = 1.0
    mouth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("face", "ears", "eyes", "nose", "mouth"):
            value = getattr(self, name)
            _check(value >= 0, f"region_strength.{name}={value}: expected at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class InferConfig:
    """The settings of `python -m infer.cli`."""

    model: AdaptedModelConfig = field(default_factory=AdaptedModelConfig)
    adapter: str = ""  # a checkpoint folder, .safetensors or a published .bin
    # a LoRA in diffusers' or peft's format, beside the adapter: a folder, .safetensors or hub id
    lora: str = ""
    # configuration of the stages that process the photograph; "": the one in the checkpoint
    dataset: str = ""
    photo: str = ""
    identity: str = ""  # an identity.safetensors of an earlier run, in place of a photo
    prompts: tuple[str, ...] = ()
    output: str = "runs/portraits"
    overwrite: bool = False  # replace portraits in `output` that have another configuration
    face: int = 0  # which face of the photograph, from left to right from 1 on; 0: the largest
    # describes the face in place of the photograph's own description; "": that one
    face_caption: str = ""
    # whether the photograph's expression, pose, glasses and the like go into the prompts too
    describe_moment: bool = False
    prompt_template: str = "{prompt}"
    negative_prompt: str = ""
    scheduler: str = "EulerDiscreteScheduler"  # any of diffusers' schedulers, by class name
    # its options that differ from the base model's, NAME=VALUE, for example use_karras_sigmas=true
    # or timestep_spacing=trailing
    scheduler_options: tuple[str, ...] = ()
    num_inference_steps: int = 50
    # steps up to this one use the plain text, later ones the text with fused regions; under 1 a
    # share of the steps, else a number of steps
    start_merge_step: float = 0.6
    guidance_scale: float = 5.0
    # pixels; diffusers' pipelines take multiples of 8, whatever the base's VAE scales by
    height: int = 768
    width: int = 512
    num_images_per_prompt: int = 1
    # portraits generated together; more is faster on a GPU and may change the last bit
    batch_size: int = 1
    id_scale: float = 1.0  # weight of the ID tokens' attention
    region_strength: RegionStrength = field(default_factory=RegionStrength)
    # add the adapter's LoRA, and that of `lora`, to the base's weights: faster steps
    merge_lora: bool = True
    seed: int = 2024
    # auto: float16 on a GPU, float32 on a CPU
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    # which models stay in the CPU's memory until they are needed. model: one model at a time is on
    # the GPU; sequential: one layer at a time, which needs least memory and is slow
    offload: Literal["none", "model", "sequential"] = "none"

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "num_images_per_prompt", "batch_size"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)}: expected at least 1")
        _check(
            self.guidance_scale >= 1, f"guidance_scale={self.guidance_scale}: expected at least 1"
        )
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(value > 0 and value % 8 == 0, f"{name}={value}: expected a multiple of 8")
        merge = self.start_merge_step
        _check(
            0 <= merge <= self.num_inference_steps and (merge < 1 or merge == int(merge)),
            f"start_merge_step={merge:g}: expected a share under 1, or a number of steps up to "
            f"num_inference_steps={self.num_inference_steps}; "
            "a later step would never fuse the facial regions",
        )
        bad = [option for option in self.scheduler_options if not option.partition("=")[2]]
        _check(not bad, f"scheduler_options: {bad}: expected NAME=VALUE")
        _check(self.face >= 0, f"face={self.face}: expected 1 for the leftmost face, 0: largest")
        _check(self.id_scale >= 0, f"id_scale={self.id_scale}: expected at least 0")
        _check(
            "{prompt}" in self.prompt_template,
            f"prompt_template={self.prompt_template!r}: expected a text with {{prompt}} in it",
        )
        _check(
            not (self.photo and self.identity),
            "photo and identity are both given: give one of them",
        )

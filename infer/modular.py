"""ConsistentID for Modular Diffusers (SDXL): blocks, and the adapter as a component.

The blocks are diffusers' own, of which the text encoder is replaced, and each denoising loop swaps
the embeddings when the second phase begins. `infer.hub` writes a folder that diffusers loads them
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import ModularPipelineBlocks, StableDiffusionXLAutoBlocks
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLInputStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLControlNetLoopDenoiser,
    StableDiffusionXLLoopDenoiser,
)
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLTextEncoderStep,
)
from transformers import CLIPVisionModelWithProjection

from configs.errors import ConfigError
from configs.schema import DatasetConfig
from infer.adapter import Adapter, install_adapter
from infer.components import check_precision
from infer.identity import Identity
from infer.phases import DEFAULT_MERGE, FirstPhase, failed_images, merge_step, steps_of
from infer.photo import Photo
from infer.request import FaceText, encode_people, guidance_of, people_of
from infer.schedulers import unclipped

_MODEL: Final = "stable-diffusion-xl"  # diffusers' name of the kind of pipeline


class ConsistentIDTextStep(StableDiffusionXLTextEncoderStep):
    """Encodes prompts and a person, for both phases. Without adapter and person it is diffusers'
    own step.

    The inputs are those of `ConsistentIDMixin.__call__`. `identity` is set to the list of people,
    so a later call can be given them in place of the photographs.
    """

    @property
    def expected_components(self) -> list[Any]:
        return [
            *super().expected_components,
            ComponentSpec("consistentid", Adapter),
            ComponentSpec("image_encoder", CLIPVisionModelWithProjection),
        ]

    @property
    def inputs(self) -> list[Any]:
        return [
            *super().inputs,
            InputParam("input_id_images", description="photographs of one person"),
            InputParam("identity", description="a person, or one for each prompt"),
            InputParam(
                "start_merge_step",
                default=DEFAULT_MERGE,
                description="steps up to it see the text without fused regions: an int is a number "
                "of steps, a float a share of them",
            ),
            InputParam("face_caption", description="in place of the photograph's description"),
            InputParam("describe_moment", default=False, description="include the expression"),
            InputParam("num_inference_steps", default=50),
            InputParam("timesteps"),
            InputParam("sigmas"),
        ]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [
            *super().intermediate_outputs,
            OutputParam("late_prompt_embeds", type_hint=torch.Tensor),
            OutputParam("late_pooled_prompt_embeds", type_hint=torch.Tensor),
            OutputParam("first_phase", type_hint=FirstPhase),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        person = (components.consistentid, block.input_id_images, block.identity)
        if all(each is None for each in person):
            for output in self.intermediate_outputs:
                state.set(output.name, None, output.kwargs_type)
            own: tuple[Any, Any] = StableDiffusionXLTextEncoderStep()(components, state)
            return own
        adapter = adapter_of(components)
        people = people_of(components, adapter, block.input_id_images, block.identity)
        if (scheduler := unclipped(components.scheduler)) is not components.scheduler:
            components.register_components(scheduler=scheduler)
        check_precision(components.unet, components._execution_device)
        call = block.as_dict()
        face = FaceText(block.face_caption, block.describe_moment)
        guidance = guidance_of(components, adapter, people, call, face)
        steps = steps_of(call)
        block.first_phase = FirstPhase(
            merge=merge_step(block.start_merge_step, steps),
            steps=steps,
            legacy=adapter.model.mode == "legacy",
        )
        block.identity = people
        block.prompt_embeds, block.late_prompt_embeds = guidance.early, guidance.late
        block.pooled_prompt_embeds = guidance.pooled_early
        block.late_pooled_prompt_embeds = guidance.pooled_late
        block.negative_prompt_embeds = guidance.negative
        block.negative_pooled_prompt_embeds = guidance.pooled_negative
        self.set_block_state(state, block)
        return components, state


class ConsistentIDInputStep(StableDiffusionXLInputStep):
    """Repeats the embeddings for the images of each prompt.

    diffusers' own step repeats pooled ones in another order than the rest, so with several prompts
    and several images of each, a prompt's images would get another prompt's.
    """

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        components, state = super().__call__(components, state)
        for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
            if (pooled := getattr(block, name)) is not None:
                rows = pooled.repeat_interleave(block.num_images_per_prompt, 0)
                state.set(name, rows, "denoiser_input_fields")
        return components, state


class ConsistentIDPhaseStep(ModularPipelineBlocks):
    """Swaps the embeddings for those of the second phase; the first part of a denoising loop."""

    model_name = _MODEL

    @property
    def inputs(self) -> list[Any]:
        return [
            InputParam("late_prompt_embeds", type_hint=torch.Tensor),
            InputParam("late_pooled_prompt_embeds", type_hint=torch.Tensor),
            InputParam("first_phase", type_hint=FirstPhase),
            InputParam("timesteps", required=True, type_hint=torch.Tensor),
            InputParam(kwargs_type="denoiser_input_fields"),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, block: Any, i: int, t: Any) -> tuple[Any, Any]:
        first: FirstPhase | None = block.first_phase
        if first is None:
            return components, block
        done = i + _skipped(components.scheduler, block.timesteps)
        if done >= first.evaluations(components.scheduler):
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                late, current = getattr(block, f"late_{name}"), getattr(block, name)
                copies = len(current) // len(late)
                setattr(block, name, late.repeat_interleave(copies, 0).to(current))
        return components, block


def _skipped(scheduler: Any, timesteps: torch.Tensor) -> int:
    """Returns how many evaluations at the beginning of the schedule are left out, as in img2img."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    return int((scheduler.timesteps == timesteps[0]).nonzero()[0])


@contextmanager
def _evaluations_as_steps(block: Any) -> Iterator[None]:
    """Lets diffusers' denoisers count evaluations of the UNet as steps. They compare the number of
    the evaluation with that of the steps, and switch the guidance off where it is reached: with
    Heun, which has two evaluations in a step, that is in the middle.
    """
    steps = block.num_inference_steps
    block.num_inference_steps = len(block.timesteps)
    try:
        yield
    finally:
        block.num_inference_steps = steps


class ConsistentIDDenoiser(StableDiffusionXLLoopDenoiser):
    """Runs the UNet once in a step on all branches of the guidance, as diffusers' pipelines do.

    Its own modular denoiser runs it once for each branch, whose results differ in the last bits. It
    is used for guiders that change the UNet between branches, such as perturbed attention.
    """

    @torch.no_grad()
    def __call__(self, components: Any, block: Any, i: int, t: Any) -> tuple[Any, Any]:
        guider = components.guider
        if type(guider).prepare_models is not BaseGuidance.prepare_models:
            with _evaluations_as_steps(block):
                return super().__call__(components, block, i=i, t=t)  # type: ignore[no-any-return]
        guider.set_state(step=i, num_inference_steps=len(block.timesteps), timestep=t)
        branches = guider.prepare_inputs(
            {
                "prompt_embeds": (block.prompt_embeds, block.negative_prompt_embeds),
                "time_ids": (block.add_time_ids, block.negative_add_time_ids),
                "text_embeds": (block.pooled_prompt_embeds, block.negative_pooled_prompt_embeds),
            }
        )
        unconditional_first = branches[::-1]

        def joined(name: str) -> torch.Tensor:
            return torch.cat([getattr(branch, name) for branch in unconditional_first])

        noise = components.unet(
            torch.cat([block.scaled_latents] * len(branches)),
            t,
            encoder_hidden_states=joined("prompt_embeds"),
            timestep_cond=block.timestep_cond,
            cross_attention_kwargs=block.cross_attention_kwargs,
            added_cond_kwargs={name: joined(name) for name in ("text_embeds", "time_ids")},
            return_dict=False,
        )[0]
        for branch, part in zip(unconditional_first, noise.chunk(len(branches)), strict=True):
            branch.noise_pred = part
        block.noise_pred = guider(branches)[0]
        return components, block


class ConsistentIDControlNetDenoiser(StableDiffusionXLControlNetLoopDenoiser):
    """Hides the ID tokens from a ControlNet, see `Adapter.hidden_from`."""

    def __call__(self, components: Any, block: Any, i: int, t: Any) -> tuple[Any, Any]:
        hidden = (
            nullcontext()
            if block.first_phase is None
            else adapter_of(components).hidden_from(components.controlnet)
        )
        with hidden, _evaluations_as_steps(block):
            return super().__call__(components, block, i=i, t=t)  # type: ignore[no-any-return]


class ConsistentIDCheckStep(ModularPipelineBlocks):
    """Checks the last latents. failed_images: numbers of the images whose latents aren't finite."""

    model_name = _MODEL

    @property
    def inputs(self) -> list[Any]:
        return [InputParam("latents", required=True, type_hint=torch.Tensor)]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("failed_images", type_hint=tuple)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        block.failed_images = failed_images(block.latents)
        self.set_block_state(state, block)
        return components, state


_DENOISERS: Final = {
    StableDiffusionXLLoopDenoiser: ConsistentIDDenoiser,
    StableDiffusionXLControlNetLoopDenoiser: ConsistentIDControlNetDenoiser,
}


class ConsistentIDXLBlocks(StableDiffusionXLAutoBlocks):
    """Images of a person with SDXL: from text, from an image, in-painting, with a ControlNet."""

    _requirements: Final = {"consistentid-pipeline": ">=0.1"}
    _workflow_map: Final = {
        name: inputs
        for name, inputs in StableDiffusionXLAutoBlocks._workflow_map.items()
        if "ip_adapter" not in name  # which would replace the adapter's attention processors
    }

    def __init__(self) -> None:
        super().__init__()
        del self.sub_blocks["ip_adapter"]
        self.sub_blocks["text_encoder"] = ConsistentIDTextStep()
        self.sub_blocks.insert("check", ConsistentIDCheckStep(), len(self.sub_blocks) - 1)
        denoise = self.sub_blocks["denoise"]
        denoise.sub_blocks["input"] = ConsistentIDInputStep()
        _add_phases(denoise)

    @property
    def description(self) -> str:
        return "Images of a person with Stable Diffusion XL and a ConsistentID adapter."


def _add_phases(block: Any) -> None:
    """Adds the phases to all denoising loops in a block."""
    if isinstance(block, LoopSequentialPipelineBlocks):
        block.sub_blocks["denoiser"] = _DENOISERS[type(block.sub_blocks["denoiser"])]()
        block.sub_blocks.insert("phases", ConsistentIDPhaseStep(), 0)
        return
    for part in block.sub_blocks.values():
        _add_phases(part)


def adapter_of(pipe: Any) -> Adapter:
    """Returns a modular pipeline's adapter. Raises ConfigError if there is none in its UNet."""
    adapter: Adapter | None = pipe.consistentid
    if adapter is None or not adapter.is_in(pipe.unet):
        raise ConfigError(
            "no ConsistentID adapter is loaded in this pipeline's UNet; call "
            "infer.modular.load_consistentid_adapter(pipe, PATH) first"
        )
    return adapter


def load_consistentid_adapter(
    pipe: Any,
    source: str | Path,
    subfolder: str = "",
    weight_name: str = "",
    *,
    dataset: str | Path | DatasetConfig | None = None,
    image_encoder: str = "",
    **hub: Any,
) -> Adapter:
    """Puts an adapter into the UNet of a modular pipeline, whose components are loaded.

    It becomes the component `consistentid`, and is returned; `set_scale` and `remove` are methods
    of it. The arguments are those of `ConsistentIDMixin.load_consistentid_adapter`.
    """
    if pipe.unet is None:
        raise ConfigError("the pipeline has no UNet yet; call load_components first")
    adapter = install_adapter(
        pipe.unet,
        source,
        subfolder,
        weight_name,
        dataset=dataset,
        image_encoder=image_encoder,
        **hub,
    )
    pipe.update_components(consistentid=adapter)
    return adapter


def unload_consistentid_adapter(pipe: Any) -> None:
    """Removes the adapter; the UNet is bit for bit as it was before."""
    if pipe.consistentid is not None:
        pipe.consistentid.remove()
        pipe.register_components(consistentid=None)


def encode_identity(
    pipe: Any, images: Photo | list[Photo], *, name: str = "", face: int = 0
) -> Identity:
    """Does what `ConsistentIDMixin.encode_identity` does, with a modular pipeline."""
    return encode_people(pipe, adapter_of(pipe), images, name, face)

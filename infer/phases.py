"""The two phases of denoising: where the second begins, and a callback of diffusers' pipelines."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from configs.errors import ConfigError, PipelineError
from infer.conditioning import Guidance
from infer.schedulers import merge_position

logger = logging.getLogger("consistentid")

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
DEFAULT_MERGE: Final = 0.6  # of the steps; 30 of 50 in the reference's demos


def merge_step(start_merge_step: float, steps: int) -> int:
    """Returns the number of steps in the first phase, of `steps`.

    start_merge_step: an int is a number of steps, a float a share of them. Raises ConfigError
    outside of 0 to `steps`, or 0.0 to 1.0.
    """
    share = isinstance(start_merge_step, float)
    number = isinstance(start_merge_step, int | float) and not isinstance(start_merge_step, bool)
    if not number or not 0 <= start_merge_step <= (1 if share else steps):
        raise ConfigError(
            f"start_merge_step={start_merge_step!r}: expected a number of steps, 0 to {steps} "
            "(num_inference_steps), or a share of them, 0.0 to 1.0; later, the facial regions "
            "would never be fused"
        )
    return round(start_merge_step * steps) if share else int(start_merge_step)


def steps_of(call: Mapping[str, Any]) -> int:
    """Returns the steps of the whole schedule that a call's arguments ask for."""
    own = [call[name] for name in ("timesteps", "sigmas") if call.get(name) is not None]
    steps = len(own[0]) if own else call["num_inference_steps"]
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"num_inference_steps={steps!r}: expected a number of steps, at least 1")
    return steps


def schedule(pipe: Any, call: Mapping[str, Any], steps: int) -> tuple[Any, int]:
    """Returns a copy of a pipeline's scheduler whose timesteps are those of a call, and how many of
    them the pipeline leaves out at the beginning, as img2img does for `strength` and
    `denoising_start`.

    call: the arguments of diffusers' call and their defaults. The pipeline's own `get_timesteps`
    decides, because the timesteps of a share of the schedule depend on the scheduler.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    custom = (call.get("timesteps"), call.get("sigmas"))
    _, steps = retrieve_timesteps(scheduler, steps, "cpu", *custom)
    rest_of = getattr(type(pipe), "get_timesteps", None)
    if rest_of is None:
        return scheduler, 0
    begin = call.get("denoising_start")
    share = isinstance(begin, float) and 0 < begin < 1  # what diffusers takes for one
    options = {"denoising_start": begin} if share else {}
    rest, _ = rest_of(
        SimpleNamespace(scheduler=scheduler), steps, call["strength"], "cpu", **options
    )
    return scheduler, len(scheduler.timesteps) - len(rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPhase:
    """The first phase: `merge` of the schedule's `steps`. legacy: it has one evaluation of the UNet
    more, since the reference compares with `<=`.
    """

    merge: int
    steps: int
    legacy: bool

    def evaluations(self, scheduler: Any) -> int:
        """Returns how many of the UNet's evaluations it has, with a scheduler whose timesteps are
        set. Those at the beginning that img2img leaves out are counted too.
        """
        every = len(scheduler.timesteps)
        return merge_position(self.merge, self.steps, every) + self.legacy


def failed_images(latents: Tensor) -> tuple[int, ...]:
    """Returns the numbers of images whose last latents aren't finite, and warns of them.

    Raises PipelineError if those of all images aren't.
    """
    finite = latents.flatten(1).isfinite().all(1).tolist()
    failed = tuple(row for row, good in enumerate(finite) if not good)
    if not any(finite):
        raise PipelineError(
            f"the latents of all {len(finite)} images are not finite, so there is nothing to "
            "decode. Use dtype=float32 or bfloat16, a lower guidance_scale or another "
            "scheduler; if that doesn't help, the adapter's weights are damaged."
        )
    if failed:
        logger.warning(
            "the latents of images %s are not finite, so these images are black; the others "
            "are not affected. Use dtype=float32 or a lower guidance_scale",
            ", ".join(map(str, failed)),
        )
    return failed


class Phases:
    """Swaps the embeddings for those of the second phase, and checks the last latents.

    guidance: rows of the prompts. copies: images of each prompt. evaluations: of the UNet in the
    first phase, without those that the pipeline leaves out. callback, inputs: the caller's own
    callback, which is called before the swap, and the tensors that it wants.
    """

    def __init__(
        self,
        guidance: Guidance,
        *,
        evaluations: int,
        copies: int,
        callback: StepCallback | None = None,
        inputs: Sequence[str] = ("latents",),
    ) -> None:
        self._late = {"prompt_embeds": guidance.late.repeat_interleave(copies, 0)}
        if guidance.pooled_late is not None:
            self._late["add_text_embeds"] = guidance.pooled_late.repeat_interleave(copies, 0)
        self._evaluations = evaluations
        self._callback, self._inputs = callback, list(inputs)
        self.failed: tuple[int, ...] = ()

    @property
    def first_is_empty(self) -> bool:
        """Whether the first phase is over before the first step."""
        return self._evaluations <= 0

    def tensors(self, available: Sequence[str]) -> list[str]:
        """Returns what the callback needs of the pipeline's `_callback_tensor_inputs`."""
        return list(dict.fromkeys(("latents", *self._inputs, *(set(self._late) & set(available)))))

    def __call__(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if self._callback is not None:
            own = {name: tensors[name] for name in self._inputs}
            tensors |= self._callback(pipe, step, timestep, own) or {}
        if step + 1 == self._evaluations:
            for name, late in self._late.items():
                if name in tensors:
                    tensors[name] = _swapped(tensors[name], late)
        if step == pipe.num_timesteps - 1:
            self.failed = failed_images(tensors["latents"])
        return tensors


def _swapped(current: Tensor, late: Tensor) -> Tensor:
    """Returns `late` with the negative rows of `current` before it, if that has any."""
    late = late.to(current)
    if len(current) <= len(late):  # without guidance, or where a callback switched it off
        return late[-len(current) :]
    return torch.cat((current[: -len(late)], late))

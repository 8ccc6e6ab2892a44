"""The two phases of denoising: where the second begins, and a callback of diffusers' pipelines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
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
    if not 0 <= start_merge_step <= (1 if share else steps):
        raise ConfigError(
            f"start_merge_step={start_merge_step}: expected a number of steps, 0 to {steps} "
            "(num_inference_steps), or a share of them, 0.0 to 1.0; later, the facial regions "
            "would never be fused"
        )
    return round(start_merge_step * steps) if share else int(start_merge_step)


def steps_of(call: Mapping[str, Any]) -> int:
    """Returns the steps of the whole schedule that a call's arguments ask for."""
    own = [call[name] for name in ("timesteps", "sigmas") if call.get(name) is not None]
    return len(own[0]) if own else int(call["num_inference_steps"])


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

    guidance: rows of the prompts. copies: images of each prompt. skipped: steps at the beginning of
    the schedule that the pipeline leaves out, as img2img does. callback, inputs: the caller's own
    callback, which is called before the swap, and the tensors that it wants.
    """

    def __init__(
        self,
        guidance: Guidance,
        *,
        first: FirstPhase,
        copies: int,
        skipped: int,
        callback: StepCallback | None = None,
        inputs: Sequence[str] = ("latents",),
    ) -> None:
        self._late = {"prompt_embeds": guidance.late.repeat_interleave(copies, 0)}
        if guidance.pooled_late is not None:
            self._late["add_text_embeds"] = guidance.pooled_late.repeat_interleave(copies, 0)
        self._first, self._skipped = first, skipped
        self._callback, self._inputs = callback, list(inputs)
        self.failed: tuple[int, ...] = ()

    @property
    def first_is_empty(self) -> bool:
        """Whether the first phase is over before the first step."""
        return self._first.merge + self._first.legacy <= self._skipped

    def tensors(self, available: Sequence[str]) -> list[str]:
        """Returns what the callback needs of the pipeline's `_callback_tensor_inputs`."""
        return list(dict.fromkeys(("latents", *self._inputs, *(set(self._late) & set(available)))))

    def __call__(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if self._callback is not None:
            own = {name: tensors[name] for name in self._inputs}
            tensors |= self._callback(pipe, step, timestep, own) or {}
        scheduler = pipe.scheduler
        if step + 1 + self._skipped * scheduler.order == self._first.evaluations(scheduler):
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

"""The two phases of denoising, as a callback of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError, PipelineError
from infer.conditioning import Guidance
from infer.schedulers import merge_position

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


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


class Phases:
    """Swaps the embeddings for those of the second phase, and checks the last latents.

    guidance: rows of the prompts. copies: images of each prompt. merge: steps in the first phase.
    steps: of the whole schedule. skipped: those at its beginning that the pipeline leaves out, as
    img2img does. legacy: the first phase has one evaluation of the UNet more, since the reference
    compares with `<=`. callback, inputs: the caller's own callback, which is called before the
    swap, and the tensors that it wants.
    """

    def __init__(
        self,
        guidance: Guidance,
        *,
        copies: int,
        merge: int,
        steps: int,
        skipped: int,
        legacy: bool,
        callback: StepCallback | None = None,
        inputs: Sequence[str] = ("latents",),
    ) -> None:
        self._late = {"prompt_embeds": guidance.late.repeat_interleave(copies, 0)}
        if guidance.pooled_late is not None:
            self._late["add_text_embeds"] = guidance.pooled_late.repeat_interleave(copies, 0)
        self._merge, self._steps, self._skipped, self._legacy = merge, steps, skipped, legacy
        self._callback, self._inputs = callback, list(inputs)
        self.failed: tuple[int, ...] = ()

    @property
    def first_is_empty(self) -> bool:
        """Whether the first phase is over before the first step."""
        return self._merge + self._legacy <= self._skipped

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
        position = merge_position(self._merge, self._steps, len(scheduler.timesteps)) + self._legacy
        if step + 1 + self._skipped * scheduler.order == position:
            for name, late in self._late.items():
                if name in tensors:
                    tensors[name] = _swapped(tensors[name], late)
        if step == pipe.num_timesteps - 1:
            self._check(tensors["latents"])
        return tensors

    def _check(self, latents: Tensor) -> None:
        finite = latents.flatten(1).isfinite().all(1).tolist()
        self.failed = tuple(row for row, good in enumerate(finite) if not good)
        if not any(finite):
            raise PipelineError(
                f"the latents of all {len(finite)} images are not finite, so there is nothing to "
                "decode. Use dtype=float32 or bfloat16, a lower guidance_scale or another "
                "scheduler; if that doesn't help, the adapter's weights are damaged."
            )


def _swapped(current: Tensor, late: Tensor) -> Tensor:
    """Returns `late` with the negative rows of `current` before it, if that has any."""
    late = late.to(current)
    if len(current) <= len(late):  # without guidance, or where a callback switched it off
        return late[-len(current) :]
    return torch.cat((current[: -len(late)], late))

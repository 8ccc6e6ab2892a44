"""Portraits of a configuration, in batches over prompts and seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from configs.errors import ConfigError, PipelineError
from configs.portraits import InferConfig
from infer.identity import Identity
from infer.mixin import ConsistentIDMixin
from infer.portrait import Portrait, portrait_seed
from infer.schedulers import make_scheduler
from model.prompt import without_marks

logger = logging.getLogger("consistentid")

StepCallback = Callable[[int], None]  # called with the number of portraits in the batch
Job = tuple[int, int]  # number of the prompt, number of the image


def generate(
    pipe: ConsistentIDMixin,
    person: Identity,
    settings: InferConfig,
    on_step: StepCallback | None = None,
) -> Iterator[Portrait]:
    """Yields portraits in the order of `settings.prompts`, `num_images_per_prompt` for each.

    They are made while the caller iterates. Portrait i of prompt j depends on (seed, i, j), and not
    on how many are made; its batch may change the last bits. on_step: called after each evaluation
    of the UNet. A portrait that can't be made is logged and left out. Raises ConfigError for
    settings or a person that don't fit the pipeline, PipelineError if the memory isn't enough for
    one portrait.
    """
    jobs = [
        (prompt, image)
        for prompt in range(len(settings.prompts))
        for image in range(settings.num_images_per_prompt)
    ]
    size = settings.batch_size
    with configured(pipe, settings):
        for start in range(0, len(jobs), size):
            yield from _batch(pipe, person, settings, jobs[start : start + size], on_step)


def evaluations(pipe: ConsistentIDMixin, settings: InferConfig) -> int:
    """Returns how often the UNet is evaluated for one portrait.

    Some schedulers evaluate it more than once in a step.
    """
    scheduler = _scheduler(pipe, settings)
    scheduler.set_timesteps(settings.num_inference_steps)
    return len(scheduler.timesteps)


def _scheduler(pipe: ConsistentIDMixin, settings: InferConfig) -> Any:
    options = dict(option.split("=", 1) for option in settings.scheduler_options)
    values = {name: yaml.safe_load(value) for name, value in options.items()}
    return make_scheduler(settings.scheduler, pipe.scheduler, values)


@contextmanager
def configured(pipe: ConsistentIDMixin, settings: InferConfig) -> Iterator[None]:
    """Gives the pipeline the scheduler and the scales of `settings`; its own scheduler comes back
    afterwards. Raises ConfigError for sizes that don't fit.
    """
    factor = pipe.vae_scale_factor
    if settings.height % factor or settings.width % factor:
        raise ConfigError(
            f"width={settings.width}, height={settings.height}: this base model needs multiples of "
            f"{factor}"
        )
    own = pipe.scheduler
    pipe.scheduler = _scheduler(pipe, settings)
    try:
        if pipe.consistentid is not None:
            strength = asdict(settings.region_strength)
            pipe.set_consistentid_scale({"identity": settings.id_scale, **strength})
        yield
    finally:
        pipe.scheduler = own


def _batch(
    pipe: ConsistentIDMixin,
    person: Identity,
    settings: InferConfig,
    jobs: Sequence[Job],
    on_step: StepCallback | None,
) -> Iterator[Portrait]:
    """Makes portraits together; if the memory isn't enough, in halves."""
    prompts = [settings.prompts[prompt] for prompt, _ in jobs]
    seeds = [portrait_seed(settings.seed, *job) for job in jobs]
    try:
        images = draw(pipe, person, settings, prompts, seeds, on_step)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_memory_error(error):
            raise
        if len(jobs) == 1:
            raise PipelineError(
                f"the memory isn't enough for one portrait of {settings.width}×{settings.height} "
                "pixels. Make it smaller (width=, height=), or set offload=model or "
                "offload=sequential, or dtype=bfloat16."
            ) from error
        middle = len(jobs) // 2
        logger.warning(
            "the memory isn't enough for %d portraits together; making %d", len(jobs), middle
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for part in (jobs[:middle], jobs[middle:]):
            yield from _batch(pipe, person, settings, part, on_step)
        return
    for row, (job, image) in enumerate(zip(jobs, images, strict=True)):
        if row in pipe.failed_images:
            logger.warning("portrait %d of prompt %d was not made: see above", *reversed(job))
            continue
        yield Portrait(
            pixels=np.asarray(image.convert("RGB")),
            prompt=settings.prompts[job[0]],
            prompt_index=job[0],
            image_index=job[1],
            settings=_metadata(pipe, person, settings, job),
        )


def draw(
    pipe: ConsistentIDMixin,
    person: Identity | None,
    settings: InferConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
    on_step: StepCallback | None = None,
) -> list[Image.Image]:
    """Makes an image for each prompt and its seed, together, on a pipeline that is `configured`.

    person: None for the base model's own images, on a pipeline without an adapter. The numbers of
    those that can't be made are in `pipe.failed_images`.
    """
    merge = settings.start_merge_step

    def report(_pipe: Any, _step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        if on_step is not None:
            on_step(len(prompts))
        return {}

    images: list[Image.Image] = pipe(
        prompt=[apply_template(prompt, settings) for prompt in prompts],
        negative_prompt=[settings.negative_prompt] * len(prompts),
        identity=person,
        face_caption=settings.face_caption or None,
        describe_moment=settings.describe_moment,
        num_inference_steps=settings.num_inference_steps,
        start_merge_step=merge if merge < 1 else int(merge),
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        callback_on_step_end=report,
    ).images
    return images


def apply_template(prompt: str, settings: InferConfig) -> str:
    """Puts the prompt into `prompt_template`. Braces in the prompt have no special meaning."""
    return settings.prompt_template.replace("{prompt}", prompt)


def _is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory is missing; on a CPU torch raises a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)


def _metadata(
    pipe: ConsistentIDMixin, person: Identity, settings: InferConfig, job: Job
) -> dict[str, str]:
    """Returns a portrait's settings for its PNG; `text` is what the text encoder reads."""
    adapter = pipe.adapter
    prompt = settings.prompts[job[0]]
    text = apply_template(prompt, settings)
    tokens, _ = pipe.prompt_text(
        person, text, settings.face_caption or None, settings.describe_moment
    )
    return {
        "prompt": prompt,
        "negative_prompt": settings.negative_prompt,
        "text": without_marks(tokens.text),
        "regions": ", ".join(tokens.regions),
        "seed": str(settings.seed),
        "prompt_index": str(job[0]),
        "image_index": str(job[1]),
        "steps": str(settings.num_inference_steps),
        "start_merge_step": f"{settings.start_merge_step:g}",
        "guidance_scale": str(settings.guidance_scale),
        "id_scale": str(settings.id_scale),
        "scheduler": settings.scheduler,
        "scheduler_options": ", ".join(settings.scheduler_options),
        "size": f"{settings.width}x{settings.height}",
        "dtype": str(pipe.unet.conv_in.weight.dtype).removeprefix("torch."),
        "mode": adapter.model.mode,
        "spec": adapter.model.spec.name,
        "adapter_sha256": adapter.digest,
        "lora": settings.lora,
        "photo": person.record.source,
        "photo_sha256": person.record.sha256,
        "Software": "ConsistentID",
    }

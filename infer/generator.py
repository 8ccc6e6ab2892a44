"""ConsistentIDGenerator: makes portraits from an identity and prompts.

It uses the same stages and conditions as training. Image states of a person are computed once
(`Identity`); those of zero pixels and the negative text are cached; so a prompt takes one pass of
the text encoder. Portrait i of prompt j depends on (seed, i, j), and not on how many are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.portraits import InferConfig
from configs.schema import DatasetConfig
from infer.identity import Identity, read_photo, run_stages, set_up_stages
from infer.portrait import Portrait, portrait_seed
from infer.sampling import Guidance, TextStates, decode, denoise, guidance_states, initial_latents
from infer.schedulers import make_scheduler, merge_position
from model.attention import merge_lora
from model.conditions import Conditions, build_conditions, collate
from model.consistentid import BaseModels, ConsistentID, Features, encode_images, encode_text
from model.prompt import tokenize_marked, without_marks
from stages.base import Stage
from stages.record import Record
from stages.regions import MAX_REGIONS, word_of

_SECOND_PAD = 0  # SDXL's second tokenizer pads with "!"
_CACHED_TEXTS = 32  # negative prompts

StepCallback = Callable[[int], None]  # called with the number of portraits in the batch


class ConsistentIDGenerator:
    """Makes portraits of a person. `infer.load.load_generator` builds one from a configuration.

    base: the frozen models, with `model`'s processors in its UNet, all on one device. config: the
    default settings. dataset: the configuration of the stages that read photographs, which should
    be that of the adapter's training data. digest: sha256 of the adapter, for the portraits'
    metadata.
    """

    def __init__(
        self,
        base: BaseModels,
        model: ConsistentID,
        config: InferConfig | None = None,
        dataset: DatasetConfig | None = None,
        *,
        digest: str = "",
    ) -> None:
        self.base, self.model, self.digest = base, model.eval(), digest
        self.config = config or InferConfig()
        self.dataset = dataset or DatasetConfig()
        if self.config.merge_lora:
            merge_lora(base.unet)
        side = model.spec.vision_size
        self._zero_hidden = encode_images(
            base.image_encoder, torch.zeros(1, 3, side, side, device=self.device)
        )
        self._texts: dict[str, TextStates] = {}
        self._stages: list[Stage] | None = None

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.base.unet.device)

    @property
    def stages(self) -> list[Stage]:
        """The data set's stages.

        Their weights are loaded at the first use, because a saved identity doesn't need them.
        """
        if self._stages is None:
            self._stages = set_up_stages(self.dataset)
        return self._stages

    def identity(self, photo: str | Path | Record, name: str = "") -> Identity:
        """Reads the identity of the person in a photograph.

        photo: a path, or a record with the photograph's bytes (`infer.identity.photo_record`).
        name: of the photograph in error messages. Raises FaceError if it shows no usable face,
        SourceError if it isn't a readable image.
        """
        record = photo if isinstance(photo, Record) else read_photo(photo)
        label = name or (record.source if isinstance(photo, Record) else str(photo))
        return self.encode(run_stages(record, self.stages, label))

    def encode(self, record: Record) -> Identity:
        """Makes the identity of a record that has been through the stages, e.g. of a shard."""
        conditions = self._conditions(record, "")  # an empty prompt leaves room for all regions
        count = len(conditions.regions)
        pixels = torch.cat((conditions.clip_pixels[None], conditions.region_pixels[:count]))
        hidden = encode_images(self.base.image_encoder, pixels.to(self.device)).cpu()
        return Identity(
            record=record,
            mode=self.model.mode,
            regions=conditions.regions,
            clip_hidden=hidden[0].clone(),
            region_hidden=hidden[1:].clone(),
            encoder_fingerprint=self._zero_hidden[0, 0].cpu().clone(),
        )

    def conditions(
        self, identity: Identity, prompt: str, settings: InferConfig | None = None
    ) -> Conditions:
        """Returns the model's inputs for an identity and a prompt, put into `prompt_template`."""
        return self._conditions(identity.record, apply_template(prompt, settings or self.config))

    def generate(
        self,
        identity: Identity,
        prompts: str | Sequence[str],
        settings: InferConfig | None = None,
        on_step: StepCallback | None = None,
    ) -> Iterator[Portrait]:
        """Yields portraits in the order of the prompts, `num_images_per_prompt` for each.

        They are made while the caller iterates. settings: override the generator's, e.g.
        `dataclasses.replace(generator.config, seed=1)`; the settings of the model, the adapter and
        the data set have no effect here. on_step: called after each evaluation of the UNet with
        the number of portraits in its batch. Raises ConfigError for an unknown scheduler, or for
        an identity that was made with another image encoder or in another mode.
        """
        settings = settings or self.config
        self._check(identity)
        scheduler = make_scheduler(settings.scheduler, self.base.scheduler)
        self.model.set_scale(settings.id_scale)
        for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
            conditions = self.conditions(identity, prompt, settings)
            features = self._features(identity, conditions)
            full_prompt = apply_template(prompt, settings)
            guidance = self._guidance(features, conditions, full_prompt, settings)
            metadata = self._metadata(identity, conditions, prompt, settings)
            for start in range(0, settings.num_images_per_prompt, settings.batch_size):
                numbers = range(
                    start, min(start + settings.batch_size, settings.num_images_per_prompt)
                )
                images = self._sample(guidance, scheduler, settings, index, numbers, on_step)
                for number, pixels in zip(numbers, images, strict=True):
                    indices = {"prompt_index": str(index), "image_index": str(number)}
                    yield Portrait(
                        pixels=pixels,
                        prompt=prompt,
                        prompt_index=index,
                        image_index=number,
                        settings=metadata | indices,
                    )

    def evaluations(self, settings: InferConfig | None = None) -> int:
        """Returns how often the UNet is evaluated for one portrait."""
        settings = settings or self.config
        scheduler = make_scheduler(settings.scheduler, self.base.scheduler)
        scheduler.set_timesteps(settings.num_inference_steps)
        return len(scheduler.timesteps)

    def _conditions(self, record: Record, prompt: str) -> Conditions:
        spec = self.model.spec
        return build_conditions(
            record,
            self.base.tokenizer,
            spec,
            self.model.mode,
            prompt=prompt,
            resolution=spec.resolution,
            tokenizer_2=self.base.tokenizer_2,
        )

    def _check(self, identity: Identity) -> None:
        """Raises ConfigError for an identity of another mode or image encoder."""
        if identity.mode != self.model.mode:
            raise ConfigError(
                f"the identity of {identity.record.source} was made in {identity.mode} mode, the "
                f"adapter is of {self.model.mode} mode; make it again from the photograph"
            )
        own = self._zero_hidden[0, 0].float().cpu()
        other = identity.encoder_fingerprint.float()
        # The tolerance allows for half precision. Other image encoders differ by far more.
        if other.shape != own.shape or not torch.allclose(other, own, rtol=0.05, atol=0.05):
            raise ConfigError(
                f"the identity of {identity.record.source} was made with another image encoder; "
                "make it again from the photograph"
            )

    def _features(self, identity: Identity, conditions: Conditions) -> Features:
        """Returns what `encode_frozen` gives for these conditions.

        The image encoder's states come from the identity.
        """
        batch = collate([conditions]).to(self.device)
        text_hidden, pooled = encode_text(self.base, batch.input_ids, batch.input_ids_2)
        rows = [
            identity.region_hidden[identity.regions.index(region)] for region in conditions.regions
        ]
        empty = [self._zero_hidden[0].cpu()] * (MAX_REGIONS - len(rows))
        return Features(
            text_hidden=text_hidden,
            pooled=pooled,
            clip_hidden=identity.clip_hidden[None].to(self._zero_hidden),
            region_hidden=torch.stack([*rows, *empty])[None].to(self._zero_hidden),
            identity=batch.identity,
            token_mask=batch.token_mask,
            token_valid=batch.token_valid,
        )

    def _guidance(
        self, features: Features, conditions: Conditions, prompt: str, settings: InferConfig
    ) -> Guidance:
        return guidance_states(
            self.model,
            features,
            early=self._early(features, conditions, prompt),
            negative=self._cached_text_states(settings.negative_prompt),
            zero_hidden=self._zero_hidden,
            strength=_strength(conditions, settings, self.device),
        )

    def _early(self, features: Features, conditions: Conditions, prompt: str) -> TextStates:
        """Returns the text states of the first phase, without fused regions.

        corrected: those of the second phase before fusion. legacy: those of the same text without
        marks, truncated with an EOS; with two text encoders, of the prompt alone (as in the
        reference's pipelines for SD1.5 and SDXL).
        """
        if self.model.mode == "corrected":
            return TextStates(hidden=features.text_hidden, pooled=features.pooled)
        return self._text_states(
            prompt if self.model.spec.two_text_encoders else without_marks(conditions.text)
        )

    def _cached_text_states(self, text: str) -> TextStates:
        if text not in self._texts:
            if len(self._texts) >= _CACHED_TEXTS:
                self._texts.clear()
            self._texts[text] = self._text_states(text)
        return self._texts[text]

    def _text_states(self, text: str) -> TextStates:
        tokenizer = self.base.tokenizer
        ids, ids_2 = (
            torch.tensor(
                [tokenize_marked(text, tokenizer, keep_eos=True, pad_id=pad).ids],
                device=self.device,
            )
            for pad in (None, _SECOND_PAD)
        )
        hidden, pooled = encode_text(self.base, ids, ids_2)
        return TextStates(hidden=hidden, pooled=pooled)

    def _sample(
        self,
        guidance: Guidance,
        scheduler: Any,
        settings: InferConfig,
        prompt_index: int,
        numbers: Sequence[int],
        on_step: StepCallback | None,
    ) -> npt.NDArray[np.uint8]:
        """Makes the images `numbers` of a prompt, (len(numbers), H, W, 3)."""
        factor = self.base.vae_factor
        if settings.height % factor or settings.width % factor:
            raise ConfigError(
                f"width={settings.width}, height={settings.height}: this base model needs "
                f"multiples of {factor}"
            )
        shape = (
            int(self.base.unet.config.in_channels),
            settings.height // factor,
            settings.width // factor,
        )
        latents = initial_latents(
            shape, [portrait_seed(settings.seed, prompt_index, number) for number in numbers]
        )
        scheduler.set_timesteps(settings.num_inference_steps)
        final = denoise(
            self.base.unet,
            scheduler,
            guidance.repeat(len(numbers)),
            latents.to(self.device),
            steps=settings.num_inference_steps,
            merge_step=merge_position(
                settings.start_merge_step, settings.num_inference_steps, len(scheduler.timesteps)
            ),
            guidance_scale=settings.guidance_scale,
            mode=self.model.mode,
            generator=_step_generators(settings.seed, prompt_index, numbers),
            vae_factor=factor,
            on_step=None if on_step is None else lambda _step, rows: on_step(len(rows)),
        )
        return decode(self.base.vae, final)

    def _metadata(
        self, identity: Identity, conditions: Conditions, prompt: str, settings: InferConfig
    ) -> dict[str, str]:
        """Returns a portrait's settings for its PNG; `text` is what the text encoder read."""
        return {
            "prompt": prompt,
            "negative_prompt": settings.negative_prompt,
            "text": without_marks(conditions.text),
            "regions": ", ".join(conditions.regions),
            "seed": str(settings.seed),
            "steps": str(settings.num_inference_steps),
            "start_merge_step": str(settings.start_merge_step),
            "guidance_scale": str(settings.guidance_scale),
            "id_scale": str(settings.id_scale),
            "scheduler": settings.scheduler,
            "size": f"{settings.width}x{settings.height}",
            "dtype": str(self.base.unet.dtype).removeprefix("torch."),
            "mode": self.model.mode,
            "spec": self.model.spec.name,
            "adapter_sha256": self.digest,
            "photo": identity.record.source,
            "photo_sha256": identity.record.sha256,
            "Software": "ConsistentID",
        }


def apply_template(prompt: str, settings: InferConfig) -> str:
    """Puts the prompt into `prompt_template`. Braces in the prompt have no special meaning."""
    return settings.prompt_template.replace("{prompt}", prompt)


def _strength(conditions: Conditions, settings: InferConfig, device: torch.device) -> Tensor | None:
    """Returns each slot's `region_strength`, (1, 5); None if all are 1."""
    values = [getattr(settings.region_strength, word_of(region)) for region in conditions.regions]
    if all(value == 1 for value in values):
        return None
    return torch.tensor([[*values, *[1.0] * (MAX_REGIONS - len(values))]], device=device)


def _step_generators(seed: int, prompt_index: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """Returns a generator for each image, for schedulers that add noise at every step."""
    return [
        torch.Generator().manual_seed(portrait_seed(seed, prompt_index, number, "steps"))
        for number in numbers
    ]

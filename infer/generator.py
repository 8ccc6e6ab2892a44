"""ConsistentIDGenerator: an identity × prompts → portraits, over the same stages and conditions as
training.

What depends on the person is made once (`Identity`), what depends on nothing is kept (the image
tower's answer to zero pixels, the negative text), and a prompt costs one pass of the text encoder.
Portrait i of prompt j depends on (seed, i, j), however many others are made with it.
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
from configs.schema import DatasetConfig, InferConfig
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
_KEPT_TEXTS = 32  # negative prompts whose states are remembered

StepCallback = Callable[[int], None]


class ConsistentIDGenerator:
    """Makes portraits of a person.

    base: the frozen models, with `model`'s processors in its UNet, all on one device. dataset: the
    configuration of the stages that read photographs: the one that the adapter's training data was
    made with. digest: names the adapter in the portraits' settings. `infer.load.load_generator`
    builds one from a configuration.
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
        """The data set's stages, their weights loaded when first asked for: a saved identity needs
        none.
        """
        if self._stages is None:
            self._stages = set_up_stages(self.dataset)
        return self._stages

    def identity(self, photo: str | Path | Record, name: str = "") -> Identity:
        """The person in a photograph: a path, or a record that holds one
        (`infer.identity.photo_record`).

        name: what to call it in an error. Raises FaceError if it shows no usable face, SourceError
        if it isn't a readable picture.
        """
        record = photo if isinstance(photo, Record) else read_photo(photo)
        called = name or (record.source if isinstance(photo, Record) else str(photo))
        return self.encode(run_stages(record, self.stages, called))

    def encode(self, record: Record) -> Identity:
        """The identity in a record that went through the stages already, e.g. one read from a
        shard.
        """
        everything = self._conditions(record, "")  # no prompt leaves room for all regions
        count = len(everything.regions)
        pixels = torch.cat((everything.clip_pixels[None], everything.region_pixels[:count]))
        hidden = encode_images(self.base.image_encoder, pixels.to(self.device)).cpu()
        return Identity(
            record=record,
            mode=self.model.mode,
            regions=everything.regions,
            clip_hidden=hidden[0].clone(),
            region_hidden=hidden[1:].clone(),
            tower=self._zero_hidden[0, 0].cpu().clone(),
        )

    def conditions(
        self, identity: Identity, prompt: str, settings: InferConfig | None = None
    ) -> Conditions:
        """All that the model is told of `identity` and one prompt, wrapped into `prompt_template`."""
        return self._conditions(identity.record, wrapped(prompt, settings or self.config))

    def generate(
        self,
        identity: Identity,
        prompts: str | Sequence[str],
        settings: InferConfig | None = None,
        on_step: StepCallback | None = None,
    ) -> Iterator[Portrait]:
        """Portraits in the order of prompts, `num_images_per_prompt` of each, made as they are
        asked for.

        settings: in place of the generator's own, as `dataclasses.replace(generator.config,
        seed=1)`; those of the model, the adapter and the data set have no effect here. on_step:
        called after each evaluation of the UNet with the number of portraits that it went over.
        Raises ConfigError for an unknown scheduler, or an identity that was made with another image
        tower or in another mode.
        """
        settings = settings or self.config
        self._check(identity)
        scheduler = make_scheduler(settings.scheduler, self.base.scheduler)
        self.model.set_scale(settings.id_scale)
        for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
            conditions = self.conditions(identity, prompt, settings)
            features = self._features(identity, conditions)
            guidance = self._guidance(features, conditions, wrapped(prompt, settings), settings)
            described = self._described(identity, conditions, prompt, settings)
            for start in range(0, settings.num_images_per_prompt, settings.batch_size):
                numbers = range(
                    start, min(start + settings.batch_size, settings.num_images_per_prompt)
                )
                pictures = self._sample(guidance, scheduler, settings, index, numbers, on_step)
                for number, pixels in zip(numbers, pictures, strict=True):
                    own = {"prompt_index": str(index), "image_index": str(number)}
                    yield Portrait(
                        pixels=pixels,
                        prompt=prompt,
                        prompt_index=index,
                        image_index=number,
                        settings=described | own,
                    )

    def evaluations(self, settings: InferConfig | None = None) -> int:
        """How often the UNet is evaluated for one portrait."""
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
        if identity.mode != self.model.mode:
            raise ConfigError(
                f"the identity of {identity.record.source} was made in {identity.mode} mode, the "
                "adapter is of "
                f"{self.model.mode} mode; make it again from the photograph"
            )
        own = self._zero_hidden[0, 0].float().cpu()
        tower = identity.tower.float()
        # loose enough for half precision; other towers differ by far more
        if tower.shape != own.shape or not torch.allclose(tower, own, rtol=0.05, atol=0.05):
            raise ConfigError(
                f"the identity of {identity.record.source} was made with another image encoder; "
                "make it again from the photograph"
            )

    def _features(self, identity: Identity, conditions: Conditions) -> Features:
        """As `encode_frozen` gives for these conditions, with the image tower's answers taken from
        the identity.
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
            negative=self._text(settings.negative_prompt),
            zero_hidden=self._zero_hidden,
            strength=_strength(conditions, settings, self.device),
        )

    def _early(self, features: Features, conditions: Conditions, prompt: str) -> TextStates:
        """The first phase's text. corrected: the second's, before anything is fused into it.
        legacy: the same text as a plain prompt, EOS kept; of two text encoders, the prompt alone
        (REFERENCE.md 7.2 and 7.3).
        """
        if self.model.mode == "corrected":
            return TextStates(hidden=features.text_hidden, pooled=features.pooled)
        return self._text_states(
            prompt if self.model.spec.two_text_encoders else without_marks(conditions.text)
        )

    def _text(self, text: str) -> TextStates:
        """States of a text that comes again and again."""
        if text not in self._texts:
            if len(self._texts) >= _KEPT_TEXTS:
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
        """Pictures `numbers` of one prompt, (len(numbers), H, W, 3)."""
        factor = self.base.vae_factor
        if settings.height % factor or settings.width % factor:
            raise ConfigError(
                f"{settings.width}×{settings.height}: this base needs multiples of {factor}"
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
            on_step=None if on_step is None else lambda _step, rows: on_step(len(rows)),
        )
        return decode(self.base.vae, final)

    def _described(
        self, identity: Identity, conditions: Conditions, prompt: str, settings: InferConfig
    ) -> dict[str, str]:
        """What made a portrait, for its PNG; `text` is what the text encoder read."""
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


def wrapped(prompt: str, settings: InferConfig) -> str:
    """The prompt inside `prompt_template`; braces in it are text like any other."""
    return settings.prompt_template.replace("{prompt}", prompt)


def _strength(conditions: Conditions, settings: InferConfig, device: torch.device) -> Tensor | None:
    """(1, 5), a slot's strength by its region's word; None where all are whole."""
    values = [getattr(settings.region_strength, word_of(region)) for region in conditions.regions]
    if all(value == 1 for value in values):
        return None
    return torch.tensor([[*values, *[1.0] * (MAX_REGIONS - len(values))]], device=device)


def _step_generators(seed: int, prompt_index: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """Of each picture its own: the noise that some schedulers add on the way."""
    return [
        torch.Generator().manual_seed(portrait_seed(seed, prompt_index, number, "steps"))
        for number in numbers
    ]

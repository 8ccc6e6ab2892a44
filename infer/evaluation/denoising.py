"""Real samples, noised at fixed timesteps, through the UNet: what losses and attention measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from configs.errors import ConfigError
from infer.evaluation.intervals import named_seed
from infer.evaluation.people import Person
from infer.mixin import ConsistentIDMixin
from model.conditions import Conditions, DropRates, build_conditions, collate, drop_conditions
from model.consistentid import BaseModels, ConsistentID, encode_frozen, predict_noise
from model.losses import noise_errors
from model.noising import noise_schedule, noised
from model.pixels import fixed_size_condition, training_pixels
from stages.record import Record

TIMESTEPS: Final = (100, 300, 500, 700, 900)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdaptedModel:
    """A base model, and an adapter that is in its UNet.

    base: its tokenizers have the marks (`model.prompt.add_marks`). resolution: of the training
    images, in pixels; 0: the spec's. batch_size: rows that go through a model together.
    """

    base: BaseModels
    adapter: ConsistentID
    resolution: int = 0
    batch_size: int = 32

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.base.unet.parameters()).device
        return device

    @property
    def side(self) -> int:
        """Side of the training images, in pixels."""
        return self.resolution or self.adapter.spec.resolution

    def conditions(self, record: Record, reference: Record) -> Conditions:
        """Returns the conditions of a sample whose person is read from another record."""
        return build_conditions(
            record,
            self.base.tokenizer,
            self.adapter.spec,
            self.adapter.mode,
            resolution=self.side,
            tokenizer_2=self.base.tokenizer_2,
            reference=reference,
        )


def adapted_model(pipe: ConsistentIDMixin, batch_size: int = 32) -> AdaptedModel:
    """Returns the models of a pipeline with an adapter, which isn't offloaded.

    Raises ConfigError without an adapter or an image encoder, which `encode_identity` loads.
    """
    adapter = pipe.adapter
    if pipe.image_encoder is None:
        raise ConfigError(
            "the pipeline has no image encoder yet; call encode_identity with a photograph first"
        )
    names = ("text_encoder", "vae", "unet", "image_encoder", "scheduler")
    second = ("tokenizer_2", "text_encoder_2")
    base = BaseModels(
        tokenizer=adapter.marked(pipe.tokenizer),
        **{name: getattr(pipe, name) for name in names},
        **{name: getattr(pipe, name, None) for name in second},
    )
    model = AdaptedModel(base=base, adapter=adapter.model, batch_size=batch_size)
    # The pipeline's `to` doesn't move projector and facial encoder: its first call does.
    model.adapter.to(model.device)
    return model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """A sample of each of N people, to be noised.

    people: their names. records: another photograph than the reference, if there is one. latents:
    (N, 4, h, w) float32, the mean of the VAE's. timesteps: at which each is noised.
    """

    people: tuple[str, ...]
    records: tuple[Record, ...]
    latents: Tensor
    timesteps: tuple[int, ...]
    seed: int

    def noise(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """Returns the noise of rows (sample, timestep), which depends on person and timestep."""
        return torch.stack(
            [
                torch.randn(
                    self.latents.shape[1:],
                    generator=torch.Generator().manual_seed(
                        named_seed(self.seed, "noise", self.people[sample], timestep)
                    ),
                )
                for sample, timestep in rows
            ]
        )


@torch.no_grad()
def noisy_samples(
    model: AdaptedModel,
    people: Sequence[Person],
    *,
    seed: int,
    timesteps: Sequence[int] = TIMESTEPS,
) -> Samples:
    """Encodes a sample of each person. Raises ConfigError for timesteps that don't exist."""
    vae, size = model.base.vae, model.batch_size
    steps = int(model.base.scheduler.config.num_train_timesteps)
    if not timesteps or not all(0 <= timestep < steps for timestep in timesteps):
        raise ConfigError(f"timesteps={tuple(timesteps)}: expected numbers from 0 to {steps - 1}")
    records = tuple(person.another or person.reference for person in people)
    latents = []
    for start in range(0, len(records), size):
        images = [training_pixels(each, model.side) for each in records[start : start + size]]
        pixels = torch.stack(images).to(model.device, vae.dtype)
        latents.append(vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor)
    return Samples(
        people=tuple(person.name for person in people),
        records=records,
        latents=torch.cat(latents),
        timesteps=tuple(timesteps),
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenoisedRows:
    """B rows that went through the UNet.

    rows: number of the sample, timestep. errors: (B,), the noise loss. scores: for each hooked
    layer the attention probabilities of the region tokens (B, heads, pixels, 5), if asked for.
    """

    rows: tuple[tuple[int, int], ...]
    errors: Tensor
    scores: list[Tensor]


@torch.no_grad()
def denoised(
    model: AdaptedModel,
    samples: Samples,
    conditions: Sequence[Conditions],
    *,
    without_identity: bool = False,
    scores: bool = False,
) -> Iterator[DenoisedRows]:
    """Predicts the noise of each sample at each timestep, in batches.

    conditions: of each sample. without_identity: whether the identity is dropped, as training does
    for the unconditional branch.
    """
    unet, device = model.base.unet, model.device
    schedule = noise_schedule(model.base.scheduler, device)
    states, pooled = _states(model, conditions, without_identity)
    every = [
        (sample, timestep) for sample in range(len(conditions)) for timestep in samples.timesteps
    ]
    for start in range(0, len(every), model.batch_size):
        rows = every[start : start + model.batch_size]
        numbers = [sample for sample, _ in rows]
        timesteps = torch.tensor([timestep for _, timestep in rows], device=device)
        noisy, target = noised(
            schedule, samples.latents[numbers], samples.noise(rows).to(device), timesteps
        )
        token_idx = torch.stack([conditions[number].token_idx for number in numbers]).to(device)
        added = {}
        if pooled is not None:  # SDXL
            sizes = fixed_size_condition(model.side).to(device).float()
            added = {"pooled": pooled[numbers], "time_ids": sizes.expand(len(rows), -1)}
        prediction, layers = predict_noise(
            unet,
            noisy,
            timesteps,
            states[numbers],
            token_idx=token_idx if scores else None,
            **added,
        )
        yield DenoisedRows(rows=tuple(rows), errors=noise_errors(prediction, target), scores=layers)


def _states(
    model: AdaptedModel, conditions: Sequence[Conditions], without_identity: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns what the UNet's cross-attention reads of each sample (N, 81, C), and the pooled
    states of SDXL (N, P).
    """
    states, pooled = [], []
    for start in range(0, len(conditions), model.batch_size):
        batch = collate(conditions[start : start + model.batch_size])
        if without_identity:
            every = DropRates(text=0, identity=1, both=0)
            batch = drop_conditions(batch, torch.zeros(len(batch)), every, model.base.tokenizer)
        features = encode_frozen(model.base, batch.to(model.device))
        states.append(model.adapter.prepare(features))
        if features.pooled is not None:
            pooled.append(features.pooled)
    return torch.cat(states), torch.cat(pooled) if pooled else None

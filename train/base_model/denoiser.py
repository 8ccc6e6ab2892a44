"""The denoiser: a UNet on the autoencoder's latents that reads the text tower's states.

It learns from captions of different lengths and without text, and what is saved is the moving
average of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor, nn

from configs.base_model import DenoiserConfig
from configs.errors import WeightsError
from model.consistentid import load_model
from model.losses import noise_errors
from model.noising import noise_schedule, noised
from model.pixels import vae_pixels
from model.spec import ModelSpec
from train import draws
from train.base_model.autoencoder import decode
from train.base_model.part import Part
from train.base_model.samples import TEXTS, Samples
from train.step import snr_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

_PREVIEWED: Final = 12  # pictures
_PREVIEW_STEPS: Final = 20
_PREVIEW_GUIDANCE: Final = 3.0
_ENCODED: Final = 128  # images or texts at a time
_TRAIN_TIMESTEPS: Final = 1000


class Denoiser(Part):
    """Trains diffusers' UNet2DConditionModel. See Part.

    vae, text_encoder: of the base, trained. empty: (77,) int64, the tokens of no text. sides: the
    tokens of the texts "left" and "right". rounds: times its steps that it trains. Raises
    WeightsError if the UNet to start from can't be loaded, or has another shape.
    """

    name: ClassVar[str] = "denoiser"
    losses: ClassVar[tuple[str, ...]] = ("loss",)
    settings: DenoiserConfig

    def __init__(
        self,
        settings: DenoiserConfig,
        spec: ModelSpec,
        seed: int,
        accelerator: Accelerator,
        samples: Samples,
        vae: Any,
        text_encoder: Any,
        empty: Tensor,
        sides: Sequence[Sequence[int]],
        rounds: int = 1,
        track: Callable[[range], Iterable[int]] = iter,
    ) -> None:
        from diffusers.training_utils import EMAModel

        super().__init__(settings, settings.steps * rounds, seed, accelerator)
        device = accelerator.device
        self._vae, self._text_encoder = vae.to(device), text_encoder.to(device)
        pixels, ids = samples.pixels, samples.ids
        self._count = len(pixels)
        self._moments = self._encoded(pixels, track)
        if settings.mirror:
            mirrored = self._encoded(pixels.flip(-1), track)
            self._moments = torch.cat((self._moments, mirrored))
            ids = torch.cat((ids, exchanged_sides(ids, sides)))
        self._states = torch.cat(
            [
                self._text_states(ids[:, TEXTS.index("all")]),
                self._text_states(ids[:, TEXTS.index("image")]),
                self._text_states(empty[None]),
            ]
        )
        torch.manual_seed(seed)
        self._unet = make_denoiser(settings, spec, self._moments.shape[-1])
        if settings.start_from:
            _load_unet(self._unet, settings.start_from)
        self.schedule = make_schedule(settings)
        optimizer = torch.optim.AdamW(
            self._unet.parameters(), betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        model, self._optimizer = accelerator.prepare(_Predictor(self._unet), optimizer)
        with self.autocast():
            self._model = self.recorded(model, *self._example())
        self._average = EMAModel(
            self._unet.parameters(), settings.ema_decay, use_ema_warmup=True, foreach=True
        )
        self._noising = noise_schedule(self.schedule, device)

    @property
    def stateful(self) -> Mapping[str, Any]:
        return {"unet": self._unet, "optimizer": self._optimizer, "average": self._average}

    def update(self, step: int, positions: Sequence[int], numbers: Sequence[int]) -> Tensor:
        device, seed = self.accelerator.device, self.seed
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        rows = [self._row(*each) for each in zip(positions, numbers, strict=True)]
        moments = self._moments[rows]
        shape = (4, *moments.shape[-2:])
        first, second = (
            torch.stack([draws.normal(shape, seed, name, each) for each in positions])
            for name in ("latent_noise", "noise")
        )
        mean, std = moments.chunk(2, dim=1)
        latents = ((mean + std * first) * self._vae.config.scaling_factor).to(device)
        noise = second.to(device)
        timesteps = torch.tensor(
            [draws.integer(_TRAIN_TIMESTEPS, seed, "timestep", each) for each in positions]
        ).to(device)
        states = self._states[[self._text_row(*each) for each in zip(positions, rows, strict=True)]]
        noisy, target = noised(self._noising, latents, noise, timesteps)
        with self.autocast():
            predicted = self._model(noisy, timesteps, states.to(device).float())
        gamma = self.settings.snr_gamma
        weights = snr_weights(self._noising, timesteps, gamma) if gamma else None
        loss = noise_errors(predicted, target, weights=weights).mean()
        self.optimize(self._optimizer, loss, [*self._unet.parameters()])
        self._average.step(self._unet.parameters())
        return loss.detach()[None]

    def _example(self) -> tuple[Tensor, ...]:
        """Returns inputs of the UNet that have a batch's shapes."""
        count = self.settings.batch_size
        inputs = (
            torch.zeros((count, 4, *self._moments.shape[-2:])),
            torch.zeros(count, dtype=torch.int64),
            torch.zeros((count, *self._states.shape[1:])),
        )
        return tuple(each.to(self.accelerator.device) for each in inputs)

    def _row(self, position: int, number: int) -> int:
        """Returns the row of `_moments` that a sample is trained with."""
        mirrored = self.settings.mirror and draws.uniform(self.seed, "mirror", position) < 0.5
        return number + self._count * mirrored

    def _text_row(self, position: int, row: int) -> int:
        """Returns the row of `_states` that a row of `_moments` is trained with."""
        count = len(self._moments)
        draw = draws.uniform(self.seed, "text", position)
        if draw < self.settings.drop_text:
            return 2 * count
        short = draw < self.settings.drop_text + self.settings.short_text
        return row + count * short

    @torch.no_grad()
    def _encoded(self, pixels: Tensor, track: Callable[[range], Iterable[int]]) -> Tensor:
        """Returns mean and standard deviation of each image's latents, (N, 8, h, w)."""
        parts = []
        for first in track(range(0, len(pixels), _ENCODED)):
            images = vae_pixels(pixels[first : first + _ENCODED]).to(self.accelerator.device)
            posterior = self._vae.encode(images).latent_dist
            parts.append(torch.cat((posterior.mean, posterior.std), dim=1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def _text_states(self, ids: Tensor) -> Tensor:
        """Returns the text tower's last states (N, 77, C), float16."""
        device = self.accelerator.device
        parts = [
            self._text_encoder(part.to(device)).last_hidden_state.half().cpu()
            for part in torch.split(ids, _ENCODED)
        ]
        return torch.cat(parts)

    def preview(self) -> Tensor:
        """Pictures of the first samples' captions, by the averaged weights."""
        count = min(_PREVIEWED, self._count)
        states = self._states[[*range(count), *([len(self._states) - 1] * count)]]
        shape = (4, *self._moments.shape[-2:])
        noise = torch.stack([draws.normal(shape, self.seed, "preview", i) for i in range(count)])
        parameters = [*self._unet.parameters()]
        self._average.store(parameters)
        self._average.copy_to(parameters)
        self._unet.eval()
        latents = _sample(self._unet, self.schedule, noise, states.float(), self.accelerator.device)
        self._unet.train()
        self._average.restore(parameters)
        images = decode(self._vae, latents / self._vae.config.scaling_factor)
        return torch.cat([*images], dim=-1)

    def save(self, folder: Path) -> dict[str, float]:
        """Writes unet/, with the averaged weights, and scheduler/."""
        parameters = [*self._unet.parameters()]
        self._average.store(parameters)
        self._average.copy_to(parameters)
        self._unet.save_pretrained(folder / "unet")
        self._average.restore(parameters)
        self.schedule.save_pretrained(folder / "scheduler")
        return {}


def exchanged_sides(ids: Tensor, sides: Sequence[Sequence[int]]) -> Tensor:
    """Returns token ids of the same shape, in which the words left and right are exchanged.

    ids: int64, of any shape. sides: ids of the texts "left" and "right", in this order.
    """
    left, right = (next(iter({*own} - {*other})) for own, other in (sides, sides[::-1]))
    swapped = torch.where(ids == left, right, ids)
    return torch.where(ids == right, left, swapped)


def _load_unet(unet: Any, folder: str) -> None:
    import diffusers

    weights = load_model(diffusers.UNet2DConditionModel, folder).state_dict()
    try:
        unet.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(
            f"denoiser.start_from={folder} has a UNet of another shape ({error}). Set "
            "denoiser.channels, layers and attention as it was made with, or another folder."
        ) from error


class _Predictor(nn.Module):
    """The UNet, called with tensors only, as CUDA graphs require."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """Returns the prediction (B, 4, h, w)."""
        predicted: Tensor = self.unet(noisy, timesteps, states, return_dict=False)[0]
        return predicted


@torch.no_grad()
def _sample(
    unet: Any, schedule: Any, noise: Tensor, states: Tensor, device: torch.device
) -> Tensor:
    """Returns latents (B, 4, h, w). states: (2·B, 77, C), those of the texts, then of no text."""
    schedule.set_timesteps(_PREVIEW_STEPS)
    latents, states = noise.to(device), states.to(device)
    for timestep in schedule.timesteps:
        both = unet(torch.cat((latents, latents)), timestep, states, return_dict=False)[0]
        text, none = both.chunk(2)
        guided = none + _PREVIEW_GUIDANCE * (text - none)
        latents = schedule.step(guided, timestep, latents, return_dict=False)[0]
    return latents


def make_denoiser(settings: DenoiserConfig, spec: ModelSpec, side: int) -> Any:
    """Makes a UNet2DConditionModel with random weights. side: of the latents."""
    import diffusers

    plain = settings.attention
    attending = len(settings.channels) - plain
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=settings.channels,
        down_block_types=(*("DownBlock2D",) * plain, *("CrossAttnDownBlock2D",) * attending),
        up_block_types=(*("CrossAttnUpBlock2D",) * attending, *("UpBlock2D",) * plain),
        layers_per_block=settings.layers,
        cross_attention_dim=spec.cross_attention_dim,
        attention_head_dim=settings.heads,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def make_schedule(settings: DenoiserConfig) -> Any:
    """Makes the base's scheduler, with Stable Diffusion's noise schedule. For v-prediction it has
    zero terminal SNR and trailing timesteps (Lin et al. 2024, "Common diffusion noise schedules and
    sample steps are flawed").
    """
    import diffusers

    velocity = settings.prediction_type == "v_prediction"
    return diffusers.DDIMScheduler(
        num_train_timesteps=_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=settings.prediction_type,
        rescale_betas_zero_snr=velocity,
        timestep_spacing="trailing" if velocity else "leading",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

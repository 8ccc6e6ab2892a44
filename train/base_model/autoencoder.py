"""The autoencoder: pixels to latents of four channels, and back.

Its loss is the one of latent diffusion (Rombach et al. 2022, section 3.1): L1, a perceptual loss,
the KL divergence of the latents from a unit normal with a small weight, and the adversarial loss of
a patch discriminator. The perceptual loss uses features of the face parser's ResNet-18, whose
weights the pipeline has anyway, in place of VGG's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.base_model import AutoencoderConfig
from configs.schema import ParseConfig
from model.pixels import vae_pixels
from stages.backends.bisenet import BiSeNetParser
from stages.backends.weights import Weights
from train import draws
from train.base_model.part import Part
from train.base_model.samples import Samples

if TYPE_CHECKING:
    from accelerate import Accelerator

_PREVIEWED = 12  # pictures
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Autoencoder(Part):
    """Trains diffusers' AutoencoderKL. See Part."""

    name: ClassVar[str] = "autoencoder"
    losses: ClassVar[tuple[str, ...]] = ("error", "perceptual", "kl", "adversarial")
    settings: AutoencoderConfig

    def __init__(
        self,
        settings: AutoencoderConfig,
        seed: int,
        accelerator: Accelerator,
        samples: Samples,
        weights: Weights,
    ) -> None:
        super().__init__(settings, settings.steps, seed, accelerator)
        self._pixels = samples.pixels
        self._side = settings.crop or samples.pixels.shape[-1]  # of what it is trained on
        latent_side = self._side // 2 ** (len(settings.channels) - 1)
        self._latent_shape = (4, latent_side, latent_side)
        torch.manual_seed(seed)
        vae, critic = make_autoencoder(settings, samples.pixels.shape[-1]), _Critic()
        optimizers = [
            torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
            for module in (vae, critic)
        ]
        prepared = accelerator.prepare(_Reconstruction(vae), critic, *optimizers)
        self._model, self._critic, self._optimizer, self._critic_optimizer = prepared
        self._vae = vae
        features = _Features(weights).to(accelerator.device)
        images, noise = (
            torch.zeros((settings.batch_size, *shape), device=accelerator.device)
            for shape in ((3, self._side, self._side), self._latent_shape)
        )
        with self.autocast():
            self._model = self.recorded(self._model, images, noise)
        self._features = self.recorded(features, images.clone().requires_grad_(), images)

    @property
    def stateful(self) -> Mapping[str, Any]:
        return {
            "vae": self._vae,
            "critic": self.accelerator.unwrap_model(self._critic),
            "optimizer": self._optimizer,
            "critic_optimizer": self._critic_optimizer,
        }

    def update(self, step: int, positions: Sequence[int], numbers: Sequence[int]) -> Tensor:
        settings, device = self.settings, self.accelerator.device
        rate = self.learning_rate(step)
        for optimizer, factor in ((self._optimizer, 1.0), (self._critic_optimizer, 0.3)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        images = self._crops(step, positions, numbers).to(device)
        noise = torch.stack(
            [draws.normal(self._latent_shape, self.seed, "vae_noise", p) for p in positions]
        )
        with self.autocast():
            decoded, kl = self._model(images, noise.to(device))
        decoded = decoded.float()
        error = F.l1_loss(decoded, images)
        perceptual = self._features(decoded, images)
        loss = error + settings.perceptual_weight * perceptual + settings.kl_weight * kl
        adversarial = torch.zeros((), device=device)
        critical = step > settings.adversarial_from * self.steps and settings.adversarial_weight > 0
        if critical:
            adversarial = -self._critic(decoded).mean()
            loss = loss + settings.adversarial_weight * adversarial
        self.optimize(self._optimizer, loss, [*self._vae.parameters()])
        if critical:
            real, fake = self._critic(images), self._critic(decoded.detach())
            hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            self.optimize(self._critic_optimizer, hinge, [*self._critic.parameters()])
        return torch.stack([each.detach() for each in (error, perceptual, kl, adversarial)])

    def _crops(self, step: int, positions: Sequence[int], numbers: Sequence[int]) -> Tensor:
        """Returns crops (B, 3, c, c) at one random place, half of them mirrored."""
        images = vae_pixels(self._pixels[list(numbers)])
        side = self._side
        generator = draws.generator(self.seed, "vae_crop", step)
        top, left = torch.randint(images.shape[-1] - side + 1, (2,), generator=generator).tolist()
        images = images[:, :, top : top + side, left : left + side]
        mirrored = torch.tensor(
            [draws.uniform(self.seed, "vae_mirror", p) < 0.5 for p in positions]
        )
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    def preview(self) -> Tensor:
        """Images above their reconstructions."""
        images = vae_pixels(self._pixels[:_PREVIEWED]).to(self.accelerator.device)
        decoded = decode(self._vae, encode(self._vae, images))
        rows = [torch.cat([*row], dim=-1) for row in (images, decoded)]
        return torch.cat(rows, dim=-2)

    def save(self, folder: Path) -> dict[str, float]:
        """Writes vae/, with the scaling factor by which the latents have unit variance."""
        latents, error = [], []
        for part in torch.split(self._pixels, 64):
            images = vae_pixels(part).to(self.accelerator.device)
            latents.append(encode(self._vae, images))
            error.append((decode(self._vae, latents[-1]) - images).square().mean((1, 2, 3)) / 4)
        factor = 1.0 / float(torch.cat(latents).std())
        self._vae.register_to_config(scaling_factor=round(factor, 5))
        self._vae.save_pretrained(folder / "vae")
        return {"psnr": float(-10 * torch.cat(error).log10().mean())}


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Returns the means of the latents (B, 4, h, w), not scaled, of images (B, 3, R, R)."""
    mean: Tensor = vae.encode(images).latent_dist.mean
    return mean


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Returns images (B, 3, R, R) in [-1, 1] of latents that aren't scaled."""
    images: Tensor = vae.decode(latents, return_dict=False)[0]
    return images.clamp(-1, 1)


def make_autoencoder(settings: AutoencoderConfig, resolution: int) -> Any:
    """Makes an AutoencoderKL with random weights."""
    import diffusers

    levels = len(settings.channels)
    return diffusers.AutoencoderKL(
        block_out_channels=settings.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        layers_per_block=settings.layers,
        norm_num_groups=16,
        sample_size=resolution,
        mid_block_add_attention=False,
    )


class _Reconstruction(nn.Module):
    """The autoencoder's whole pass, in one call, as distributed training requires."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the reconstructions, and the divergence from a unit normal per latent number."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents, return_dict=False)[0], (
            posterior.kl().mean() / posterior.mean[0].numel()
        )


class _Critic(nn.Sequential):
    """A discriminator of patches: images (B, 3, R, R) → scores (B, 1, R/4, R/4)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, 1, 1),
        )


class _Features(nn.Module):
    """The first levels of the face parser's ResNet-18, frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        network: Any = BiSeNetParser(ParseConfig(device="cpu"), weights).backbone
        self.first = nn.Sequential(network.conv1, network.bn1, nn.ReLU())
        self.levels = nn.ModuleList(
            [nn.Sequential(network.maxpool, network.layer1), network.layer2, network.layer3]
        )
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the squared distance of the features, normalised at each place, summed over
        channels and levels, and averaged over places and images: LPIPS without its weights (Zhang
        et al. 2018).
        """
        with torch.no_grad():
            wanted = self._of(targets)
        pairs = zip(self._of(images), wanted, strict=True)
        distances = [(a - b).square().sum(1).mean() for a, b in pairs]
        return torch.stack(distances).sum()

    def _of(self, images: Tensor) -> list[Tensor]:
        features = [self.first(((images + 1) / 2 - self.mean) / self.std)]
        for level in self.levels:
            features.append(level(features[-1]))
        return [F.normalize(each, dim=1, eps=1e-6) for each in features]

"""Pictures that are replaced in a data set, and a base whose latents show them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def grey(random: np.random.Generator) -> Any:
    return np.full((64, 64, 3), 128, np.uint8)


def noise(random: np.random.Generator) -> Any:
    return random.integers(0, 2, (64, 64, 3), np.uint8) * 255


def with_pictures(
    data: Path, folder: Path, pictures: Sequence[Callable[[Any], Any] | None]
) -> Path:
    """Copies a data set to `folder`, with other pictures.

    pictures: for each sample, in order, what makes its pixels, (64, 64, 3) uint8; None leaves its
    picture. The digests aren't changed, so read it with verify_samples=False.
    """
    shutil.copytree(data, folder)
    images = []
    for tar in sorted(folder.glob("shards/fgid-??????.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    stored = archive.extractfile(member)
                    assert stored is not None
                    images.append((tar, member, Image.open(stored).size))
    for (tar, member, size), make in zip(images, pictures, strict=True):
        if make is None:
            continue
        pixels = Image.fromarray(make(np.random.default_rng(0)))
        picture = pixels.resize(size, Image.Resampling.NEAREST)
        for quality in range(90, 0, -5):
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=quality)
            if len(stream.getvalue()) <= member.size:
                break
        with tar.open("r+b") as file:
            file.seek(member.offset_data)
            file.write(stream.getvalue().ljust(member.size, b"\0"))
    return folder


def base_that_shows_pictures(base: Path, folder: Path, resolution: int) -> Path:
    """Copies a tiny base to `folder`, whose loss depends on the picture without training: it
    predicts velocity, and the latents are 0 for a grey picture and large for noise.
    """
    import diffusers

    shutil.copytree(base, folder)
    vae: Any = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    encoder, features = vae.encoder, list[torch.Tensor]()
    encoder.conv_out.register_forward_hook(lambda module, inputs, _: features.append(inputs[0]))
    random = torch.Generator().manual_seed(0)
    pictures = torch.zeros(2, 3, resolution, resolution)
    pictures[1] = torch.rand(pictures[1].shape, generator=random) * 2 - 1
    channels = vae.config.latent_channels
    with torch.no_grad():
        encoder(pictures)
        # the latents are a projection of the features that is 0 for those of the grey picture
        basis, _ = torch.linalg.qr(features[0][0].flatten(1))
        weights = torch.randn(channels, len(basis), generator=random)
        encoder.conv_out.weight.zero_()
        encoder.conv_out.weight[:channels, :, 1, 1] = weights - weights @ basis @ basis.T
        encoder.conv_out.bias[:] = torch.tensor([0.0, -30.0]).repeat_interleave(channels)
        if vae.quant_conv is not None:
            vae.quant_conv.weight[:] = torch.eye(2 * channels)[..., None, None]
            vae.quant_conv.bias.zero_()
        latents = vae.encode(pictures).latent_dist.mean
    assert latents[0].abs().max() < 1e-4
    vae.register_to_config(scaling_factor=4 / float(latents[1].std()))
    vae.save_pretrained(folder / "vae")
    schedule = folder / "scheduler/scheduler_config.json"
    settings = {**json.loads(schedule.read_text()), "prediction_type": "v_prediction"}
    schedule.write_text(json.dumps(settings))
    return folder

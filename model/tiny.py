"""The tiny base: real transformers and diffusers classes at toy size with random weights, made locally from a seed.

Its folder has diffusers' layout and loads like any other base. The text side has CLIP's real vocabulary, so prompts,
marks and positions are those of the large models.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from configs.errors import ConfigError, WeightsError
from model.spec import SPECS

_MERGES: Final = 48_894
_MARKER: Final = "tiny.json"
_KL_WEIGHT: Final = 1e-3  # just enough to keep latents near zero and smooth


def clip_tokenizer(vocab_path: Path) -> Any:
    """CLIP's tokenizer (49,408 entries, padded with EOS) from its `bpe_simple_vocab_16e6.txt.gz`.

    Raises WeightsError if the file is not that vocabulary.
    """
    from transformers import CLIPTokenizer

    with gzip.open(vocab_path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _MERGES + 1]]
    if len(merges) != _MERGES or any(len(merge) != 2 for merge in merges):
        raise WeightsError(f"{vocab_path} holds no CLIP vocabulary: expected {_MERGES} merges after a head line")
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocab = {word: index for index, word in enumerate((*words, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _byte_letters() -> list[str]:
    """A printable letter for each byte in CLIP's order: printable bytes stand for themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(0x100 + index) for index in range(len(others))]


def make_tiny_base(folder: Path, vocab: Path, seed: int) -> Path:
    """Write the tiny base (about 40 MB) to `folder` in diffusers' layout, the image tower under image_encoder/.

    The same seed gives the same bytes. A folder that holds it already is left as it is. Raises ConfigError if the
    folder holds something else.
    """
    marker = folder / _MARKER
    wanted = {"spec": "tiny", "seed": seed}
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found.get("seed") != seed:
            raise ConfigError(
                f"{folder} holds a tiny base of seed {found.get('seed')}, not {seed}; name another folder"
            )
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no tiny base; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        partial = Path(scratch, "base")
        for name, part in _parts(vocab, seed).items():
            part.save_pretrained(partial / name)
        (partial / _MARKER).write_text(json.dumps(wanted) + "\n")
        partial.replace(folder)
    return folder


def _parts(vocab: Path, seed: int) -> dict[str, Any]:
    """The parts by subfolder; the random state outside is left alone."""
    import diffusers
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    spec, side = SPECS["tiny"], SPECS["tiny"].vision_size
    text = transformers.CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=spec.cross_attention_dim,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=49_406,
        eos_token_id=49_407,
        pad_token_id=49_407,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=spec.vision_dim,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=side,
        patch_size=8,
        projection_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "tokenizer": clip_tokenizer(vocab),
            "text_encoder": transformers.CLIPTextModel(text),
            "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
            "feature_extractor": CLIPImageProcessorPil(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(32, 64, 64),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=8,
                sample_size=spec.resolution,
            ),
            "unet": diffusers.UNet2DConditionModel(
                sample_size=spec.resolution // 4,
                block_out_channels=(48, 96),
                down_block_types=("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2,
                layers_per_block=1,
                cross_attention_dim=spec.cross_attention_dim,
                attention_head_dim=4,  # diffusers' name for the number of heads
                norm_num_groups=16,
            ),
            "scheduler": diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
        }


def fit_tiny_vae(folder: Path, images: npt.NDArray[np.uint8], *, steps: int, seed: int, batch_size: int = 16) -> float:
    """Teach the tiny base's VAE to reconstruct pictures like `images` (N, H, W, 3), RGB, sides divisible by 4.

    With its random weights latents say nothing of a picture and decoded ones are noise. Sets the VAE's scaling factor
    so that latents have unit variance, as the noise schedule expects. Overwrites the VAE in `folder`; returns the mean
    squared error of the pictures in [-1, 1]. Train no adapter before it: latents change.
    """
    import diffusers

    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % 4 or images.shape[2] % 4:
        raise ValueError(f"images must be (N, H, W, 3) with sides divisible by 4, not {images.shape}")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(steps, 1), pct_start=0.1)
    for _ in range(steps):
        batch = pixels[torch.randint(len(pixels), (batch_size,), generator=order)]
        batch = torch.where(torch.rand(batch_size, 1, 1, 1, generator=order) < 0.5, batch, batch.flip(-1))
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=order)
        answer = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = F.mse_loss(answer, batch) + _KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parts = [vae.encode(part).latent_dist.mean for part in pixels.split(batch_size)]
        errors = [F.mse_loss(vae.decode(z).sample, x) for z, x in zip(parts, pixels.split(batch_size), strict=True)]
        vae.register_to_config(scaling_factor=round(float(1.0 / torch.cat(parts).std()), 6))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".vae-") as scratch:
        vae.save_pretrained(Path(scratch, "vae"))
        for file in sorted(Path(scratch, "vae").iterdir(), reverse=True):
            file.replace(folder / "vae" / file.name)
    return float(torch.stack(errors).mean())

"""The tiny base model: transformers and diffusers classes at toy size, with random weights.

It is made locally from a seed, in a folder with diffusers' layout that loads like any other base.
The tokenizer has CLIP's real vocabulary, so prompts, marks and token positions are those of the
large models.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from configs.errors import ConfigError
from model.spec import SPECS
from model.vocabulary import clip_tokenizer

_MARKER: Final = "tiny.json"
# model_index.json
PIPELINE: Final = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make_tiny_base(folder: Path, vocab: Path, seed: int) -> Path:
    """Writes the tiny base (about 40 MB) to `folder` in diffusers' layout, and returns the folder.

    The image encoder is under image_encoder/. vocab: CLIP's vocabulary file, see
    `model.vocabulary`. The same seed gives the same bytes. A folder that already holds the base of
    this seed is left unchanged. Raises ConfigError if the folder holds anything else.
    """
    marker = folder / _MARKER
    if marker.is_file():
        existing = json.loads(marker.read_text()).get("seed")
        if existing != seed:
            raise ConfigError(
                f"{folder} holds a tiny base of seed {existing}, not {seed}; name another folder"
            )
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no tiny base; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        partial = Path(scratch, "base")
        for name, part in _parts(vocab, seed).items():
            part.save_pretrained(partial / name)
        (partial / "model_index.json").write_text(json.dumps(PIPELINE, indent=2) + "\n")
        (partial / _MARKER).write_text(json.dumps({"spec": "tiny", "seed": seed}) + "\n")
        partial.replace(folder)
    return folder


def _parts(vocab: Path, seed: int) -> dict[str, Any]:
    """Makes the parts, by subfolder. Torch's global random state is restored afterwards."""
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

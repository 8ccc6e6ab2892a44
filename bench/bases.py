"""Base models and adapters at full size with random weights, made on the spot.

They take the same time and memory as real ones, so nothing needs to be downloaded. Their tokenizer
is that of the small base, which has CLIP's vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from model.base import base_path
from model.checkpoint import write_adapter
from model.spec import SPECS, Embedder, Mode
from model.tiny import make_tiny_base
from stages.backends.weights import Weights

_SCHEDULER: Final = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_KINDS: Final = {
    "scheduler": "EulerDiscreteScheduler",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
_OF_DIFFUSERS: Final = ("scheduler", "unet", "vae")
_UNUSED: Final = ("feature_extractor", "image_encoder", "safety_checker")
_SEED: Final = 0


def make_base(folder: Path, model: str, device: str = "cpu") -> None:
    """Writes a base model and its image encoder with random weights, in diffusers' layout, float16.

    model: sd15, sdxl or tiny (float32, with CLIP's vocabulary from the cache of weights, or
    downloaded). device: where the weights are drawn.
    """
    if model == "tiny":
        make_tiny_base(folder, Weights().fetch("clip_bpe"), _SEED)
        return
    import diffusers
    from transformers import CLIPTokenizer

    parts = _parts(sdxl=model == "sdxl")
    tokenizers = {name.replace("text_encoder", "tokenizer") for name in parts if "text" in name}
    partial = folder.with_name(f".{folder.name}")
    torch.manual_seed(_SEED)
    for name, make in parts.items():  # one at a time: SDXL's UNet alone is 5 GB
        with torch.device(device), _default_type(torch.float16):
            part = make()
        part.half().save_pretrained(partial / name)
    for name in tokenizers:
        CLIPTokenizer.from_pretrained(base_path("small"), subfolder="tokenizer").save_pretrained(
            partial / name
        )
    diffusers.EulerDiscreteScheduler(**_SCHEDULER).save_pretrained(partial / "scheduler")
    (partial / "model_index.json").write_text(json.dumps(_index(model, [*parts, *tokenizers])))
    partial.rename(folder)


def make_adapter(folder: Path, model: str, mode: Mode, embedder: str, device: str = "cpu") -> None:
    """Writes an adapter with small random weights in all its parts, float16.

    embedder: name of the face embedder that photographs are to be read with.
    """
    import diffusers

    from model.consistentid import ConsistentID

    spec, base = SPECS[model], folder.parent / "base"
    with torch.device("meta"):
        config = diffusers.UNet2DConditionModel.load_config(base / "unet")
        unet = diffusers.UNet2DConditionModel.from_config(config)
        shapes = {
            key: value.shape for key, value in ConsistentID(spec, unet, mode).state_dict().items()
        }
    generator = torch.Generator(device).manual_seed(_SEED)
    state = {key: _drawn(key, shape, generator, device) for key, shape in shapes.items()}
    origin = Embedder(name=embedder, sha256=Weights().digest(embedder))
    write_adapter(folder, state, spec, mode, {"step": 0, "embedder": asdict(origin)})


def _drawn(key: str, shape: torch.Size, generator: torch.Generator, device: str) -> torch.Tensor:
    """Returns a weight as a layer of a trained model could have it: norms near 1, sums near 1."""
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if len(shape) > 1:
        scaled = values * (0.1 if "_lora.up" in key else 1.0) / math.sqrt(shape[-1])
    else:
        scaled = values * 0.02 + (1 if "norm" in key and key.endswith("weight") else 0)
    return scaled.half().cpu()


def _parts(*, sdxl: bool) -> dict[str, Callable[[], Any]]:
    """Returns functions that make the models, by subfolder."""
    import diffusers
    import transformers

    def text(kind: Any, **sizes: Any) -> Callable[[], Any]:
        return lambda: kind(transformers.CLIPTextConfig(**sizes))

    first = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    second = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    }
    vision = transformers.CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1024,
        hidden_act="gelu",
    )
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 1024 if sdxl else 512,
        "scaling_factor": 0.13025 if sdxl else 0.18215,
        "force_upcast": sdxl,
    }
    # diffusers' defaults are the sizes of Stable Diffusion 1.5, except for this width
    unet: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
    if sdxl:
        unet = {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),  # diffusers' name for the numbers of heads
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    parts: dict[str, Callable[[], Any]] = {
        "text_encoder": text(transformers.CLIPTextModel, **first),
        "image_encoder": lambda: transformers.CLIPVisionModelWithProjection(vision),
        "vae": lambda: diffusers.AutoencoderKL(**vae),
        "unet": lambda: diffusers.UNet2DConditionModel(**unet),
    }
    if sdxl:
        parts["text_encoder_2"] = text(transformers.CLIPTextModelWithProjection, **second)
    return parts


def _index(model: str, names: list[str]) -> dict[str, Any]:
    """Returns the contents of model_index.json.

    The image encoder isn't in it: as with the published bases, it is loaded for the adapter.
    """
    entries: dict[str, Any] = {
        name: ["diffusers" if name in _OF_DIFFUSERS else "transformers", _KINDS[name]]
        for name in (*names, "scheduler")
        if name != "image_encoder"
    }
    entries |= {name: [None, None] for name in _UNUSED}
    if model == "sdxl":
        del entries["safety_checker"]
        return {"_class_name": "StableDiffusionXLPipeline", **entries}
    return {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        **entries,
    }


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

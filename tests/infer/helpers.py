"""A tiny SDXL base, adapters with random weights, settings for few steps and small portraits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from configs.portraits import InferConfig
from infer.identity import Identity
from model.checkpoint import save_adapter
from model.consistentid import ConsistentID, load_model
from model.spec import SPECS, ModelSpec
from stages.backends.weights import Weights
from stages.regions import Mode
from tests.bases import base_copy

# The photographs' states are those of the tiny model, so a person fits both in corrected mode.
TINY_XL: Final = replace(
    SPECS["tiny"],
    name="tiny_xl",
    cross_attention_dim=192,  # of the first text encoder 128, of the second 64
    hooked=("down_blocks.1", "mid_block", "up_blocks.0"),
    two_text_encoders=True,
    detail_prefix=SPECS["sdxl"].detail_prefix,
    template=SPECS["sdxl"].template,
)


SIZE = {"height": 32, "width": 32}
STEPS = 6
CALL = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "latent"}


def make_tiny_xl(folder: Path, base: Path) -> Path:
    """Writes an SDXL base with random weights. Its UNet and second text encoder are new, the rest
    are links to the tiny base.
    """
    import diffusers
    import transformers

    linked = ("tokenizer", "text_encoder", "image_encoder", "feature_extractor", "vae", "scheduler")
    for name in linked:
        (folder / name).symlink_to(base / name)
    (folder / "tokenizer_2").symlink_to(base / "tokenizer")
    text = transformers.CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=49_406,
        eos_token_id=49_407,
        pad_token_id=49_407,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformers.CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder_2")
        diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=1,
            cross_attention_dim=TINY_XL.cross_attention_dim,
            attention_head_dim=(2, 4),  # diffusers' name for the number of heads
            norm_num_groups=16,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ).save_pretrained(folder / "unet")
    index = json.loads((base / "model_index.json").read_text()) | {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    for name in ("requires_safety_checker", "safety_checker"):
        del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_adapter(base: Path, folder: Path, mode: Mode, spec: ModelSpec = SPECS["tiny"]) -> Path:
    """Writes an adapter with random weights, also in the half of the LoRA that starts at zero.

    So every part of it changes the result.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = ConsistentID(spec, _unet(base, spec), mode)
        for name, value in model.named_parameters():
            if name.endswith("up.weight"):
                torch.nn.init.normal_(value, std=0.05)
    embedder = {"name": "w600k_mbf", "sha256": Weights().digest("w600k_mbf")}
    return save_adapter(model, folder, {"step": 0, "embedder": embedder})


def _unet(base: Path, spec: ModelSpec) -> Any:
    from diffusers import UNet2DConditionModel

    if spec.name == "tiny":
        return base_copy(spec, base).unet  # other tests have read it
    return load_model(UNet2DConditionModel, str(base), subfolder="unet")


def small(adapter: Path, **changes: object) -> InferConfig:
    """Returns settings for four steps at 32 pixels."""
    values: dict[str, object] = {
        "adapter": str(adapter),
        "num_inference_steps": 4,
        "start_merge_step": 2,
        "height": 32,
        "width": 32,
        "guidance_scale": 2.0,
        "negative_prompt": "blurry",
        "merge_lora": False,
        "seed": 5,
    }
    return InferConfig(**{**values, **changes})  # type: ignore[arg-type]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: Any, person: Identity, prompt: Any = "a man", **changes: Any) -> Tensor:
    call = {"generator": seeded(), "identity": person, **CALL, **changes}
    latents: Tensor = pipe(prompt, **call).images
    return latents


def close(one: Tensor, other: Tensor) -> bool:
    """Whether latents differ by rounding only."""
    return one.shape == other.shape and float((one - other).abs().max()) < 1e-4


def contexts(pipe: Any) -> tuple[list[Tensor], Callable[[], None]]:
    """Returns a list that gets what the UNet's cross-attention reads, and a function to stop."""
    states: list[Tensor] = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _module, _arguments, options: states.append(options["encoder_hidden_states"]),
        with_kwargs=True,
    )
    return states, hook.remove


def write_lora(stock: Any, folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    stock.unet.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(stock.unet))
    stock.save_lora_weights(folder, unet_lora_layers=state)

"""The reference's whole calls, SD1.5 and SDXL, on tiny parts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor

from infer.sampling import TextStates, denoise, guidance_states
from model.conditions import SECOND_PAD, Conditions, build_conditions, collate
from model.consistentid import (
    BaseModels,
    ConsistentID,
    Features,
    encode_frozen,
    encode_images,
    encode_text,
)
from model.prompt import tokenize_marked, without_marks
from stages.record import Record
from tests.golden.vectors import EXACT, LATENTS, PROJECTION_KEYS, Case, Golden, shapes


@dataclass(frozen=True, slots=True)
class Step:
    """What the UNet was given in a step; the unconditional branch is row 0, the prompt row 1.

    context: (2, 81, C). pooled (2, P), time_ids (2, 6): of SDXL.
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None


def tiny_models(
    golden: Golden, tokenizer: Any, tokenizer_2: Any = None, image_encoder: Any = None
) -> tuple[BaseModels, ConsistentID]:
    """Makes the tiny base model and the adapter, with the reference's weights.

    tokenizer: with marks. tokenizer_2: without marks, of SDXL. image_encoder: one of the same
    weights, if there is one already.
    """
    config = golden.config
    with init_empty_weights():  # initial weights would take seconds
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config["text_config"]))
        vision = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**config["vision_config"])
        )
        unet = diffusers.UNet2DConditionModel(**config["unet_config"])
        vae = diffusers.AutoencoderKL(**config["vae_config"])
        text_2 = tokenizer_2 and transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**config["text_2_config"])
        )
    base = BaseModels(
        tokenizer=tokenizer,
        text_encoder=golden.fill(text, "text_encoder.", "text_model."),
        vae=golden.fill(vae, "vae.", shared=True),
        unet=golden.fill(unet, "unet."),
        image_encoder=image_encoder
        or golden.fill(vision, "image_encoder.", "vision_model.", shared=True),
        scheduler=diffusers.EulerDiscreteScheduler(**config["e2e"]["scheduler"]),
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_2 and golden.fill(text_2, "text_encoder_2."),
    )
    with init_empty_weights():
        model = ConsistentID(golden.spec, base.unet, "legacy").eval()
    golden.fill(model.image_proj_model, "image_proj.")
    golden.fill(model.FacialEncoder, "facial_encoder.")
    golden.fill(model.adapter_modules, "adapter_modules.")
    return base, model


def check_sd15(golden: Golden, base: BaseModels, model: ConsistentID) -> Iterator[Case]:
    for part, module, root in (
        ("image_encoder", base.image_encoder, "vision_model."),
        ("text_encoder", base.text_encoder, "text_model."),
    ):
        keys = golden.config.get(f"{part}_keys")
        if keys is not None:
            old_keys = {
                key if key.startswith((root, *PROJECTION_KEYS)) else root + key
                for key in module.state_dict()
            }
            expected = {key for key in keys if not key.endswith("position_ids")}
            yield Case(f"keys.{part}", sorted(old_keys), sorted(expected))
    conditions = _conditions(golden, golden, base)
    batch = collate([conditions])
    yield golden.case("e2e.token_mask", batch.token_mask, EXACT)
    yield golden.case("e2e.valid_mask", batch.token_valid, EXACT)
    yield golden.case("e2e.facial_clip_mean", batch.region_pixels.mean((-1, -2)))

    features, negative, early = _texts(golden, base, conditions, without_marks(conditions.text))
    latents, steps = _sample(golden, base, model, features, negative, early)
    uncond, cond = steps[-1].context
    yield golden.case("e2e.clean_prompt", features.text_hidden)
    yield golden.case("e2e.negative", negative.hidden)
    yield golden.case("e2e.facial_cond", cond[None, :77])
    yield golden.case("e2e.facial_uncond", uncond[None, :77])
    yield golden.case("e2e.id_cond", cond[None, 77:])
    yield golden.case("e2e.id_uncond", uncond[None, 77:])
    yield golden.case("e2e.final_latents", latents, LATENTS, relative=True)


def check_sdxl(
    golden: Golden, photographs: Golden, base: BaseModels, model: ConsistentID
) -> Iterator[Case]:
    """photographs: the golden vectors that have photograph and label map."""
    config = golden.config
    yield Case(
        "xl.attn_processor_order", list(base.unet.attn_processors), config["attn_processor_order"]
    )
    for name in ("FacialEncoder", "image_proj_model", "adapter_modules"):
        yield Case(f"xl.keys.{name}", shapes(getattr(model, name)), config[f"{name}_keys"])
    yield Case("xl.keys.text_2", shapes(base.text_encoder_2), config["text_2_keys"])

    conditions = _conditions(golden, photographs, base)
    features, negative, early = _texts(golden, base, conditions, config["e2e"]["prompt"])
    latents, steps = _sample(golden, base, model, features, negative, early)
    yield golden.case("xl.e2e.clean_prompt", features.text_hidden)
    yield golden.case("xl.e2e.negative", negative.hidden)
    for phase, step in (("phase1", steps[0]), ("phase2", steps[3])):
        for name in ("context", "pooled", "time_ids"):
            yield golden.case(f"xl.e2e.{phase}.{name}", getattr(step, name))
    yield golden.case("xl.e2e.final_latents", latents, LATENTS, relative=True)


def _conditions(golden: Golden, photographs: Golden, base: BaseModels) -> Conditions:
    """Builds the conditions of the call."""
    call = golden.config["e2e"]
    identity = golden.tensor("face_id", 512)
    photo, labels = (
        photographs.answers[f"e2e.{name}"].numpy().repeat(4, 0).repeat(4, 1)
        for name in ("photo", "labels")
    )
    record = Record(
        key="0" * 20,
        source="golden",
        image=_png(photo),
        parsing=_png(labels),
        identity=(identity / identity.norm()).numpy(),
        width=photo.shape[1],
        height=photo.shape[0],
    )
    return build_conditions(
        record,
        base.tokenizer,
        replace(golden.spec, template=call["caption"]),
        "legacy",
        prompt=call["prompt"],
        resolution=photo.shape[0],
        tokenizer_2=base.tokenizer_2,
    )


def _png(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _texts(
    golden: Golden, base: BaseModels, conditions: Conditions, early: str
) -> tuple[Features, TextStates, TextStates]:
    """Returns the features of the facial prompt, and the states of the negative prompt and of
    `early`, the first phase's text.
    """
    states = []
    for text in (golden.config["e2e"]["negative_prompt"], early):
        ids, ids_2 = (
            torch.tensor([tokenize_marked(text, base.tokenizer, keep_eos=True, pad_id=pad).ids])
            for pad in (None, SECOND_PAD)
        )
        hidden, pooled = encode_text(base, ids, ids_2)
        states.append(TextStates(hidden=hidden, pooled=pooled))
    return encode_frozen(base, collate([conditions])), states[0], states[1]


def _sample(
    golden: Golden,
    base: BaseModels,
    model: ConsistentID,
    features: Features,
    negative: TextStates,
    early: TextStates,
) -> tuple[Tensor, list[Step]]:
    """Returns the final latents of the call, and what the UNet was given in each step."""
    call, size = golden.config["e2e"], golden.spec.vision_size
    steps: list[Step] = []

    def record_step(_unet: Any, _arguments: Any, options: dict[str, Any]) -> None:
        added = options["added_cond_kwargs"] or {}
        steps.append(
            Step(options["encoder_hidden_states"], added.get("text_embeds"), added.get("time_ids"))
        )

    guidance = guidance_states(
        model,
        features,
        early=early,
        negative=negative,
        zero_hidden=encode_images(base.image_encoder, torch.zeros(1, 3, size, size)),
    )
    shape = golden.answers[f"{golden.prefix}e2e.final_latents"].shape
    hook = base.unet.register_forward_pre_hook(record_step, with_kwargs=True)
    latents = denoise(
        base.unet,
        base.scheduler,
        guidance,
        golden.tensor(f"{golden.prefix}e2e.latents", *shape),
        steps=call["steps"],
        merge_step=call["start_merge_step"],
        guidance_scale=call["guidance_scale"],
        mode="legacy",
        vae_factor=call["vae_scale_factor"],
    )
    hook.remove()
    return latents, steps

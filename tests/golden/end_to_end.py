"""The reference's whole calls, SD1.5 and SDXL, on tiny parts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor

from configs.schema import DatasetConfig
from infer.adapter import Adapter
from infer.conditioning import plain_ids, text_states
from infer.identity import encode_photo
from infer.photo import PhotoReader
from infer.pipelines import ConsistentIDPipeline, ConsistentIDXLPipeline
from model.checkpoint import AdapterFile
from model.conditions import Conditions, build_conditions, collate
from model.consistentid import BaseModels, ConsistentID
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

    latents, steps = _run(golden, golden, base, model, ConsistentIDPipeline)
    uncond, cond = steps[-1].context
    clean_prompt, negative = _texts(golden, base, conditions)
    yield golden.case("e2e.clean_prompt", clean_prompt)
    yield golden.case("e2e.negative", negative)
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
    clean_prompt, negative = _texts(golden, base, conditions)
    yield golden.case("xl.e2e.clean_prompt", clean_prompt)
    yield golden.case("xl.e2e.negative", negative)
    latents, steps = _run(golden, photographs, base, model, ConsistentIDXLPipeline)
    for phase, step in (("phase1", steps[0]), ("phase2", steps[3])):
        for name in ("context", "pooled", "time_ids"):
            yield golden.case(f"xl.e2e.{phase}.{name}", getattr(step, name))
    yield golden.case("xl.e2e.final_latents", latents, LATENTS, relative=True)


def _record(golden: Golden, photographs: Golden) -> Record:
    """Returns the photograph's record. photographs: the golden vectors that have it."""
    identity = golden.tensor("face_id", 512)
    photo, labels = (
        photographs.answers[f"e2e.{name}"].numpy().repeat(4, 0).repeat(4, 1)
        for name in ("photo", "labels")
    )
    return Record(
        key="0" * 20,
        source="golden",
        image=_png(photo),
        parsing=_png(labels),
        identity=(identity / identity.norm()).numpy(),
        width=photo.shape[1],
        height=photo.shape[0],
    )


def _conditions(golden: Golden, photographs: Golden, base: BaseModels) -> Conditions:
    """Builds the conditions of the call."""
    record = _record(golden, photographs)
    return build_conditions(
        record,
        base.tokenizer,
        golden.spec,
        "legacy",
        prompt=golden.config["e2e"]["prompt"],
        resolution=record.height,
        tokenizer_2=base.tokenizer_2,
    )


def _png(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _texts(golden: Golden, base: BaseModels, conditions: Conditions) -> tuple[Tensor, Tensor]:
    """Returns the states of the facial prompt, before regions are fused, and of the negative
    prompt.
    """
    negative = plain_ids(golden.config["e2e"]["negative_prompt"], base.tokenizer)
    states = text_states(
        base,
        [(conditions.input_ids, conditions.input_ids_2), negative],
        torch.device("cpu"),
    )
    return states.hidden[:1], states.hidden[1:]


def _run(
    golden: Golden, photographs: Golden, base: BaseModels, model: ConsistentID, kind: Any
) -> tuple[Tensor, list[Step]]:
    """Returns the final latents of the call, and what the UNet was given in each step."""
    call, steps = golden.config["e2e"], []

    def record_step(_unet: Any, _arguments: Any, options: dict[str, Any]) -> None:
        added = options["added_cond_kwargs"] or {}
        steps.append(
            Step(options["encoder_hidden_states"], added.get("text_embeds"), added.get("time_ids"))
        )

    pipe = _pipeline(golden, base, model, kind)
    latents = golden.tensor(
        f"{golden.prefix}e2e.latents", *golden.answers[f"{golden.prefix}e2e.final_latents"].shape
    )
    person = encode_photo(
        _record(golden, photographs), base.image_encoder, golden.spec, "legacy", embedder=""
    )
    hook = base.unet.register_forward_pre_hook(record_step, with_kwargs=True)
    final = pipe(
        call["prompt"],
        negative_prompt=call["negative_prompt"],
        identity=person,
        latents=latents,
        height=latents.shape[2] * pipe.vae_scale_factor,
        width=latents.shape[3] * pipe.vae_scale_factor,
        num_inference_steps=call["steps"],
        start_merge_step=call["start_merge_step"],
        guidance_scale=call["guidance_scale"],
        output_type="latent",
    ).images
    hook.remove()
    return final, steps


def _pipeline(golden: Golden, base: BaseModels, model: ConsistentID, kind: Any) -> Any:
    """Makes the pipeline of `kind` from the models, with the adapter in it."""
    second = {} if base.tokenizer_2 is None else {"tokenizer_2": base.tokenizer_2}
    unused = {} if second else {"safety_checker": None, "requires_safety_checker": False}
    pipe = kind(
        **base.modules,
        **second,
        **unused,
        tokenizer=base.tokenizer,
        scheduler=base.scheduler,
        feature_extractor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    file = AdapterFile(
        source=golden.folder,
        state=model.state_dict(),
        spec=golden.spec,
        mode="legacy",
        embedder=None,
        config={},
    )
    Adapter(
        file,
        base.unet,
        PhotoReader(DatasetConfig(), golden.spec, "legacy"),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return pipe

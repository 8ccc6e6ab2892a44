"""Compares the model with the reference's answers: `python -m tests.golden.check FOLDER`.

FOLDER is any folder in the format of README.md. Seed, configurations, key lists, ranks and the
generator of weights are read from it. The output is a line for each case with its largest error;
the exit status is 1 if an error is above its tolerance.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from infer.sampling import TextStates, denoise, guidance_states
from model.attention import install_processors
from model.conditions import Conditions, build_conditions, collate
from model.consistentid import (
    BaseModels,
    ConsistentID,
    encode_frozen,
    encode_images,
    encode_text,
    predict_noise,
)
from model.facial_encoder import FacialEncoder
from model.losses import localisation_loss
from model.projector import IdentityProjector
from model.prompt import add_marks, mark_clauses, tokenize_marked, training_text, without_marks
from model.vocabulary import clip_tokenizer
from stages.backends.weights import Weights
from stages.record import Record
from stages.regions import filled_masks, foreground_mask, region_masks
from tests.golden.vectors import (
    EXACT,
    LATENTS,
    PROJECTION_KEYS,
    Case,
    Golden,
    shapes,
)


def check_projector(golden: Golden) -> Iterator[Case]:
    projector = golden.fill(IdentityProjector(golden.spec), "image_proj.")
    yield Case("keys.image_proj", shapes(projector), golden.config["image_proj_keys"])
    identity = golden.tensor("image_proj.id", 2, 512)
    clip = golden.tensor("image_proj.clip", 2, golden.image_tokens, golden.spec.vision_dim)
    yield golden.case("image_proj.out", projector(identity, clip, shortcut=False))
    yield golden.case(
        "image_proj.out_shortcut", projector(identity, clip, shortcut=True, scale=0.7)
    )


def check_facial_encoder(golden: Golden) -> Iterator[Case]:
    encoder = golden.fill(FacialEncoder(golden.spec), "facial_encoder.")
    yield Case("keys.facial_encoder", shapes(encoder), golden.config["facial_encoder_keys"])
    fused = encoder(
        golden.tensor("facial.prompt", 2, 77, golden.spec.cross_attention_dim),
        golden.tensor("facial.regions", 2, 5, golden.image_tokens, golden.spec.vision_dim),
        golden.answers["facial.token_mask"],
        golden.answers["facial.valid_mask"],
    )
    yield golden.case("facial.out", fused)


def check_unet(golden: Golden) -> Iterator[Case]:
    unet = golden.unet()
    yield Case(
        "attn_processor_order", list(unet.attn_processors), golden.config["attn_processor_order"]
    )
    adapter = golden.fill(install_processors(unet, golden.spec, "legacy"), "adapter_modules.")
    yield Case("keys.adapter_modules", shapes(adapter), golden.config["adapter_keys"])
    side = golden.config["unet_config"]["sample_size"]
    latents = golden.tensor("unet.latents", 2, 4, side, side)
    context = golden.tensor("unet.context", 2, 81, golden.spec.cross_attention_dim)
    timesteps = torch.tensor([7, 501])
    yield golden.case("unet.out", predict_noise(unet, latents, timesteps, context)[0])
    for processor in adapter:
        if hasattr(processor, "to_k_ip"):
            processor.scale = 0.4
    yield golden.case("unet.out_scale_0.4", predict_noise(unet, latents, timesteps, context)[0])


def check_losses(golden: Golden) -> Iterator[Case]:
    idx, valid = golden.answers["loss.idx"], golden.answers["loss.idx_mask"]
    masks = (golden.tensor("loss.segmaps", 2, 5, 32, 32) > 0.5).float()
    layers = []
    for name, pixels in (("loss.scores", 64), ("loss.scores_b", 256)):
        # (B, heads, pixels, 77)
        scores = golden.tensor(name, 8, pixels, 77).softmax(-1).unflatten(0, (2, 4))
        layers.append(scores.gather(-1, idx[:, None, None].expand(-1, 4, pixels, -1)))
    yield golden.case("loss.one_layer", localisation_loss(layers[:1], masks, valid))
    yield golden.case("loss.two_layers", localisation_loss(layers, masks, valid))


def check_masks(golden: Golden) -> Iterator[Case]:
    for entry in golden.config["regions"]:
        labels = golden.answers[f"mask.{entry['map']}.labels"].numpy()
        masks = filled_masks(labels)
        if (labels == 0).any():
            masks["WithoutBackground"] = foreground_mask(labels, "legacy")
        start = f"mask.{entry['map']}."
        names = {key.removeprefix(start) for key in golden.answers if key.startswith(start)}
        names.remove("labels")
        yield Case(f"{start}names", sorted(masks), sorted(names))
        for name in sorted(names & set(masks)):
            mask = torch.from_numpy(masks[name].astype(np.uint8) * 255)
            yield golden.case(start + name, mask, EXACT)
        yield Case(
            f"regions.{entry['map']}",
            list(region_masks(labels, "legacy")),
            entry["regions_in_order"],
        )


def check_texts(golden: Golden, tokenizer: Any) -> Iterator[Case]:
    for name, mark in (("facial_token_id", "<|facial|>"), ("image_token_id", "<|image|>")):
        yield Case(name, tokenizer.convert_tokens_to_ids(mark), golden.config[name])
    for number, entry in enumerate(golden.texts):
        regions = entry["regions_before"]
        marked = mark_clauses(entry["fine"], regions)
        text = training_text(
            entry["coarse"], entry["fine"], regions, tokenizer, golden.spec, "legacy"
        )
        tokens = tokenize_marked(text.text, tokenizer, keep_eos=False)
        missing = 5 - len(tokens.positions)
        outputs: dict[str, object] = {
            "marked": marked.text,
            "regions_after": list(marked.regions),
            "train_text": text.text,
            "clean_input_ids": list(tokens.ids),
            "facial_positions": list(tokens.positions),
            "facial_token_idx": [*tokens.positions, *[0] * missing],
            "facial_token_idx_mask": [*[1] * len(tokens.positions), *[0] * missing],
        }
        for name, output in outputs.items():
            yield Case(f"texts.{number}.{name}", output, entry[name])


def _base_models(golden: Golden, tokenizer: Any) -> BaseModels:
    """Makes the tiny base model with the reference's weights."""
    config = golden.config
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config["text_config"]))
    vision = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**config["vision_config"])
    )
    return BaseModels(
        tokenizer=tokenizer,
        text_encoder=golden.fill(text, "text_encoder.", "text_model."),
        vae=golden.fill(diffusers.AutoencoderKL(**config["vae_config"]), "vae."),
        unet=golden.unet(),
        image_encoder=golden.fill(vision, "image_encoder.", "vision_model."),
        scheduler=diffusers.EulerDiscreteScheduler(**config["e2e"]["scheduler"]),
    )


def _conditions(golden: Golden, tokenizer: Any) -> Conditions:
    """Builds the conditions of the end-to-end call."""
    call = golden.config["e2e"]
    identity = golden.tensor("face_id", 512)
    photo, labels = (
        golden.answers[f"e2e.{name}"].numpy().repeat(4, 0).repeat(4, 1)
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
    spec = replace(golden.spec, template=call["caption"])
    return build_conditions(
        record, tokenizer, spec, "legacy", prompt=call["prompt"], resolution=photo.shape[0]
    )


def _png(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def check_end_to_end(golden: Golden, tokenizer: Any) -> Iterator[Case]:
    call, base = golden.config["e2e"], _base_models(golden, tokenizer)
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
    model = ConsistentID(golden.spec, base.unet, "legacy").eval()
    golden.fill(model.image_proj_model, "image_proj.")
    golden.fill(model.FacialEncoder, "facial_encoder.")
    golden.fill(model.adapter_modules, "adapter_modules.")

    conditions = _conditions(golden, tokenizer)
    batch = collate([conditions])
    yield golden.case("e2e.token_mask", batch.token_mask, EXACT)
    yield golden.case("e2e.valid_mask", batch.token_valid, EXACT)
    yield golden.case("e2e.facial_clip_mean", batch.region_pixels.mean((-1, -2)))

    features = encode_frozen(base, batch)
    negative, early = (
        encode_text(base, torch.tensor([tokenize_marked(text, tokenizer, keep_eos=True).ids]))[0]
        for text in (call["negative_prompt"], without_marks(conditions.text))
    )
    size = golden.spec.vision_size
    guidance = guidance_states(
        model,
        features,
        early=TextStates(hidden=early),
        negative=TextStates(hidden=negative),
        zero_hidden=encode_images(base.image_encoder, torch.zeros(1, 3, size, size)),
    )
    yield golden.case("e2e.clean_prompt", features.text_hidden)
    yield golden.case("e2e.negative", negative)
    yield golden.case("e2e.facial_cond", guidance.late[:, :77])
    yield golden.case("e2e.facial_uncond", guidance.negative[:, :77])
    yield golden.case("e2e.id_cond", guidance.late[:, 77:])
    yield golden.case("e2e.id_uncond", guidance.negative[:, 77:])

    shape = golden.answers["e2e.final_latents"].shape
    latents = denoise(
        base.unet,
        base.scheduler,
        guidance,
        golden.tensor("e2e.latents", *shape),
        steps=call["steps"],
        merge_step=call["start_merge_step"],
        guidance_scale=call["guidance_scale"],
        mode="legacy",
    )
    yield golden.case("e2e.final_latents", latents, LATENTS, relative=True)


def all_cases(folder: Path, vocab: Path) -> Iterator[Case]:
    """Yields all comparisons, the fastest first."""
    golden = Golden(folder)
    tokenizer = add_marks(clip_tokenizer(vocab))
    with torch.no_grad():
        yield from check_masks(golden)
        yield from check_texts(golden, tokenizer)
        yield from check_losses(golden)
        yield from check_projector(golden)
        yield from check_facial_encoder(golden)
        yield from check_unet(golden)
        yield from check_end_to_end(golden, tokenizer)
    yield Case("answers not compared", sorted(set(golden.answers) - golden.compared), [])


def print_cases(cases: Iterable[Case]) -> int:
    """Prints a line for each case. Returns the exit status: 1 if any failed or there is none."""
    count, failed = 0, 0
    for case in cases:
        count, failed = count + 1, failed + (not case.ok)
        print(
            f"{'ok  ' if case.ok else 'FAIL'} {case.name:<32} error {case.error:.2e}  "
            f"tolerance {case.tolerance:.0e}"
        )
    print(f"{count - failed} of {count} cases within tolerance")
    return 1 if failed or not count else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden.check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="a folder of golden vectors, e.g. tests/golden")
    parser.add_argument(
        "--vocab", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz; downloaded by default"
    )
    options = parser.parse_args()
    return print_cases(all_cases(options.folder, options.vocab or Weights().fetch("clip_bpe")))


if __name__ == "__main__":
    sys.exit(main())

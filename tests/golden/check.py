"""Compare the model with the reference's answers: `python -m tests.golden.check DIR`.

DIR is any folder of the golden format (see README.md there); all that varies, seed, configurations,
key lists, ranks and the generator of weights, is read from it. Prints one line per case with its
largest error and exits 1 if any is over its tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

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
from model.spec import SPECS, ModelSpec
from model.vocabulary import clip_tokenizer
from stages.backends.weights import Weights
from stages.record import Record
from stages.regions import filled_masks, foreground_mask, region_masks

MODULES = 1e-4  # absolute, of modules in float32 on a CPU (README.md)
LATENTS = 1e-3  # of the final latents, relative to their mean magnitude
EXACT = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison; `error` is the largest absolute difference, or the number of entries that
    differ.
    """

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for nan


class Golden:
    """A folder of golden vectors."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "golden.json").read_text())
        self.texts: list[dict[str, Any]] = json.loads((folder / "texts.json").read_text())
        self.answers = load_file(folder / "golden.safetensors")
        self.compared = {name for name in self.answers if name.endswith(_INPUTS)}
        self.seed = int(self.config["seed"])
        self.maker = _module_at(folder / self.config.get("fill", "fill.py"))
        vision, unet = self.config["vision_config"], self.config["unet_config"]
        self.image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        self.spec: ModelSpec = replace(
            SPECS["sd15"],
            cross_attention_dim=unet["cross_attention_dim"],
            vision_dim=vision["hidden_size"],
            vision_size=vision["image_size"],
            lora_rank=self.config["lora_rank"],
        )

    def tensor(self, key: str, *shape: int) -> Tensor:
        made: Tensor = self.maker.tensor(key, shape, self.seed)
        return made

    @torch.no_grad()
    def fill(self, module: nn.Module, prefix: str, old_root: str = "") -> Any:
        """The module with the reference's weights. old_root: what keys began with in the releases
        that made them.
        """
        if not old_root:
            return self.maker.fill(module, self.seed, prefix).eval()
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                old = key if key.startswith(old_root) or key.startswith(_KEPT) else old_root + key
                value.copy_(self.maker.weight(prefix + old, tuple(value.shape), self.seed))
        return module.eval()

    def unet(self) -> Any:
        return self.fill(diffusers.UNet2DConditionModel(**self.config["unet_config"]), "unet.")

    def close(self, name: str, answer: Tensor, tolerance: float = MODULES) -> Case:
        self.compared.add(name)
        return Case(name, _largest(answer, self.answers[name]), tolerance)


_INPUTS = (
    ".labels",
    ".photo",
    "facial.token_mask",
    "facial.valid_mask",
    "loss.idx",
    "loss.idx_mask",
)
_KEPT = ("visual_projection.", "text_projection.")  # beside the renamed root, never below it


def _module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", path)
    if spec is None or spec.loader is None:
        raise SystemExit(
            f"{path} is no Python file; a golden folder carries its own generator of weights"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _largest(answer: Tensor, expected: Tensor) -> float:
    if answer.shape != expected.shape:
        return float("inf")
    return float((answer.double() - expected.double()).abs().max()) if answer.numel() else 0.0


def _same(name: str, answer: object, expected: object) -> Case:
    """Exact; the error is the number of differing entries of two sequences or mappings, else 0 or
    1.
    """
    if isinstance(answer, dict) and isinstance(expected, dict):
        return Case(
            name, float(sum(answer.get(k) != expected.get(k) for k in {*answer, *expected})), EXACT
        )
    if isinstance(answer, list) and isinstance(expected, list) and len(answer) == len(expected):
        return Case(name, float(sum(a != b for a, b in zip(answer, expected, strict=True))), EXACT)
    return Case(name, float(answer != expected), EXACT)


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def check_projector(golden: Golden) -> Iterator[Case]:
    projector = golden.fill(IdentityProjector(golden.spec), "image_proj.")
    yield _same("keys.image_proj", _shapes(projector), golden.config["image_proj_keys"])
    identity = golden.tensor("image_proj.id", 2, 512)
    clip = golden.tensor("image_proj.clip", 2, golden.image_tokens, golden.spec.vision_dim)
    yield golden.close("image_proj.out", projector(identity, clip, shortcut=False))
    yield golden.close(
        "image_proj.out_shortcut", projector(identity, clip, shortcut=True, scale=0.7)
    )


def check_facial_encoder(golden: Golden) -> Iterator[Case]:
    encoder = golden.fill(FacialEncoder(golden.spec), "facial_encoder.")
    yield _same("keys.facial_encoder", _shapes(encoder), golden.config["facial_encoder_keys"])
    answer = encoder(
        golden.tensor("facial.prompt", 2, 77, golden.spec.cross_attention_dim),
        golden.tensor("facial.regions", 2, 5, golden.image_tokens, golden.spec.vision_dim),
        golden.answers["facial.token_mask"],
        golden.answers["facial.valid_mask"],
    )
    yield golden.close("facial.out", answer)


def check_unet(golden: Golden) -> Iterator[Case]:
    unet = golden.unet()
    yield _same(
        "attn_processor_order", list(unet.attn_processors), golden.config["attn_processor_order"]
    )
    adapter = golden.fill(install_processors(unet, golden.spec, "legacy"), "adapter_modules.")
    yield _same("keys.adapter_modules", _shapes(adapter), golden.config["adapter_keys"])
    side = golden.config["unet_config"]["sample_size"]
    latents = golden.tensor("unet.latents", 2, 4, side, side)
    context = golden.tensor("unet.context", 2, 81, golden.spec.cross_attention_dim)
    timesteps = torch.tensor([7, 501])
    yield golden.close("unet.out", predict_noise(unet, latents, timesteps, context)[0])
    for processor in adapter:
        if hasattr(processor, "to_k_ip"):
            processor.scale = 0.4
    yield golden.close("unet.out_scale_0.4", predict_noise(unet, latents, timesteps, context)[0])


def check_losses(golden: Golden) -> Iterator[Case]:
    idx, valid = golden.answers["loss.idx"], golden.answers["loss.idx_mask"]
    masks = (golden.tensor("loss.segmaps", 2, 5, 32, 32) > 0.5).float()
    layers = []
    for name, pixels in (("loss.scores", 64), ("loss.scores_b", 256)):
        # (B, heads, pixels, 77)
        scores = golden.tensor(name, 8, pixels, 77).softmax(-1).unflatten(0, (2, 4))
        layers.append(scores.gather(-1, idx[:, None, None].expand(-1, 4, pixels, -1)))
    yield golden.close("loss.one_layer", localisation_loss(layers[:1], masks, valid))
    yield golden.close("loss.two_layers", localisation_loss(layers, masks, valid))


def check_masks(golden: Golden) -> Iterator[Case]:
    for entry in golden.config["regions"]:
        labels = golden.answers[f"mask.{entry['map']}.labels"].numpy()
        made = filled_masks(labels)
        if (labels == 0).any():
            made["WithoutBackground"] = foreground_mask(labels, "legacy")
        start = f"mask.{entry['map']}."
        wanted = {key.removeprefix(start) for key in golden.answers if key.startswith(start)} - {
            "labels"
        }
        yield _same(f"{start}names", sorted(made), sorted(wanted))
        for name in sorted(wanted & set(made)):
            answer = torch.from_numpy(made[name].astype(np.uint8) * 255)
            yield golden.close(start + name, answer, EXACT)
        yield _same(
            f"regions.{entry['map']}",
            list(region_masks(labels, "legacy")),
            entry["regions_in_order"],
        )


def check_texts(golden: Golden, tokenizer: Any) -> Iterator[Case]:
    for name, mark in (("facial_token_id", "<|facial|>"), ("image_token_id", "<|image|>")):
        yield _same(name, tokenizer.convert_tokens_to_ids(mark), golden.config[name])
    for number, entry in enumerate(golden.texts):
        regions = entry["regions_before"]
        marked = mark_clauses(entry["fine"], regions)
        text = training_text(
            entry["coarse"], entry["fine"], regions, tokenizer, golden.spec, "legacy"
        )
        tokens = tokenize_marked(text.text, tokenizer, keep_eos=False)
        missing = 5 - len(tokens.positions)
        answers: dict[str, object] = {
            "marked": marked.text,
            "regions_after": list(marked.regions),
            "train_text": text.text,
            "clean_input_ids": list(tokens.ids),
            "facial_positions": list(tokens.positions),
            "facial_token_idx": [*tokens.positions, *[0] * missing],
            "facial_token_idx_mask": [*[1] * len(tokens.positions), *[0] * missing],
        }
        for name, answer in answers.items():
            yield _same(f"texts.{number}.{name}", answer, entry[name])


def _tiny_parts(golden: Golden, tokenizer: Any) -> BaseModels:
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
    call, base = golden.config["e2e"], _tiny_parts(golden, tokenizer)
    for part, module, root in (
        ("image_encoder", base.image_encoder, "vision_model."),
        ("text_encoder", base.text_encoder, "text_model."),
    ):
        if f"{part}_keys" in golden.config:
            names = {
                key if key.startswith((root, *_KEPT)) else root + key for key in module.state_dict()
            }
            listed = {
                key for key in golden.config[f"{part}_keys"] if not key.endswith("position_ids")
            }
            yield _same(f"keys.{part}", sorted(names), sorted(listed))
    model = ConsistentID(golden.spec, base.unet, "legacy").eval()
    golden.fill(model.image_proj_model, "image_proj.")
    golden.fill(model.FacialEncoder, "facial_encoder.")
    golden.fill(model.adapter_modules, "adapter_modules.")

    conditions = _conditions(golden, tokenizer)
    batch = collate([conditions])
    yield golden.close("e2e.token_mask", batch.token_mask, EXACT)
    yield golden.close("e2e.valid_mask", batch.token_valid, EXACT)
    yield golden.close("e2e.facial_clip_mean", batch.region_pixels.mean((-1, -2)))

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
    yield golden.close("e2e.clean_prompt", features.text_hidden)
    yield golden.close("e2e.negative", negative)
    yield golden.close("e2e.facial_cond", guidance.late[:, :77])
    yield golden.close("e2e.facial_uncond", guidance.negative[:, :77])
    yield golden.close("e2e.id_cond", guidance.late[:, 77:])
    yield golden.close("e2e.id_uncond", guidance.negative[:, 77:])

    golden.compared.add("e2e.final_latents")
    final = golden.answers["e2e.final_latents"]
    latents = denoise(
        base.unet,
        base.scheduler,
        guidance,
        golden.tensor("e2e.latents", *final.shape),
        steps=call["steps"],
        merge_step=call["start_merge_step"],
        guidance_scale=call["guidance_scale"],
        mode="legacy",
    )
    yield Case("e2e.final_latents", _largest(latents, final) / float(final.abs().mean()), LATENTS)


def all_cases(folder: Path, vocab: Path) -> Iterator[Case]:
    """Every comparison that the folder allows, cheapest first."""
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
    yield _same("answers left out", sorted(set(golden.answers) - golden.compared), [])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden.check", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "folder", type=Path, help="a folder of the golden format, e.g. tests/golden"
    )
    parser.add_argument(
        "--vocab", type=Path, help="CLIP's bpe_simple_vocab_16e6.txt.gz; fetched if not given"
    )
    options = parser.parse_args(arguments)
    vocab = options.vocab
    if vocab is None:
        vocab = Weights().fetch("clip_bpe")
    cases, bad = 0, 0
    for case in all_cases(options.folder, vocab):
        cases, bad = cases + 1, bad + (not case.ok)
        print(
            f"{'ok  ' if case.ok else 'FAIL'} {case.name:<32} error {case.error:.2e}  tolerance "
            f"{case.tolerance:.0e}"
        )
    print(f"{cases - bad} of {cases} cases within tolerance")
    return 1 if bad or not cases else 0


if __name__ == "__main__":
    sys.exit(main())

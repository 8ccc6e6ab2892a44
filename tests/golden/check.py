"""Compares the model with the reference's answers: `python -m tests.golden.check FOLDER`.

FOLDER is any folder in the format of README.md. Seed, configurations, key lists, ranks and the
generator of weights are read from it. The output is a line for each case with its largest error;
the exit status is 1 if an error is above its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.consistentid import ConsistentID, predict_noise
from model.facial_encoder import FacialEncoder
from model.losses import localisation_loss
from model.projector import IdentityProjector
from model.prompt import add_marks, mark_clauses, tokenize_marked, training_text
from model.vocabulary import clip_tokenizer
from stages.backends.weights import Weights
from stages.regions import filled_masks, foreground_mask, region_masks
from tests.golden.end_to_end import check_sd15, check_sdxl, tiny_models
from tests.golden.vectors import EXACT, Case, Golden, shapes


def check_projector(golden: Golden, projector: IdentityProjector) -> Iterator[Case]:
    yield Case("keys.image_proj", shapes(projector), golden.config["image_proj_keys"])
    identity = golden.tensor("image_proj.id", 2, 512)
    clip = golden.tensor("image_proj.clip", 2, golden.image_tokens, golden.spec.vision_dim)
    yield golden.case("image_proj.out", projector(identity, clip, shortcut=False))
    yield golden.case(
        "image_proj.out_shortcut", projector(identity, clip, shortcut=True, scale=0.7)
    )


def check_facial_encoder(golden: Golden, encoder: FacialEncoder) -> Iterator[Case]:
    yield Case("keys.facial_encoder", shapes(encoder), golden.config["facial_encoder_keys"])
    fused = encoder(
        golden.tensor("facial.prompt", 2, 77, golden.spec.cross_attention_dim),
        golden.tensor("facial.regions", 2, 5, golden.image_tokens, golden.spec.vision_dim),
        golden.answers["facial.token_mask"],
        golden.answers["facial.valid_mask"],
    )
    yield golden.case("facial.out", fused)


def check_unet(golden: Golden, unet: Any, model: ConsistentID) -> Iterator[Case]:
    yield Case(
        "attn_processor_order", list(unet.attn_processors), golden.config["attn_processor_order"]
    )
    yield Case("keys.adapter_modules", shapes(model.adapter_modules), golden.config["adapter_keys"])
    side = golden.config["unet_config"]["sample_size"]
    latents = golden.tensor("unet.latents", 2, 4, side, side)
    context = golden.tensor("unet.context", 2, 81, golden.spec.cross_attention_dim)
    timesteps = torch.tensor([7, 501])
    for name, scale in (("unet.out_scale_0.4", 0.4), ("unet.out", 1.0)):
        model.set_scale(scale)
        yield golden.case(name, predict_noise(unet, latents, timesteps, context)[0])


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
    texts = json.loads((golden.folder / "texts.json").read_text())
    for number, entry in enumerate(texts):
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


def all_cases(folder: Path, vocab: Path) -> Iterator[Case]:
    """Yields all comparisons, the fastest first."""
    golden, sdxl = Golden(folder), Golden(folder, "sdxl")
    tokenizer = add_marks(clip_tokenizer(vocab))
    with torch.no_grad():
        yield from check_masks(golden)
        yield from check_texts(golden, tokenizer)
        yield from check_losses(golden)
        base, model = tiny_models(golden, tokenizer)
        yield from check_projector(golden, model.image_proj_model)
        yield from check_facial_encoder(golden, model.FacialEncoder)
        yield from check_unet(golden, base.unet, model)
        yield from check_sd15(golden, base, model)
        base, model = tiny_models(sdxl, tokenizer, clip_tokenizer(vocab), base.image_encoder)
        yield from check_sdxl(sdxl, golden, base, model)
    for each in (golden, sdxl):
        missing = sorted(set(each.answers) - each.compared)
        yield Case(f"{each.prefix}answers not compared", missing, [])


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

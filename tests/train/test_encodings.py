"""Encoder outputs that stay in memory: the same for a sample in every batch, and after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from tests.train.helpers import Parts, run, same, small, weights
from train.encodings import Encodings
from train.mixture import Mixture
from train.replay import replay
from train.step import frozen_features, noised_latents


def test_each_named_input_is_encoded_once_and_alone() -> None:
    sizes: list[int] = []

    def encode(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return inputs + 1

    encodings = Encodings(encode, limit=2)
    inputs = torch.arange(4.0)[:, None]
    for _ in range(2):
        torch.testing.assert_close(encodings(("a", None, "b", "c"), inputs), inputs + 1)
    assert sizes == [1] * 6  # the unnamed one, and c, for which there was no room, twice
    sizes.clear()
    torch.testing.assert_close(Encodings(encode)(("a", "b"), inputs[:2]), inputs[:2] + 1)
    assert sizes == [2]


def test_a_kept_sample_has_the_same_features_in_every_batch(
    data: Path, tiny_base: Path, tmp_path: Path, mixture: Mixture
) -> None:
    remembering = Parts(small(data, tiny_base, tmp_path, keep_features=8), mixture)
    plain = Parts(small(data, tiny_base, tmp_path), mixture)
    batch = remembering.make(range(4))
    for name in ("text_hidden", "clip_hidden", "region_hidden"):
        torch.testing.assert_close(
            getattr(frozen_features(remembering.frozen, batch), name),
            getattr(frozen_features(plain.frozen, batch), name),
            rtol=1e-4,
            atol=1e-5,
        )
    for one, other in zip(
        noised_latents(remembering.frozen, batch), noised_latents(plain.frozen, batch), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    alone = remembering.make(range(2, 3))
    remembering.frozen.base.vae.apply(_broken)
    remembering.frozen.base.image_encoder.apply(_broken)
    remembering.frozen.base.text_encoder.apply(_broken)  # nothing goes through them again
    for name in ("text_hidden", "region_hidden"):
        assert torch.equal(
            getattr(frozen_features(remembering.frozen, batch), name)[2:3],
            getattr(frozen_features(remembering.frozen, alone), name),
        )
    assert torch.equal(
        noised_latents(remembering.frozen, batch)[0][2:3],
        noised_latents(remembering.frozen, alone)[0],
    )


def _broken(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.fill_(float("nan"))


def test_a_blank_sample_is_not_kept(
    damaged: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from configs.training import DataSource

    mixtures = [Mixture((DataSource(path=str(folder)),)) for folder in (damaged, data)]
    faulty, whole = (Parts(small(data, tiny_base, tmp_path, keep_features=8), m) for m in mixtures)
    positions = range(8)
    batch = faulty.make(positions)
    bad = [*batch.valid].index(torch.tensor(False))
    noised_latents(faulty.frozen, batch)
    assert batch.pixel_names[bad] is None and batch.pixel_names.count(None) == 1
    again = whole.make(positions)  # the file can be read again
    expected = noised_latents(whole.frozen, again)[0]
    assert torch.equal(noised_latents(faulty.frozen, again)[0], expected)


def test_a_resumed_run_has_the_same_bits(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    config = small(data, tiny_base, tmp_path / "whole", keep_features=8, max_train_steps=8)
    # the same learning rates, whatever the number of steps
    config = replace(config, optim=replace(config.optim, lr_scheduler="constant"))
    whole = run(config)
    halves = replace(config, output=str(tmp_path / "halves"))
    run(replace(halves, max_train_steps=4))
    resumed = run(halves)
    assert whole.adapter and resumed.adapter
    assert same(weights(whole.adapter), weights(resumed.adapter))
    assert replay(tmp_path / "halves", 5).equal
    with pytest.raises(ConfigError, match="keep_features"):
        run(replace(halves, keep_features=0, max_train_steps=10))

"""Buckets of aspect ratios: which sample is in which, steps of one shape, and exact resumes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.errors import ConfigError
from configs.load import dump
from configs.training import FeaturesConfig, LossConfig, TrainConfig, ValidationConfig
from model.pixels import Size, size_condition, training_image
from model.spec import SPECS
from stages.record import Record
from tests.train.helpers import (
    Listener,
    Parts,
    Steps,
    hold_out,
    keys,
    run,
    same,
    small,
    sources,
    weights,
    with_people,
)
from train.batch_maker import BatchMaker
from train.buckets import BucketOrder, Buckets, bucket_sizes, chosen_buckets, in_buckets
from train.dry_run import dry_run
from train.features.make import make_features
from train.history import read_lines
from train.mixture import Mixture, open_mixture
from train.replay import replay
from train.seen import seen
from train.segments import read_segments
from train.setup import make_buckets, make_preparation

SIZES = bucket_sizes(512, 64)
SHAPES = {(24, 40), (32, 32), (40, 24)}


def bucketed(data: Path, base: Path, output: Path, **changes: Any) -> TrainConfig:
    return small(data, base, output, **{"buckets": True, "split": "all", **changes})


def pixels_of(*sizes: Size) -> list[tuple[Any, Any]]:
    """Widths and heights of one data set."""
    return [(np.array([w for w, _ in sizes], np.int32), np.array([h for _, h in sizes], np.int32))]


def many(counts: Sequence[int], batch: int, seed: int = 3) -> tuple[Buckets, BucketOrder]:
    """Samples of a data set, `counts` of each size of SIZES, mixed; and their order."""
    sizes = [size for size, count in zip(SIZES, counts, strict=True) for _ in range(count)]
    mixed = np.random.default_rng(1).permutation(len(sizes))
    buckets = chosen_buckets(pixels_of(*(sizes[i] for i in mixed)), [10_000], SIZES, batch)
    return buckets, BucketOrder(buckets, [len(sizes)], [10_000], seed)


def test_buckets_have_sides_that_fit_the_base_and_at_most_the_pixels_of_the_square() -> None:
    assert [
        *((256, 1024), (320, 768), (384, 640), (448, 576), (512, 512)),
        *((576, 448), (640, 384), (768, 320), (1024, 256)),
    ] == SIZES
    for resolution, multiple in ((32, 8), (64, 64), (512, 64), (768, 64), (1024, 64), (1024, 8)):
        sizes = bucket_sizes(resolution, multiple)
        assert (resolution, resolution) in sizes
        for width, height in sizes:
            assert width % multiple == height % multiple == 0 and (height, width) in sizes
            # less than one more multiple would fit, unless the bucket is the narrowest
            longest = (max(width, height) + multiple) * min(width, height)
            assert width * height <= resolution**2
            assert longest > resolution**2 or max(width, height) == 2 * resolution
    assert {(832, 1216), (896, 1152), (768, 1344)} < {*bucket_sizes(1024, 64)}


def test_each_sample_is_in_the_bucket_with_the_nearest_aspect_ratio() -> None:
    random = np.random.default_rng(2)
    images = [(int(w), int(h)) for w, h in random.integers(100, 3_000, (500, 2))]
    images += [(1, 30_000), (30_000, 1), (512, 512), *SIZES]
    buckets = in_buckets(pixels_of(*images), SIZES, 16)
    for number, (width, height) in enumerate(images):
        distances = [abs(np.log(width / height * h / w)) for w, h in SIZES]
        assert distances[buckets.of[number]] == pytest.approx(min(distances), abs=1e-9)
        assert buckets.size(number) == SIZES[buckets.of[number]]
    assert buckets.size(500) == (256, 1024) and buckets.size(501) == (1024, 256)
    # halfway between both: the narrower one, on every machine
    assert in_buckets(pixels_of((512, 512)), [(448, 576), (576, 448)], 1).of.tolist() == [0]


def test_a_bucket_with_too_few_samples_for_a_step_leaves_them_to_the_nearest() -> None:
    buckets, _ = many((0, 3, 40, 0, 100, 15, 16, 0, 1), 16)
    # first the one of 1024×256 to 640×384, then those of 320×768 and 576×448
    assert buckets.sizes == ((384, 640), (512, 512), (640, 384))
    assert np.bincount(buckets.of).tolist() == [43, 115, 17]
    assert str(buckets).endswith("384×640: 43, 512×512: 115, 640×384: 17")
    assert many((0, 0, 0, 0, 3, 2, 0, 0, 0), 5)[0].sizes == ((512, 512),)


def test_with_weights_a_step_has_no_sample_twice_either() -> None:
    # the second data set is read ten times as often: its one wide sample would fill a step
    one, two = (
        pixels_of(*[(512, 512)] * 90, *[(640, 384)] * 10)[0],
        (
            np.array([512] * 9 + [640]),
            np.array([512] * 9 + [384]),
        ),
    )
    assert len(chosen_buckets([one, two], [9_091, 909], SIZES, 8).sizes) == 2
    assert len(chosen_buckets([one, two], [5_000, 5_000], SIZES, 8).sizes) == 1
    buckets = chosen_buckets([one, two], [5_000, 5_000], SIZES, 2)
    order = BucketOrder(buckets, [100, 10], [5_000, 5_000], 3)
    uses = Counter(order.sample(position) for position in range(40_000))
    # every second position has a sample of the second data set
    assert sum(uses[number] for number in range(100, 110)) == pytest.approx(20_000, rel=0.01)
    for number in range(110):
        expected = 20_000 / (100 if number < 100 else 10)
        assert uses[number] == pytest.approx(expected, rel=0.05), number


def test_every_step_is_of_one_bucket_and_every_bucket_is_read_in_epochs() -> None:
    buckets, order = many((0, 0, 37, 16, 90, 0, 21, 0, 0), 16)
    assert len(buckets.sizes) == 4
    steps = [[order.sample(16 * step + place) for place in range(16)] for step in range(1_000)]
    sequences: dict[int, list[int]] = {}
    for samples in steps:
        [bucket] = {int(buckets.of[number]) for number in samples}
        sequences.setdefault(bucket, []).extend(samples)
    for bucket, sequence in sequences.items():
        own = np.flatnonzero(buckets.of == bucket).tolist()
        size = len(own)
        epochs = [sequence[at : at + size] for at in range(0, len(sequence) - size, size)]
        assert all(sorted(epoch) == own for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 2  # in another order
        # its share of all positions is that of its samples, up to a step of it
        assert len(sequence) == pytest.approx(16_000 * size / 164, abs=32)
    # and in a short run too
    counts = Counter(int(buckets.of[samples[0]]) for samples in steps[:41])
    expected = {i: 41 * 16 / 164 * n / 16 for i, n in enumerate(np.bincount(buckets.of))}
    assert all(abs(counts[bucket] - expected[bucket]) <= 1 for bucket in expected)
    other = many((0, 0, 37, 16, 90, 0, 21, 0, 0), 16, seed=4)[1]
    assert [other.sample(16 * step) for step in range(41)] != [each[0] for each in steps[:41]]


@pytest.mark.parametrize("end", [1, 47, 3_000])
def test_the_positions_of_a_sample_are_those_at_which_it_is_used(end: int) -> None:
    _, order = many((0, 3, 0, 16, 9, 0, 5, 0, 0), 3)
    numbers = [order.sample(position) for position in range(end)]
    for number in range(33):
        expected = [position for position, used in enumerate(numbers) if used == number]
        assert sorted(order.positions(number, end)) == expected


def test_images_in_buckets_are_cropped_less(shaped: Path) -> None:
    mixture = Mixture(sources(shaped))
    sizes = bucket_sizes(32, 8)
    buckets = mixture.buckets(sizes, 2)
    assert {*buckets.sizes} == SHAPES
    shares = dict.fromkeys(("square", "bucket"), 0.0)
    for number, record in enumerate(mixture.records(range(8))):
        assert isinstance(record, Record)
        size = buckets.size(number)
        for name, shape in (("square", (32, 32)), ("bucket", size)):
            width, height = shape
            assert training_image(record, shape).shape == (3, height, width)
            scale = max(width / record.width, height / record.height)
            shares[name] += width * height / (record.width * record.height * scale**2) / 8
            # what is cropped is stated to SDXL, too
            top, left = size_condition(record, shape, "corrected")[2:4].tolist()
            assert 2 * top == pytest.approx(record.height * scale - height, abs=2)
            assert 2 * left == pytest.approx(record.width * scale - width, abs=2)
            assert size_condition(record, shape, "corrected")[4:].tolist() == [height, width]
    # six of eight lost three eighths
    assert shares["square"] == pytest.approx(1 - 6 / 8 * 3 / 8, abs=0.01)
    assert shares["bucket"] > 0.96


def test_images_masks_and_noise_of_a_batch_have_the_shape_of_its_bucket(
    shaped: Path, tiny_base: Path, tmp_path: Path
) -> None:
    shown = LossConfig(drop_text=0, drop_identity=0, drop_both=0)
    config = bucketed(shaped, tiny_base, tmp_path, loss=shown)
    mixture = open_mixture(config)
    parts = Parts(config, mixture)
    buckets = make_buckets(config, mixture, parts.frozen.base)
    assert buckets is not None
    parts.preparation = make_preparation(config, SPECS["tiny"], parts.frozen, buckets)
    order = mixture.order(config.seed, buckets)
    parts.maker = BatchMaker(mixture, order, parts.preparation)
    shapes = set()
    for step in range(8):
        batch = parts.make(range(2 * step, 2 * step + 2))
        width, height = buckets.size(order.sample(2 * step))
        shapes.add((width, height))
        assert batch.pixels.shape == (2, 3, height, width)
        assert batch.region_masks.shape == (2, 5, height, width)
        assert batch.foreground.shape == (2, height, width)
        assert batch.noise.shape == batch.latent_noise.shape == (2, 4, height // 4, width // 4)
        assert batch.foreground.any() and batch.region_masks.any()
    assert shapes == SHAPES
    # one that can't be read is blank, in the shape of its bucket
    blank = parts.maker._blank(0, bad=0, reason="damaged")
    width, height = buckets.size(0)
    assert blank.pixels.shape == (3, height, width) and blank.conditions.masks.shape == (
        height,
        width,
    )


def steps_of(output: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Step and keys of each step, as they were read."""
    lines = read_lines(output / "keys.jsonl")
    return [(line["step"], tuple(line["keys"])) for line in lines]


@pytest.fixture(scope="module")
def straight(shaped: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ten uninterrupted steps with buckets."""
    output = tmp_path_factory.mktemp("buckets") / "straight"
    listener = Listener()
    config = bucketed(shaped, tiny_base, output, log_keys=True, checkpointing_steps=4)
    assert run(config, listener).step == 10
    line = next(text for text in listener.messages if text.startswith("samples in buckets"))
    assert line == "samples in buckets of width × height: 24×40: 3, 32×32: 2, 40×24: 3"
    return output


def test_a_resumed_run_sees_the_same_batches_and_has_the_same_weights(
    straight: Path, shaped: Path, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(straight / "checkpoint-000004", output / "checkpoint-000004")
    config = bucketed(shaped, tiny_base, output, log_keys=True, num_workers=2, keep_samples=0)
    listener = Listener()
    resumed = run(config, listener)
    assert "at step 4" in " ".join(listener.messages) and resumed.adapter is not None
    assert same(weights(straight / "final"), weights(resumed.adapter))
    assert steps_of(straight)[4:] == steps_of(output) and len(steps_of(output)) == 6
    losses = [[*read_lines(each / "losses.jsonl")] for each in (straight, output)]
    assert losses[0][4:] == losses[1][-6:]


def test_a_step_of_several_micro_batches_is_the_same_step(
    straight: Path, shaped: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run(bucketed(shaped, tiny_base, tmp_path, log_keys=True, micro_batch_size=1))
    assert steps_of(tmp_path) == steps_of(straight)
    for one, other in zip(
        read_lines(straight / "losses.jsonl"), read_lines(tmp_path / "losses.jsonl"), strict=True
    ):
        assert one["noise_loss"] == pytest.approx(other["noise_loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_train_on_the_steps_of_one(
    straight: Path, shaped: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "two"
    dump(bucketed(shaped, tiny_base, output, log_keys=True), tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "train.cli", "run", "--config", str(tmp_path / "config.yaml")]
    subprocess.run([*command, "max_train_steps=6", "model.device=auto"], check=True)
    assert steps_of(output) == steps_of(straight)[:6]
    # one process computes what the two did, to the last bit
    assert replay(output, 4).after_step == 0 and replay(output, 1).equal
    # and continues their run
    config = bucketed(shaped, tiny_base, output, log_keys=True)
    run(config)
    assert steps_of(output) == steps_of(straight)


def test_replay_and_seen_know_the_buckets(straight: Path, shaped: Path, tmp_path: Path) -> None:
    [segment] = read_segments(straight)
    assert {tuple(size) for size in segment.buckets} == SHAPES
    result = replay(straight, 5, images=tmp_path)
    assert result.equal and result.after_step == 4
    [shape] = {Image.open(path).size for path in tmp_path.iterdir()}
    assert shape in SHAPES and len([*tmp_path.iterdir()]) == 2
    names = keys(Mixture(sources(shaped)))
    uses = {key: [use.step for use in each] for key, each in seen(straight, names).uses.items()}
    for step, used in steps_of(straight):
        assert {key for key, steps in uses.items() if step in steps} == {*used}


def test_a_step_of_another_size_begins_where_one_may(
    straight: Path, shaped: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = bucketed(
        shaped,
        tiny_base,
        tmp_path,
        global_batch_size=3,
        micro_batch_size=3,
        log_keys=True,
        max_train_steps=8,
        resume_from_checkpoint=str(straight / "checkpoint-000004"),
        accept_changes=("global_batch_size",),
    )
    run(config)
    mixture = open_mixture(config)
    segment = read_segments(tmp_path)[-1]
    assert (segment.step, segment.position) == (4, 9)  # after eight samples
    pixels = [part.pixels() for part in mixture.parts]
    buckets = chosen_buckets(pixels, [10_000], bucket_sizes(32, 8), 3)
    assert segment.buckets == tuple(map(list, buckets.sizes)) and len(buckets.sizes) == 2
    for step, names in steps_of(tmp_path)[-4:]:
        numbers = [number for key in names for number in mixture.numbers(key)]
        assert len(numbers) == 3 and len({buckets.size(number) for number in numbers}) == 1
        assert step in [use.step for use in seen(tmp_path, names[:1]).uses[names[0]]]


def test_cached_features_of_square_images_are_not_read(
    straight: Path, shaped: Path, tiny_base: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(shaped, tmp_path / "data"))
    features = FeaturesConfig(kinds=("vae", "image"), dtype="float32")
    config = bucketed(data, tiny_base, tmp_path / "out", features=features, max_train_steps=4)
    with pytest.raises(ConfigError, match=r"buckets=true .* Leave vae out of features\.kinds"):
        make_features(config, Steps())
    make_features(replace(config, buckets=False), Steps())
    listener = Listener()
    run(config, listener)
    text = "\n".join(listener.messages)
    assert "features: vae isn't used, and is computed in each step: features of the kind" in text
    assert "features: image is read" in text
    expected = [*read_lines(straight / "losses.jsonl")][:4]
    for one, other in zip(expected, read_lines(tmp_path / "out/losses.jsonl"), strict=True):
        assert one["noise_loss"] == pytest.approx(other["noise_loss"], rel=1e-3)


@pytest.mark.thorough
def test_pairs_kept_features_validation_and_a_dry_run_work_with_buckets(
    shaped: Path, tiny_base: Path, tmp_path: Path
) -> None:
    data = hold_out(with_people(shaped, tmp_path / "data", "aaaaabca"), "b", "c")
    config = bucketed(
        data,
        tiny_base,
        tmp_path / "run",
        split="train",
        pair_prob=0.7,
        keep_features=8,
        max_train_steps=4,
        checkpointing_steps=2,
        validation_steps=4,
        validation=ValidationConfig(samples=2, portraits=2, num_inference_steps=2),
    )
    assert dry_run(config, Listener()).samples == 2 and not (tmp_path / "run").exists()
    whole = run(config)
    # of people in images of several shapes, in squares
    sheet = Image.open(tmp_path / "run/validation/000004.jpg")
    assert sheet.size == (3 * 32, 2 * 32)
    shutil.copytree(tmp_path / "run/checkpoint-000002", tmp_path / "again/checkpoint-000002")
    again = run(replace(config, output=str(tmp_path / "again"), validation_steps=0))
    assert whole.adapter is not None and again.adapter is not None
    assert same(weights(whole.adapter), weights(again.adapter))


def test_compiled_code_is_refused_with_buckets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compile=inductor: with buckets=true"):
        bucketed(tmp_path, tmp_path, tmp_path, compile="inductor")

"""Features: equal training with and without them, staleness, kills, and removed samples."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.load import load
from configs.schema import DatasetConfig
from configs.training import FeaturesConfig, TrainConfig
from pipelines.takedown import by_source, take_down
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.train.helpers import (
    Listener,
    Steps,
    keys,
    run,
    same,
    small,
    sources,
    weights,
    with_people,
)
from train.features.make import make_features
from train.history import read_lines
from train.replay import replay
from train.shards import ShardSet


def features(dtype: Any = "float32", **changes: Any) -> FeaturesConfig:
    return FeaturesConfig(kinds=("vae", "image"), dtype=dtype, **changes)


def make(config: TrainConfig) -> list[Path]:
    return [Path(folder) for folder in make_features(config, Steps())]


@pytest.fixture(scope="module")
def people(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of people with several photographs, without features."""
    return with_people(data, tmp_path_factory.mktemp("people") / "data", "abababcc")


@pytest.fixture
def own(people: Path, tmp_path: Path) -> Path:
    """A copy of it, which the test may change."""
    return Path(shutil.copytree(people, tmp_path / "data"))


def paired(data: Path, base: Path, output: Path, **changes: Any) -> TrainConfig:
    values = {"pair_prob": 0.5, "max_train_steps": 4, "log_every": 1, "features": features()}
    return small(data, base, output, **{**values, **changes})


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_lines(output / "losses.jsonl")]


def test_float32_features_give_the_bits_of_a_run_that_encodes_each_sample_alone(
    own: Path, people: Path, tiny_base: Path, tmp_path: Path
) -> None:
    uncached = run(paired(people, tiny_base, tmp_path / "uncached", keep_features=8))
    config = paired(own, tiny_base, tmp_path / "cached", num_workers=1)
    make(config)
    listener = Listener()
    cached = run(config, listener)
    for kind in ("vae", "image"):
        assert any(f"features: {kind} is read (float32" in text for text in listener.messages)
    assert losses(tmp_path / "cached") == losses(tmp_path / "uncached")
    assert uncached.adapter and cached.adapter
    assert same(weights(uncached.adapter), weights(cached.adapter))


def test_float16_features_give_nearly_the_same_losses(
    own: Path, people: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(own, tiny_base, tmp_path / "cached", features=features("float16"))
    make(config)
    run(config)
    run(paired(people, tiny_base, tmp_path / "uncached"))
    pairs = zip(losses(tmp_path / "cached"), losses(tmp_path / "uncached"), strict=True)
    for with_features, without in pairs:
        assert with_features == pytest.approx(without, rel=2e-3)
    assert losses(tmp_path / "cached") != losses(tmp_path / "uncached")


def test_the_encoders_of_features_that_are_read_take_no_memory_and_do_not_run(
    own: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from contextlib import ExitStack

    from train.trainer import Trainer

    config = paired(own, tiny_base, tmp_path / "cached")
    make(config)
    with ExitStack() as stack:
        trainer = Trainer(config, Listener(), stack)
        base = trainer.frozen.base
        for encoder in (base.vae, base.image_encoder):
            assert {p.device.type for p in encoder.parameters()} == {"meta"}
        batches = trainer._batches()
        batch = next(batches)
        batches.close()
    assert batch.moments is not None and batch.hidden is not None
    assert batch.pixels.numel() == batch.clip_images.numel() == 0


def test_features_hold_what_the_encoder_answers(own: Path, tiny_base: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    from model.pixels import training_pixels

    config = paired(own, tiny_base, tmp_path / "none")
    vae, _ = make(config)
    samples, stored = ShardSet(str(own)), ShardSet(str(vae))
    assert keys(stored) == keys(samples)
    model = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    for number, record in enumerate(samples.records(range(8))):
        members = stored.members([number])[0]
        assert isinstance(members, dict) and [*members] == ["npy"]
        stored_values = np.load(io.BytesIO(members["npy"]), allow_pickle=False)
        with torch.no_grad():
            pixels = training_pixels(record, 32)[None]  # type: ignore[arg-type]
            expected = model.encode(pixels).latent_dist.parameters[0]
        np.testing.assert_allclose(stored_values, expected.numpy(), atol=1e-5)


def test_features_that_do_not_fit_are_not_used_and_the_log_says_why(
    own: Path, people: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(own, tiny_base, tmp_path / "run", keep_features=8)
    make(config)
    larger, listener = replace(config, resolution=64, output=str(tmp_path / "large")), Listener()
    run(larger, listener)
    text = next(text for text in listener.messages if "vae isn't used" in text)
    assert "has resolution 32, this run needs 64" in text
    assert any("image is read" in text for text in listener.messages)

    listener = Listener()
    other = replace(config, features=features("float16"), output=str(tmp_path / "half"))
    run(other, listener)
    text = next(text for text in listener.messages if "vae isn't used" in text)
    assert "has dtype 'float32', this run needs 'float16'" in text

    # the VAE has other weights
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    file = next((base / "vae").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    listener = Listener()
    model = replace(config.model, base=str(base))
    run(replace(config, model=model, output=str(tmp_path / "other")), listener)
    assert "has encoder '" in next(t for t in listener.messages if "vae isn't used" in t)

    run(replace(config, features=features(use=False)))
    run(paired(people, tiny_base, tmp_path / "without", keep_features=8))
    assert losses(tmp_path / "run") == losses(tmp_path / "without")


def remove_a_sample(data: Path) -> str:
    """Takes down the first sample of a shard; returns its key."""
    store, settings = (
        Store(str(data)),
        load(DatasetConfig, data / "config.yaml", [f"output={data}"]),
    )
    record = next(DatasetReader(store).samples(1))
    take_down(store, settings, by_source(store, record.source), "source", "")
    return record.key


def test_features_of_a_shard_that_changed_are_removed_and_made_again(
    own: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(own, tiny_base, tmp_path / "run", pair_prob=0)
    folders = make(config)
    key = remove_a_sample(own)
    for folder in folders:
        assert not [*folder.glob("shards/fgid-000001.*")]
        assert not [p for p in folder.rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
    listener = Listener()
    run(config, listener)
    text = next(text for text in listener.messages if "vae isn't used" in text)
    assert "has no features of the present samples of 1 of 3 shards" in text

    before = {path: path.read_bytes() for path in folders[0].glob("shards/*")}
    assert make(config) == folders
    for path, content in before.items():
        assert path.read_bytes() == content
    listener = Listener()
    run(replace(config, output=str(tmp_path / "again")), listener)
    assert any("vae is read" in text for text in listener.messages)


def test_features_that_appear_during_a_run_are_refused_unless_they_are_accepted(
    own: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(own, tiny_base, tmp_path / "run", max_train_steps=2)
    run(config)
    make(config)
    more = replace(config, max_train_steps=4)
    with pytest.raises(ConfigError, match=r"features that were read: none, now vae-.*\[features\]"):
        run(more)
    assert run(replace(more, accept_changes=("features",))).step == 4
    # a replay reads them too
    answer = replay(tmp_path / "run", 3, images=tmp_path / "pictures")
    assert len([*(tmp_path / "pictures").iterdir()]) == 2
    assert answer.equal and not answer.notes
    # and not where the run didn't
    assert replay(tmp_path / "run", 1).equal


def test_a_damaged_feature_costs_its_sample_alone(
    own: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = paired(own, tiny_base, tmp_path / "run", pair_prob=0, max_bad_share=0.2)
    vae, _ = make(config)
    stored = ShardSet(str(vae))
    place = stored.place(2)
    with (vae / "shards" / place.tar).open("r+b") as tar:
        tar.seek(place.offset + place.size // 2)
        tar.write(b"spoiled")
    run(config)
    (line, *_) = read_lines(tmp_path / "run/skipped.jsonl")
    assert line["key"] == place.key and "not those written" in line["reason"]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns all files, of manifests what doesn't differ between equal runs."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in files:
        if name.startswith("shards/") and name.endswith(".json"):
            manifest = json.loads(files[name])
            del manifest["run"]
            files[name] = json.dumps(manifest).encode()
    return files


def test_a_killed_run_that_is_started_again_writes_the_same_bytes(
    own: Path, people: Path, tiny_base: Path, tmp_path: Path
) -> None:
    undisturbed = make(paired(own, tiny_base, tmp_path / "none"))
    other = Path(shutil.copytree(people, tmp_path / "other"))
    command = [
        *(sys.executable, "-m", "train.cli", "features", f"data={other}", "model.spec=tiny"),
        *(f"model.base={tiny_base}", "model.device=cpu", "resolution=32"),
        *("features.kinds=[vae,image]", "features.dtype=float32"),
    ]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while process.poll() is None and not [*other.glob("features/*/shards/*.json")]:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    shards = len([*other.glob("features/*/shards/*.json")])
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert 1 <= shards <= 6
    for folder in undisturbed:
        again = other / "features" / folder.name
        assert contents(again) == contents(folder)


def test_ray_writes_the_same_bytes(
    own: Path, people: Path, tiny_base: Path, tmp_path: Path
) -> None:
    inline = make(paired(own, tiny_base, tmp_path / "none"))
    other = Path(shutil.copytree(people, tmp_path / "other"))
    config = paired(other, tiny_base, tmp_path / "none", features=features(executor="ray"))
    for one, two in zip(inline, make(config), strict=True):
        assert contents(one) == contents(two)


def test_the_space_is_said_first_and_refused_if_there_is_too_little(
    own: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, listener = paired(own, tiny_base, tmp_path / "none"), Steps()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"the features need .* and the disk has 0 B free"):
            make_features(config, listener)
    assert "features: vae of 8 samples take up to" in listener.messages[0]
    with pytest.raises(ConfigError, match=r"Set model\.base"):
        make_features(replace(config, model=replace(config.model, base="")), listener)
    with pytest.raises(ConfigError, match=r"no samples there"):
        make_features(replace(config, data=sources(tmp_path / "empty")), listener)

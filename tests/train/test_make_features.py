"""Making features: what they hold, and equal bytes after kills and on Ray."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from configs.errors import ConfigError
from configs.load import dump
from configs.training import TrainConfig
from model.conditions import build_conditions
from model.consistentid import encode_text, load_base
from model.pixels import training_pixels
from model.spec import SPECS
from tests.pipelines.sigkill import killed
from tests.train.featured import features, make, paired
from tests.train.helpers import Steps, keys, sources
from train.cli import app
from train.features.make import make_features
from train.shards import ShardSet

# The process that is killed is forked: importing torch anew would take seconds.
_FORKED = multiprocessing.get_context("fork")


@pytest.fixture
def own(people: Path, tmp_path: Path) -> Path:
    """A copy of the data set without features."""
    return Path(shutil.copytree(people, tmp_path / "data"))


def test_features_hold_what_the_encoders_answer(featured: Path, tiny_base: Path) -> None:
    base = load_base(SPECS["tiny"], tiny_base)
    vae, text = (next(featured.glob(f"features/{kind}-*")) for kind in ("vae", "text"))
    samples, moments, texts = (ShardSet(str(folder)) for folder in (featured, vae, text))
    assert keys(moments) == keys(texts) == keys(samples)
    for number, record in enumerate(samples.records(range(8))):
        values = []
        for stored in (moments, texts):
            members = stored.members([number])[0]
            assert isinstance(members, dict) and [*members] == ["npy"]
            values.append(np.load(io.BytesIO(members["npy"]), allow_pickle=False))
        with torch.no_grad():
            pixels = training_pixels(record, 32)[None]  # type: ignore[arg-type]
            expected = base.vae.encode(pixels).latent_dist.parameters[0]
        np.testing.assert_allclose(values[0], expected.numpy(), atol=1e-5)
        conditions = build_conditions(
            record,  # type: ignore[arg-type]
            base.tokenizer,
            SPECS["tiny"],
            "corrected",
            resolution=32,
        )
        np.testing.assert_array_equal(values[1]["ids"][0], conditions.input_ids.numpy())
        states, _ = encode_text(base, conditions.input_ids[None])
        np.testing.assert_allclose(values[1]["states"], states.flatten().numpy(), atol=1e-5)


def contents(data: Path) -> dict[str, bytes]:
    """Returns all files of features, of manifests what doesn't differ between equal runs."""
    top = data / "features"
    files = {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}
    for name in files:
        if "/shards/" in name and name.endswith(".json"):
            manifest = json.loads(files[name])
            del manifest["run"]
            files[name] = json.dumps(manifest).encode()
    return files


@pytest.mark.parametrize(
    "moment", [2, *(pytest.param(n, marks=pytest.mark.thorough) for n in (14, 40)), 63]
)
def test_a_killed_run_that_is_started_again_writes_the_same_bytes(
    featured: Path, own: Path, tiny_base: Path, tmp_path: Path, moment: int
) -> None:
    config = paired(own, tiny_base, tmp_path / "none")
    assert killed(moment, tmp_path / "errors", make, config, children=_FORKED)
    assert contents(own).keys() != contents(featured).keys()
    dump(config, tmp_path / "preset.yaml")
    result = CliRunner().invoke(app, ["features", "-c", str(tmp_path / "preset.yaml")])
    assert result.exit_code == 0, result.output
    assert contents(own) == contents(featured)


@pytest.mark.thorough
def test_ray_writes_the_same_bytes(
    featured: Path, own: Path, tiny_base: Path, tmp_path: Path
) -> None:
    chosen = ("image", "text")  # they read all parts of a record that any kind reads
    settings = features(executor="ray", kinds=chosen)
    make(paired(own, tiny_base, tmp_path / "none", features=settings))
    expected = contents(featured)
    assert contents(own) == {n: v for n, v in expected.items() if n.startswith(chosen)}


def space(config: TrainConfig, listener: Steps) -> None:
    with pytest.raises(ConfigError, match=r"the features need .* and the disk has 0 B free"):
        make_features(config, listener)


def test_the_space_is_said_first_and_refused_if_there_is_too_little(
    own: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, listener = paired(own, tiny_base, tmp_path / "none"), Steps()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
        space(config, listener)
        space(replace(config, features=features(kinds=("text",))), listener)
    assert "features: vae of 8 samples take up to" in listener.messages[0]
    # 77 tokens of 128 numbers, two times 77 ids, and 2,048 bytes for headers
    assert "text of 8 samples take up to 337 KB" in listener.messages[1]
    with pytest.raises(ConfigError, match=r"Set model\.base"):
        make_features(replace(config, model=replace(config.model, base="")), listener)
    with pytest.raises(ConfigError, match=r"no samples there"):
        make_features(replace(config, data=sources(tmp_path / "empty")), listener)

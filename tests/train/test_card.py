"""OUT/final/README.md: the model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.training import TrainedConfig
from tests.train.helpers import Listener, run, small
from train.card import CARD, _source
from train.shards import ShardSet


@pytest.fixture(scope="module")
def licensed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, whose first sample states a licence with markup in it."""
    copy = Path(shutil.copytree(data, tmp_path_factory.mktemp("licensed") / "faces"))
    key = ShardSet(str(copy)).key(0)
    for path in (copy / "shards").glob("*.parquet"):
        table = pq.read_table(path)
        place = table.column_names.index("license")
        stated = ["<b>CC|BY</b>" if row == key else "" for row in table.column("key").to_pylist()]
        table = table.set_column(place, table.schema.field(place), pa.array(stated))
        pq.write_table(table, path)
        manifest = path.with_suffix(".json")
        values = json.loads(manifest.read_text())
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        values["sidecar"] |= {"bytes": len(content), "sha256": digest}
        manifest.write_text(json.dumps(values))
    return copy


def test_it_says_what_was_trained_on_what(licensed: Path, tiny_base: Path, tmp_path: Path) -> None:
    parts = TrainedConfig(parts=("projector", "lora"))
    config = small(licensed, tiny_base, tmp_path / "ada", max_train_steps=2, train=parts)
    outcome = run(config)
    assert outcome.adapter is not None
    card = (outcome.adapter / CARD).read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    samples = ShardSet(str(licensed), "train")
    assert f"| data | {len(samples):,} samples, digest `{samples.digest[:12]}` |" in card
    assert "# ada\n" in card
    assert "projector (" in card and "lora (" in card and "facial_encoder" not in card
    assert r"\<b\>CC\|BY\</b\> (1)" in card
    assert "w600k\\_mbf.onnx: non-commercial research only" in card
    assert f"{outcome.summary['noise_loss']['end']:.4f}" in card
    assert "| base | a local one, " in card and "base_model:" not in card
    assert str(tmp_path) not in card and str(tiny_base) not in card


def test_licences_that_cannot_be_read_are_said_so_without_the_path(tmp_path: Path) -> None:
    text = _source(f"{tmp_path}/faces|", None)
    assert text == "**faces\\|**: its licences couldn't be read when the card was written."


def test_a_resumed_run_writes_the_same_card(data: Path, tiny_base: Path, tmp_path: Path) -> None:
    whole = small(data, tiny_base, tmp_path / "one" / "run", max_train_steps=4)
    halves = small(
        data, tiny_base, tmp_path / "two" / "run", max_train_steps=4, checkpointing_steps=2
    )
    run(whole)

    class StopError(Exception): ...

    def stop(step: int) -> None:
        if step == 3:
            raise StopError

    with pytest.raises(StopError):
        run(halves, Listener(stop))
    run(halves)
    cards = [(tmp_path / name / "run/final" / CARD).read_text() for name in ("one", "two")]
    assert cards[0] == cards[1]

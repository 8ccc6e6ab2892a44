"""A person is taken down: just the shards that hold them are written again, and nothing of them is
left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from configs.errors import FaceError, PipelineError
from pipelines.cli import app
from pipelines.ledger import read_ledger
from pipelines.lint import lint
from pipelines.run import plan_job, run
from pipelines.takedown import by_hash, by_photo, by_source, digest_of, take_down
from stages.codec import Image
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import (
    NO_COPIES,
    NO_RULES,
    config,
    count_model_calls,
    new_captions,
    rows_of,
    stamps,
)

ALL = (*NO_COPIES, *NO_RULES, "shard_size=2", "parse.size=320")  # no label map matters here
PERSON = "portrait-7-00003"


def edits(picture: Image) -> dict[str, Image]:
    """Five pictures of one person."""
    side = picture.shape[0]
    return {
        "plain": picture,
        "mirrored": np.ascontiguousarray(picture[:, ::-1]),
        "darker": np.asarray(picture * 0.7, np.uint8),
        "cropped": np.ascontiguousarray(
            picture[side // 20 : -side // 20, side // 20 : -side // 20]
        ),
        "smaller": np.asarray(
            cv2.resize(picture, (side // 2, side // 2), interpolation=cv2.INTER_AREA), np.uint8
        ),
    }


@pytest.fixture(scope="module")
def photos(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 pictures of five people, in an order that spreads each person over several shards."""
    folder = tmp_path_factory.mktemp("people")
    for path in sorted(portraits.iterdir())[:5]:
        picture = cv2.imread(str(path))
        assert picture is not None
        for name, edited in edits(np.asarray(picture, np.uint8)).items():
            cv2.imwrite(
                str(folder / f"{name} {path.stem}.jpg"), edited, [cv2.IMWRITE_JPEG_QUALITY, 92]
            )
    return folder


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("takedown") / "out"
    run(config(photos, output, *ALL))
    return output


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_a_person_is_gone_from_just_the_shards_that_held_them(
    photos: Path, portraits: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, settings = Store(str(output)), config(photos, output, *ALL)
    before, ledger = stamps(output), read_ledger(store)
    assert len([name for name in before if name.endswith(".json")]) == 13
    found = by_photo(store, settings, portraits / f"{PERSON}.jpg", 0.5)
    assert sorted(match.source for match in found) == sorted(
        f"{name} {PERSON}.jpg" for name in edits(_blank())
    )
    shards = take_down(store, settings, found, "photo", "ticket 7")
    assert 1 < len(shards) < 13
    changed = {
        name.split(".")[0] for name, stamp in stamps(output).items() if before.get(name) != stamp
    }
    assert changed == {*shards}
    assert list(lint(store)) == []
    after = read_ledger(store)
    assert after.inputs == ledger.inputs == 25 and after.dropped["taken_down"] == 5
    left = b"".join(
        path.read_bytes()
        for path in output.rglob("*")
        if path.suffix in (".tar", ".json", ".jsonl")
    )
    assert PERSON.encode() not in left, "not even a file's name"
    rows = [row for row in rows_of(output) if row["reason"] == "taken_down"]
    assert {(row["source"], row["sha256"], row["thumbnail"], row["caption"]) for row in rows} == {
        ("", "", b"", "")
    }
    assert by_photo(store, settings, portraits / f"{PERSON}.jpg", 0.5) == []
    ran = count_model_calls(monkeypatch)
    assert plan_job(settings).tasks == [], "the pictures still lie in the source, and stay out"
    new_captions(monkeypatch)
    run(settings)
    assert ran == [] and list(lint(store)) == []


def test_the_same_picture_under_another_name_stays_out(
    photos: Path, output: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    store, settings = Store(str(output)), config(source, output, *ALL)
    victim = source / f"plain {PERSON}.jpg"
    found = by_hash(store, digest_of(str(victim)))
    assert [match.source for match in found] == [victim.name]
    take_down(store, settings, found, "hash", "")
    shutil.copy(victim, source / "zz renamed.jpg")
    victim.unlink()
    run(settings)
    assert {row["source"] for row in rows_of(output)} & {victim.name, "zz renamed.jpg"} == set()
    assert read_ledger(store).dropped["taken_down"] == 2 and list(lint(store)) == []


def test_copies_that_planning_dropped_go_with_their_original(photos: Path, tmp_path: Path) -> None:
    source, output = Path(shutil.copytree(photos, tmp_path / "photos")), tmp_path / "out"
    for path in sorted(source.iterdir())[4:]:
        path.unlink()
    first = sorted(source.iterdir())[0]
    shutil.copy(first, source / "zz copy.jpg")
    settings = config(source, output, *ALL)
    run(settings)
    store = Store(str(output))
    found = by_source(store, first.name)
    assert [match.source for match in found] == [first.name, "zz copy.jpg"]
    take_down(store, settings, found, "source", "")
    first.unlink()
    run(settings)
    assert read_ledger(store).dropped == {"taken_down": 2}, (
        "what was a copy doesn't become a sample"
    )


def test_what_is_left_of_a_take_down_is_found(made: Path, output: Path, photos: Path) -> None:
    store = Store(str(output))
    found = by_source(store, f"plain {PERSON}.jpg")
    entry: dict[str, object] = {
        "time": "",
        "by": "source",
        "note": "",
        "inputs": 1,
        "sha256": [found[0].sha256],
    }
    entry["removed"] = {f"fgid-{found[0].shard:06d}": [found[0].key]}
    store.write("takedown.jsonl", json.dumps(entry) + "\n")
    lines = list(lint(store))
    assert any("was taken down" in line and ".tar: " in line for line in lines)
    assert any("is of a picture that was taken down" in line for line in lines)
    assert any("are not applied yet" in line for line in lines)
    run(config(photos, output, *ALL))
    assert list(lint(store)) == [], "killed after its log was written, the next run completes it"
    record = next(r for r in DatasetReader(store).records(found[0].shard) if r.key == found[0].key)
    assert record.image == b"" and record.identity is None
    assert found[0].key not in DatasetReader(store).identities().column("key").to_pylist()


def test_from_the_command_line(output: Path, portraits: Path, photos: Path) -> None:
    def call(*arguments: str, answer: str | None = None) -> Result:
        return CliRunner().invoke(app, ["takedown", str(output), *arguments], input=answer)

    person = ["--photo", str(portraits / f"{PERSON}.jpg"), "--similarity", "0.5"]
    before = stamps(output)
    dry = call(*person, "--dry-run")
    assert dry.exit_code == 0 and "5 inputs in" in dry.stdout and "would be removed" in dry.stdout
    assert stamps(output) == before
    refused = call(*person, answer="n\n")
    assert refused.exit_code == 1 and stamps(output) == before
    done = call(*person, "--yes", "--note", "ticket <7>")
    assert done.exit_code == 0, done.output
    [entry] = [json.loads(line) for line in (output / "takedown.jsonl").read_text().splitlines()]
    assert (entry["by"], entry["inputs"], entry["note"]) == ("photo", 5, "ticket <7>")
    digests = {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.glob(f"*{PERSON}.jpg")
    }
    assert {*entry["sha256"]} == digests
    both = call("--source", "x", "--hash", "y")
    assert both.exit_code == 2 and "give one of" in both.stderr


def test_a_photograph_without_a_face_is_a_clear_error(
    made: Path, photos: Path, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "grey.jpg"), _blank())
    with pytest.raises(FaceError, match="no face"):
        by_photo(Store(str(made)), config(photos, made), tmp_path / "grey.jpg", 0.5)
    with pytest.raises(PipelineError, match="neither 64 hex digits nor a file"):
        digest_of("abc")


def _blank() -> Image:
    return np.full((256, 256, 3), 128, np.uint8)

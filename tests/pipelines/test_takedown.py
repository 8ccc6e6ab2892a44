"""Take-down: removed records leave no data, and only their shards are rewritten."""

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
    NO_DEDUPLICATION,
    NO_RULES,
    config,
    count_model_calls,
    new_captions,
    rows_of,
    stamps,
)

# label maps don't matter in these tests, so they are small
ALL = (*NO_DEDUPLICATION, *NO_RULES, "shard_size=2", "parse.size=320")
PERSON = "portrait-7-00003"


def edits(image: Image) -> dict[str, Image]:
    """Returns five images of one person."""
    side = image.shape[0]
    return {
        "plain": image,
        "mirrored": np.ascontiguousarray(image[:, ::-1]),
        "darker": np.asarray(image * 0.7, np.uint8),
        "cropped": np.ascontiguousarray(image[side // 20 : -side // 20, side // 20 : -side // 20]),
        "smaller": np.asarray(
            cv2.resize(image, (side // 2, side // 2), interpolation=cv2.INTER_AREA), np.uint8
        ),
    }


@pytest.fixture(scope="module")
def photos(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 images of five people; each person's are in several shards."""
    folder = tmp_path_factory.mktemp("people")
    for path in sorted(portraits.iterdir())[:5]:
        image = cv2.imread(str(path))
        assert image is not None
        for name, edited in edits(np.asarray(image, np.uint8)).items():
            cv2.imwrite(
                str(folder / f"{name} {path.stem}.jpg"), edited, [cv2.IMWRITE_JPEG_QUALITY, 92]
            )
    return folder


@pytest.fixture(scope="module")
def dataset(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("takedown") / "out"
    run(config(photos, output, *ALL))
    return output


@pytest.fixture
def output(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "out"))


def test_a_person_is_removed_and_only_shards_with_their_images_are_rewritten(
    photos: Path, portraits: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, settings = Store(str(output)), config(photos, output, *ALL)
    before, ledger = stamps(output), read_ledger(store)
    assert len([name for name in before if name.endswith(".json")]) == 13
    search = by_photo(store, settings, [portraits / f"{PERSON}.jpg"], 0.5)
    matches = search.matches
    assert sorted(match.source for match in matches) == sorted(
        f"{name} {PERSON}.jpg" for name in edits(_blank())
    )
    shards = take_down(store, settings, matches, "photo", "ticket 7")
    assert 1 < len(shards) < 13
    changed = {
        name.split(".")[0] for name, stamp in stamps(output).items() if before.get(name) != stamp
    }
    assert changed == {*shards}
    assert list(lint(store)) == []
    after = read_ledger(store)
    assert after.inputs == ledger.inputs == 25 and after.dropped["taken_down"] == 5
    contents = b"".join(
        path.read_bytes()
        for path in output.rglob("*")
        if path.suffix in (".tar", ".json", ".jsonl")
    )
    assert PERSON.encode() not in contents, "file names are removed too"
    rows = [row for row in rows_of(output) if row["reason"] == "taken_down"]
    assert {(row["source"], row["sha256"], row["thumbnail"], row["caption"]) for row in rows} == {
        ("", "", b"", "")
    }
    assert by_photo(store, settings, [portraits / f"{PERSON}.jpg"], 0.5).matches == []
    ran = count_model_calls(monkeypatch)
    assert plan_job(settings).tasks == [], "the source still has the images"
    new_captions(monkeypatch)
    run(settings)
    assert ran == [] and list(lint(store)) == []


def test_a_removed_image_under_another_name_is_not_processed(
    photos: Path, output: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    store, settings = Store(str(output)), config(source, output, *ALL)
    image = source / f"plain {PERSON}.jpg"
    matches = by_hash(store, digest_of(str(image)))
    assert [match.source for match in matches] == [image.name]
    take_down(store, settings, matches, "hash", "")
    shutil.copy(image, source / "zz renamed.jpg")
    image.unlink()
    run(settings)
    assert {row["source"] for row in rows_of(output)} & {image.name, "zz renamed.jpg"} == set()
    assert read_ledger(store).dropped["taken_down"] == 2 and list(lint(store)) == []


def test_exact_copies_are_removed_with_their_original(photos: Path, tmp_path: Path) -> None:
    source, output = Path(shutil.copytree(photos, tmp_path / "photos")), tmp_path / "out"
    for path in sorted(source.iterdir())[4:]:
        path.unlink()
    first = sorted(source.iterdir())[0]
    shutil.copy(first, source / "zz copy.jpg")
    settings = config(source, output, *ALL)
    run(settings)
    store = Store(str(output))
    matches = by_source(store, first.name)
    assert [match.source for match in matches] == [first.name, "zz copy.jpg"]
    take_down(store, settings, matches, "source", "")
    first.unlink()
    run(settings)
    assert read_ledger(store).dropped == {"taken_down": 2}, "the copy doesn't become a sample"


def test_lint_finds_traces_of_an_interrupted_take_down_and_the_next_run_completes_it(
    output: Path, photos: Path
) -> None:
    store = Store(str(output))
    [match] = by_source(store, f"plain {PERSON}.jpg")
    entry: dict[str, object] = {
        "time": "",
        "by": "source",
        "note": "",
        "inputs": 1,
        "sha256": [match.sha256],
    }
    entry["removed"] = {f"fgid-{match.shard:06d}": [match.key]}
    store.write("takedown.jsonl", json.dumps(entry) + "\n")
    lines = list(lint(store))
    assert any("was taken down" in line and ".tar: " in line for line in lines)
    assert any("has the digest of a removed image" in line for line in lines)
    assert any("are not applied yet" in line for line in lines)
    run(config(photos, output, *ALL))
    assert list(lint(store)) == []
    record = next(r for r in DatasetReader(store).records(match.shard) if r.key == match.key)
    assert record.image == b"" and record.identity is None
    assert match.key not in DatasetReader(store).identities().column("key").to_pylist()


def test_take_down_from_the_command_line(
    output: Path, portraits: Path, photos: Path, tmp_path: Path
) -> None:
    def call(*arguments: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(app, ["takedown", str(output), *page, *arguments], input=typed)

    page = ["--page", str(tmp_path / "page.html")]
    person = ["--photo", str(portraits / f"{PERSON}.jpg"), "--similarity", "0.5"]
    before = stamps(output)
    dry = call(*person, "--dry-run")
    assert dry.exit_code == 0 and "5 inputs in" in dry.stdout and "would be removed" in dry.stdout
    assert stamps(output) == before
    refused = call(*person, typed="n\n")
    assert refused.exit_code == 1 and stamps(output) == before
    result = call(*person, "--yes", "--note", "ticket <7>")
    assert result.exit_code == 0, result.output
    [entry] = [json.loads(line) for line in (output / "takedown.jsonl").read_text().splitlines()]
    assert (entry["by"], entry["inputs"], entry["note"]) == ("photo", 5, "ticket <7>")
    digests = {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.glob(f"*{PERSON}.jpg")
    }
    assert {*entry["sha256"]} == digests
    both = call("--source", "x", "--hash", "y")
    assert both.exit_code == 2 and "give one of" in both.stderr


def test_a_photograph_without_a_face_is_an_error(
    dataset: Path, photos: Path, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "grey.jpg"), _blank())
    with pytest.raises(FaceError, match="no face"):
        by_photo(Store(str(dataset)), config(photos, dataset), [tmp_path / "grey.jpg"], 0.5)
    with pytest.raises(PipelineError, match=r"expected a sha256 \(64 hex digits\) or the path"):
        digest_of("abc")


def _blank() -> Image:
    return np.full((256, 256, 3), 128, np.uint8)

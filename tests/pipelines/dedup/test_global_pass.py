"""Duplicates across shards are quarantined, and identities are on one side of the split."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import cv2
import pyarrow.parquet as pq
import pytest

from pipelines.lint import lint
from pipelines.run import run
from stages.record import key_of
from stages.storage.layout import DUPLICATES, IDENTITIES
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import NO_COPIES, config, digests, rows_of, stamps

SPLIT = (  # a mirrored picture is no copy here, and strangers that look alike are two people
    "global_pass.val_share=0.5",
    "global_pass.max_similarity=0.995",
    "global_pass.identity_similarity=0.8",
    "global_pass.split_similarity=0.8",
)


@pytest.fixture(scope="module")
def photos(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight people; of the first a re-encoded copy, of the second a mirrored one, of the third the
    very bytes.
    """
    folder = Path(shutil.copytree(portraits, tmp_path_factory.mktemp("copies") / "photos"))
    first, second, third, *_ = sorted(folder.iterdir())
    one, two = cv2.imread(str(first)), cv2.imread(str(second))
    assert one is not None and two is not None
    cv2.imwrite(str(folder / "z re-encoded.jpg"), one, [cv2.IMWRITE_JPEG_QUALITY, 60])
    cv2.imwrite(str(folder / "z mirrored.jpg"), two[:, ::-1])
    shutil.copy(third, folder / "z copy.jpg")
    return folder


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("copies") / "out"
    run(config(photos, output, *SPLIT))
    return output


def test_duplicates_are_quarantined_in_whatever_shard_they_are(made: Path) -> None:
    reasons = {row["source"]: row["reason"] for row in rows_of(made) if row["reason"]}
    assert reasons["z copy.jpg"] == "duplicate"
    assert reasons["z re-encoded.jpg"] == "near_duplicate"
    assert {source for source in reasons if not source.startswith("z ")} == set(), (
        "the earlier stays"
    )
    [row] = [row for row in rows_of(made) if row["source"] == "z re-encoded.jpg"]
    assert (
        "portrait-7-00000.jpg" in row["detail"]
        and row["quarantine_offset"] >= 0
        and row["stage"] == "global_pass"
    )
    assert list(lint(Store(str(made)))) == []


def test_a_second_run_writes_nothing_and_other_limits_need_no_stage(
    photos: Path, made: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
    before = stamps(output)
    run(config(photos, output, *SPLIT))
    assert stamps(output) == before
    run(config(photos, output, *SPLIT, *NO_COPIES))
    assert Counter(row["reason"] for row in rows_of(output)) == {"": 10, "duplicate": 1}
    run(config(photos, output, *SPLIT))
    assert digests(output) == digests(made)


def test_a_copy_is_known_by_its_bytes_where_sizes_are_not(photos: Path, tmp_path: Path) -> None:
    """Planning compares files of equal size; of URLs and tables it knows no size, and the samples'
    digests tell.
    """
    output = tmp_path / "out"
    run(config(photos, output, "source.find_copies=false"))
    [row] = [row for row in rows_of(output) if row["source"] == "z copy.jpg"]
    assert (row["reason"], row["stage"]) == ("duplicate", "global_pass")


def test_a_person_has_one_identity_and_one_side(made: Path) -> None:
    rows = {row["key"]: row for row in DatasetReader(Store(str(made))).identities().to_pylist()}
    second, mirrored = rows[key_of("portrait-7-00001.jpg")], rows[key_of("z mirrored.jpg")]
    assert second["identity_id"] == mirrored["identity_id"] and second["split"] == mirrored["split"]
    assert second["identity_size"] == 2 and second["nearest"][0] == mirrored["key"]
    assert len({row["identity_id"] for row in rows.values()}) == 8
    assert {row["split"] for row in rows.values()} == {"train", "val"}


def test_lint_proves_the_split(made: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
    table = pq.read_table(output / IDENTITIES)
    sides = table.column("split").to_pylist()
    place = table.column("key").to_pylist().index(key_of("z mirrored.jpg"))
    sides[place] = "val" if sides[place] == "train" else "train"
    column = table.schema.get_field_index("split")
    moved = (
        table.set_column(column, "split", [sides])
        .cast(table.schema)
        .replace_schema_metadata(table.schema.metadata)
    )
    pq.write_table(moved, output / IDENTITIES)
    assert [line for line in lint(Store(str(output))) if "on both sides" in line]
    pq.write_table(table.slice(1), output / IDENTITIES)
    assert [line for line in lint(Store(str(output))) if "has no row" in line]


def test_more_pictures_change_no_exclusion_and_no_side(
    photos: Path, made: Path, tmp_path: Path
) -> None:
    source, output = (
        Path(shutil.copytree(photos, tmp_path / "photos")),
        Path(shutil.copytree(made, tmp_path / "out")),
    )
    picture = cv2.imread(str(source / "portrait-7-00004.jpg"))
    assert picture is not None
    cv2.imwrite(str(source / "a later copy.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 70])
    before = {
        row["key"]: (row["identity_id"], row["split"])
        for row in DatasetReader(Store(str(output))).identities().to_pylist()
    }
    run(config(source, output, *SPLIT))
    after = {
        row["key"]: (row["identity_id"], row["split"])
        for row in DatasetReader(Store(str(output))).identities().to_pylist()
    }
    assert {key: after[key] for key in before} == before
    reasons = {row["source"]: row["reason"] for row in rows_of(output)}
    assert reasons["a later copy.jpg"] == "near_duplicate" and reasons["portrait-7-00004.jpg"] == ""


def test_killed_between_finding_duplicates_and_applying_them(
    photos: Path, made: Path, tmp_path: Path
) -> None:
    """The state after a SIGKILL there: duplicates.parquet is written, and no shard is yet."""
    output = tmp_path / "out"
    run(config(photos, output, *SPLIT, *NO_COPIES))
    shutil.copy(made / DUPLICATES, output / DUPLICATES)
    assert [line for line in lint(Store(str(output))) if "are not applied yet" in line]
    run(config(photos, output, *SPLIT))
    assert digests(output) == digests(made)

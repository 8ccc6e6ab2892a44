"""The global pass: duplicates across shards are quarantined, and identities are on one side of the
split.
"""

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
from tests.pipelines.helpers import NO_DEDUPLICATION, config, digests, rows_of, stamps

# with these limits, a mirrored image isn't a duplicate, and similar people have two identities
SPLIT = (
    "global_pass.val_share=0.5",
    "global_pass.max_similarity=0.995",
    "global_pass.identity_similarity=0.8",
    "global_pass.split_similarity=0.8",
)


@pytest.fixture(scope="module")
def photos(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Portraits of eight people, a re-encoded copy of the first, a mirrored copy of the second, and
    an exact copy of the third.
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
def dataset(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("copies") / "out"
    run(config(photos, output, *SPLIT))
    return output


def test_duplicates_of_samples_in_other_shards_are_quarantined(dataset: Path) -> None:
    reasons = {row["source"]: row["reason"] for row in rows_of(dataset) if row["reason"]}
    assert reasons["z copy.jpg"] == "duplicate"
    assert reasons["z re-encoded.jpg"] == "near_duplicate"
    assert {source for source in reasons if not source.startswith("z ")} == set(), (
        "the earlier of two duplicates isn't dropped"
    )
    [row] = [row for row in rows_of(dataset) if row["source"] == "z re-encoded.jpg"]
    assert (
        "portrait-7-00000.jpg" in row["detail"]
        and row["quarantine_offset"] >= 0
        and row["stage"] == "global_pass"
    )
    assert list(lint(Store(str(dataset)))) == []


def test_a_second_run_writes_nothing_and_limits_can_be_changed_and_changed_back(
    photos: Path, dataset: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    before = stamps(output)
    run(config(photos, output, *SPLIT))
    assert stamps(output) == before
    run(config(photos, output, *SPLIT, *NO_DEDUPLICATION))
    assert Counter(row["reason"] for row in rows_of(output)) == {"": 10, "duplicate": 1}
    run(config(photos, output, *SPLIT))
    assert digests(output) == digests(dataset)


def test_exact_copies_that_planning_did_not_find_are_found_by_their_digests(
    photos: Path, tmp_path: Path
) -> None:
    """Planning compares files of equal size. The sizes of inputs of URLs and tables are unknown."""
    output = tmp_path / "out"
    run(config(photos, output, "source.find_copies=false"))
    [row] = [row for row in rows_of(output) if row["source"] == "z copy.jpg"]
    assert (row["reason"], row["stage"]) == ("duplicate", "global_pass")


def test_a_person_has_one_identity_and_one_side_of_the_split(dataset: Path) -> None:
    rows = {row["key"]: row for row in DatasetReader(Store(str(dataset))).identities().to_pylist()}
    second, mirrored = rows[key_of("portrait-7-00001.jpg")], rows[key_of("z mirrored.jpg")]
    assert second["identity_id"] == mirrored["identity_id"] and second["split"] == mirrored["split"]
    assert second["identity_size"] == 2 and second["nearest"][0] == mirrored["key"]
    assert len({row["identity_id"] for row in rows.values()}) == 8
    assert {row["split"] for row in rows.values()} == {"train", "val"}


def test_lint_finds_identities_on_both_sides_and_samples_without_a_row(
    dataset: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    table = pq.read_table(output / IDENTITIES)
    sides = table.column("split").to_pylist()
    place = table.column("key").to_pylist().index(key_of("z mirrored.jpg"))
    sides[place] = "val" if sides[place] == "train" else "train"
    column = table.schema.get_field_index("split")
    changed = (
        table.set_column(column, "split", [sides])
        .cast(table.schema)
        .replace_schema_metadata(table.schema.metadata)
    )
    pq.write_table(changed, output / IDENTITIES)
    assert [line for line in lint(Store(str(output))) if "on both sides" in line]
    pq.write_table(table.slice(1), output / IDENTITIES)
    assert [line for line in lint(Store(str(output))) if "without a row" in line]


def test_new_images_change_no_earlier_exclusion_or_side_of_the_split(
    photos: Path, dataset: Path, tmp_path: Path
) -> None:
    source, output = (
        Path(shutil.copytree(photos, tmp_path / "photos")),
        Path(shutil.copytree(dataset, tmp_path / "out")),
    )
    image = cv2.imread(str(source / "portrait-7-00004.jpg"))
    assert image is not None
    cv2.imwrite(str(source / "a later copy.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 70])
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


def test_a_run_that_was_killed_before_applying_duplicates_is_completed(
    photos: Path, dataset: Path, tmp_path: Path
) -> None:
    """The state after such a kill: duplicates.parquet is written, and no shard is rewritten."""
    output = tmp_path / "out"
    run(config(photos, output, *SPLIT, *NO_DEDUPLICATION))
    shutil.copy(dataset / DUPLICATES, output / DUPLICATES)
    assert [line for line in lint(Store(str(output))) if "are not applied yet" in line]
    run(config(photos, output, *SPLIT))
    assert digests(output) == digests(dataset)

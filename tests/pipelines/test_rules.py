"""Quality rules: a changed rule drops and restores samples without a model call; and rights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.errors import QualityError
from pipelines.lint import lint
from pipelines.report import write_report
from pipelines.review import check_trainable
from pipelines.run import plan_job, run
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import config, count_model_calls, digests, rows_of

LENIENT = "rules.min_sharpness=0"
STRICT = "rules.min_sharpness=0.36"  # drops some of the eight portraits, and not all


@pytest.fixture(scope="module")
def dataset(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rules") / "out"
    run(config(portraits, output, LENIENT))
    return output


def test_a_changed_rule_drops_and_restores_samples_without_a_model_call(
    portraits: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    before = digests(output)
    ran = count_model_calls(monkeypatch)
    ledger = run(config(portraits, output, STRICT))
    count = ledger.dropped["blurred"]
    assert 0 < count < 8 and ledger.written == 8 - count
    rows = rows_of(output)
    for row in rows:
        assert (row["reason"] == "blurred") == (row["sharpness"] < 0.36)
    [first, *_] = [row for row in rows if row["reason"]]
    assert (
        f"sharpness {first['sharpness']:.2f}"[:13] in first["detail"]
        and "at least 0.36" in first["detail"]
    )
    assert first["tar_offset"] == -1 and first["quarantine_offset"] >= 0 and first["thumbnail"]
    assert list(lint(Store(str(output)))) == []
    run(config(portraits, output, LENIENT))
    assert ran == []
    assert digests(output) == before


def test_samples_that_were_dropped_in_the_first_run_are_captioned_when_they_are_restored(
    portraits: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(config(portraits, output, STRICT))
    quarantined = [
        record
        for index in range(2)
        for record in DatasetReader(Store(str(output))).records(index)
        if record.quarantined
    ]
    assert quarantined and {record.caption for record in quarantined} == {""}
    run(config(portraits, output, LENIENT))
    assert digests(output) == digests(dataset)


def test_the_quality_filter_is_stale_after_a_change_of_an_earlier_stage(
    portraits: Path, dataset: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    run(config(portraits, output, STRICT))
    job = plan_job(config(portraits, output, STRICT, "parse.align_below=0.2"))
    for task in job.tasks:
        assert task.stale_stages >= {"parse", "measure", "quality_filter", "caption", "review"}
        assert not task.stale_stages & {"rights", "resize", "thumbnail", "detect", "embed"}
    job = plan_job(config(portraits, output, STRICT, "resize.jpeg_quality=90"))
    assert {task.exists for task in job.tasks} == {False}, "resize needs the source's images"


def test_lint_finds_a_damaged_and_a_missing_quarantine_tar(
    portraits: Path, dataset: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    run(config(portraits, output, STRICT))
    tar = next((output / "shards").glob("*.quarantine.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    assert [line for line in lint(Store(str(output))) if "bytes, expected" in line]
    tar.unlink()
    assert [line for line in lint(Store(str(output))) if "is missing" in line]


def test_rights_are_checked_first_and_nothing_of_dropped_images_is_stored(
    portraits: Path, dataset: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(dataset, tmp_path / "out"))
    ledger = run(config(portraits, output, LENIENT, "rights.license_allow=[CC-BY-*, CC0*]"))
    assert ledger.dropped == {"license_not_allowed": 8}
    for row in rows_of(output):
        assert row["stage"] == "rights" and not row["thumbnail"] and row["identity"] is None
        assert (row["tar_offset"], row["quarantine_offset"]) == (-1, -1)
    fresh = tmp_path / "fresh"
    run(
        config(
            portraits, fresh, LENIENT, "rights.license_allow=[cc-by-*]", "source.license=CC-BY-4.0"
        )
    )
    assert {row["status"] for row in rows_of(fresh)} == {"ok"}, "patterns ignore case"
    fresh = tmp_path / "consent"
    ledger = run(
        config(portraits, fresh, LENIENT, "rights.consent_allow=[signed*]", "source.consent=none")
    )
    assert ledger.dropped == {"consent_missing": 8}


def test_a_run_of_untrainable_samples_fails_with_the_reasons(dataset: Path) -> None:
    store = Store(str(dataset))
    check_trainable(write_report(store), 0.0)
    rows = rows_of(dataset)
    assert all(row["trainable"] and row["text_tokens"] <= 75 for row in rows)
    with pytest.raises(QualityError, match=r"of 8 records .* word_not_in_caption of"):
        check_trainable(write_report(_with_captions(store, "Nobody. Nothing.")), 0.5)


def _with_captions(store: Store, text: str) -> Store:
    """Returns a copy of the data set in which all captions are `text`, with their review."""
    from dataclasses import replace

    from configs.schema import ReviewConfig
    from pipelines.review import ReviewStage
    from stages.annotations import Measures, Review
    from stages.backends.weights import Weights
    from stages.storage.commit import ChainInfo, PlannedShard, commit

    other = Store(f"{store.root}-captioned")
    stage = ReviewStage(ReviewConfig(), Weights())
    for index, manifest in DatasetReader(store).manifests().items():
        records = [
            replace(record, caption=text, face_caption=text)
            for record in DatasetReader(store).records(index)
        ]
        shard = PlannedShard(index=index, inputs=len(records), bytes=0, digest="")
        commit(
            other,
            shard,
            stage.process(records),
            ChainInfo(manifest.signatures, (Measures, Review)),
            manifest.run,
        )
    return other

"""Rules look at recorded metrics: what they drop is restored without a model call."""

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
STRICT = "rules.min_sharpness=0.36"  # some of the eight are over it, and some are not


@pytest.fixture(scope="module")
def made(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rules") / "out"
    run(config(portraits, output, LENIENT))
    return output


def test_another_rule_judges_without_a_model_and_back_again(
    portraits: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
    before = digests(output)
    ran = count_model_calls(monkeypatch)
    ledger = run(config(portraits, output, STRICT))
    lost = ledger.dropped["blurred"]
    assert 0 < lost < 8 and ledger.written == 8 - lost
    rows = rows_of(output)
    for row in rows:
        assert (row["reason"] == "blurred") == (row["sharpness"] < 0.36), (
            "each verdict follows from its figure"
        )
    [first, *_] = [row for row in rows if row["reason"]]
    assert (
        f"sharpness {first['sharpness']:.2f}"[:13] in first["detail"]
        and "at least 0.36" in first["detail"]
    )
    assert first["tar_offset"] == -1 and first["quarantine_offset"] >= 0 and first["thumbnail"]
    assert list(lint(Store(str(output)))) == []
    run(config(portraits, output, LENIENT))
    assert ran == [], "neither there nor back"
    assert digests(output) == before


def test_a_rule_from_the_start_gives_the_same_bytes_but_for_captions_never_made(
    portraits: Path, made: Path, tmp_path: Path
) -> None:
    """What a rule drops at once is never captioned; taken back, it is, and then nothing tells the
    two apart.
    """
    output = tmp_path / "out"
    run(config(portraits, output, STRICT))
    held = [
        record
        for index in range(2)
        for record in DatasetReader(Store(str(output))).records(index)
        if record.quarantined
    ]
    assert held and {record.caption for record in held} == {""}
    run(config(portraits, output, LENIENT))
    assert digests(output) == digests(made)


def test_a_changed_stage_before_the_judge_judges_anew(
    portraits: Path, made: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
    run(config(portraits, output, STRICT))
    job = plan_job(config(portraits, output, STRICT, "parse.align_below=0.2"))
    assert {task.stale_stages for task in job.tasks} == {
        frozenset({"parse", "measure", "quality_filter", "caption", "review"})
    }
    job = plan_job(config(portraits, output, STRICT, "resize.jpeg_quality=90"))
    assert {task.exists for task in job.tasks} == {False}, (
        "a picture made anew comes from its source"
    )


def test_a_held_tar_that_is_damaged_or_gone_is_found(
    portraits: Path, made: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
    run(config(portraits, output, STRICT))
    held = next((output / "shards").glob("*.quarantine.tar"))
    held.write_bytes(held.read_bytes()[:-1])
    assert [line for line in lint(Store(str(output))) if "is not the file" in line]
    held.unlink()
    assert [line for line in lint(Store(str(output))) if "is missing" in line]


def test_rights_are_judged_first_and_nothing_is_kept(
    portraits: Path, made: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "out"))
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
    assert {row["status"] for row in rows_of(fresh)} == {"ok"}, "whatever the case"
    fresh = tmp_path / "consent"
    ledger = run(
        config(portraits, fresh, LENIENT, "rights.consent_allow=[signed*]", "source.consent=none")
    )
    assert ledger.dropped == {"consent_missing": 8}


def test_a_run_of_untrainable_samples_fails_with_the_reasons(made: Path) -> None:
    store = Store(str(made))
    check_trainable(write_report(store), 0.0)
    rows = rows_of(made)
    assert all(row["trainable"] and row["text_tokens"] <= 75 for row in rows)
    with pytest.raises(QualityError, match=r"of 8 samples .* word_not_in_caption of"):
        check_trainable(write_report(_with_captions(store, "Nobody. Nothing.")), 0.5)


def _with_captions(store: Store, text: str) -> Store:
    """A copy of the data set whose captions say `text`, reviewed as ever."""
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

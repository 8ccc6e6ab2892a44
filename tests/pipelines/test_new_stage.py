"""A new stage with a new metric, on a data set of version 2: only this stage runs, on the existing
samples, and its metric is shown everywhere.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from configs.load import load_text
from configs.schema import DatasetConfig
from pipelines.inspect.find import inspect
from pipelines.inspect.tables import show
from pipelines.lint import lint
from pipelines.report import write_report
from pipelines.report.card.readme import write_card
from pipelines.run import execute, plan_job
from stages.annotations import Measures, Review
from stages.base import RecordStage
from stages.record import Record, Status
from stages.storage import layout
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import count_model_calls, stamps
from tests.pipelines.new_stage import (
    DATASET_V2,
    ExampleTone,
    chain_of_version_2,
    chain_since_version_2,
    chain_with_example,
)


def settings(source: Path, output: Path) -> DatasetConfig:
    """Returns the data set's configuration with another source and output."""
    overrides = [f"source.path={source}", f"output={output}"]
    return load_text(DatasetConfig, (output / layout.CONFIG).read_text(), overrides)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the names, sizes and times in the plan, and zeros as contents: a run that reads
    one fails it.
    """
    folder = tmp_path_factory.mktemp("photos")
    rows = Store(str(DATASET_V2)).table(layout.PLAN, ["source", "size", "version"]).to_pylist()
    for row in rows:
        path = folder / row["source"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(row["size"]))
        time = int(row["version"])
        os.utime(path, ns=(time, time))
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATASET_V2, tmp_path / "old"))


@pytest.fixture(scope="module")
def upgraded(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data set after a run with the new stage."""
    output = Path(shutil.copytree(DATASET_V2, tmp_path_factory.mktemp("upgraded") / "out"))
    with pytest.MonkeyPatch.context() as patch:
        networks, stages = count_model_calls(patch), list[str]()
        process = RecordStage.process

        def counted(self: RecordStage, records: list[Record]) -> list[Record]:
            stages.append(self.name)
            return process(self, records)

        patch.setattr(RecordStage, "process", counted)
        job = plan_job(settings(photos, output), chain=chain_with_example)
        assert job.why() == ["2 shards through example_tone, from their own samples"]
        list(execute(job, lambda count: None))
    assert networks == []
    assert set(stages) == {"example_tone", "quality_filter"}, "restored samples are filtered again"
    write_card(Store(str(output)), write_report(str(output)))
    yield output


def test_a_data_set_of_version_2_is_read(old: Path) -> None:
    reader = DatasetReader(str(old))
    records = [record for index in reader.manifests() for record in reader.records(index)]
    reasons = {record.source: record.reason for record in records if record.reason}
    assert reasons == {
        "blurred.jpg": "blurred",
        "damaged.jpg": "truncated",
        "portrait-2.jpg": "near_duplicate",
        "no face.jpg": "no_face",
        "same bytes.jpg": "duplicate",
    }
    written = [record for record in records if record.ok]
    assert len(written) == 7
    for record in written:
        measures, review = record.annotation(Measures), record.annotation(Review)
        assert measures and 0.2 < measures.sharpness < 1 and len(measures.hash) == 64
        assert review and review.trainable and "face" in review.fused
    [blurred] = [record for record in records if record.reason == "blurred"]
    assert blurred.quarantined and blurred.stage == "quality_filter"
    tables = [reader.rows(index, status=Status.OK) for index in reader.manifests()]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["regions"] for row in rows] == [
        list(review.regions) for record in written if (review := record.annotation(Review))
    ]
    assert list(lint(reader.store)) == []


def test_an_unchanged_run_on_version_2_reads_no_source_and_runs_no_model(
    old: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, networks = stamps(old), count_model_calls(monkeypatch)
    job = plan_job(settings(photos, old), chain=chain_of_version_2)
    assert (job.tasks, job.plan.new, job.plan.changed, job.plan.vanished) == ([], 0, 0, 0)
    assert list(execute(job, lambda count: None)) == []
    assert networks == [] and stamps(old) == before


def test_changed_rules_of_attributes_make_its_captions_again_and_nothing_else(
    old: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = count_model_calls(monkeypatch)
    job = plan_job(settings(photos, old), chain=chain_since_version_2)
    assert job.why() == ["2 shards through caption, review, from their own samples"]
    list(execute(job, lambda count: None))
    assert networks == []
    reader, earlier = DatasetReader(str(old)), DatasetReader(str(DATASET_V2))
    records = [record for index in reader.manifests() for record in reader.records(index)]
    before = [record for index in earlier.manifests() for record in earlier.records(index)]
    assert [r.image for r in records] == [r.image for r in before]
    assert [r.caption for r in records] != [r.caption for r in before]
    assert not plan_job(settings(photos, old), chain=chain_since_version_2).tasks


def test_the_report_of_version_2_has_its_metrics(old: Path) -> None:
    data = write_report(str(old)).stats["data"]
    assert (data["inputs"], data["written"]) == (12, 7)
    assert data["metrics"]["sharpness"]["count"] == data["metrics"]["text_tokens"]["count"] == 7


def test_a_new_stage_upgrades_version_2_without_other_changes(upgraded: Path) -> None:
    reader = DatasetReader(str(upgraded))
    assert {manifest.version for manifest in reader.manifests().values()} == {layout.FORMAT_VERSION}
    assert not list(upgraded.rglob("*.held.tar"))
    assert list(lint(reader.store)) == []
    earlier = DatasetReader(str(DATASET_V2))
    for index in reader.manifests():
        pairs = zip(reader.records(index), earlier.records(index), strict=True)
        for now, before in pairs:
            assert (now.key, now.status, now.reason) == (before.key, before.status, before.reason)
            assert (now.image, now.parsing, now.caption) == (
                before.image,
                before.parsing,
                before.caption,
            )
            assert now.annotation(Measures) == before.annotation(Measures)
            assert now.annotation(Review) == before.annotation(Review)
            assert (now.annotation(ExampleTone) is not None) == now.complete


def test_new_fields_are_shown_in_sidecar_report_inspect_card_and_croissant(upgraded: Path) -> None:
    reader = DatasetReader(str(upgraded))
    column = reader.columns()["example_lightness"]
    assert column.annotation == "example_tone" and column.metric and column.metric.unit == "L*"
    values = [
        value
        for index in reader.manifests()
        for value in reader.rows(index, (column,), Status.OK).column(0).to_pylist()
    ]
    assert len(values) == 7 and all(0 < value < 100 for value in values)

    stats = json.loads((upgraded / layout.STATS).read_text())
    assert stats["data"]["metrics"]["example_lightness"]["max"] == pytest.approx(max(values))
    page = (upgraded / layout.REPORT).read_text()
    assert "Example lightness" in page and 'data-of="example_lightness"' in page

    key = reader.rows(0, ("key",), Status.OK).column(0)[0].as_py()
    console = Console(record=True, width=120, file=io.StringIO())
    show(inspect(reader.store, key), console, image=False)
    lines = console.export_text().splitlines()
    [line] = [line for line in lines if line.startswith("example lightness")]
    assert line.split()[-3:] == [f"{values[0]:.3f}", "no", "rule"]
    [line] = [line for line in lines if line.startswith("example shade")]
    assert line.split()[-1] == ("light" if values[0] > 50 else "dark")

    card = (upgraded / layout.README).read_text()
    assert "example_lightness" in card and "median CIE L&#42; of the main face" in card
    assert "example_shade" in card
    croissant = json.loads((upgraded / layout.CROISSANT).read_text())
    [inputs] = [each for each in croissant["recordSet"] if each["name"] == "inputs"]
    [field] = [each for each in inputs["field"] if each["name"] == "example_lightness"]
    assert field["dataType"] == "sc:Float" and field["description"] == column.description

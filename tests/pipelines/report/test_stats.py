"""The stats: every number recomputes from the shards."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from configs.errors import ShardError
from pipelines.report import images_per_second, write_report
from pipelines.report.stats import compute
from stages.storage.layout import REPORT, STATS, STATS_TABLE
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.report.helpers import small_set, stats_of
from tests.pipelines.report.report_recompute import (
    METRICS,
    check_data,
    rates,
    shard_rows,
    values,
    written,
)


def test_every_metric_recomputes_from_the_shards(synthetic: Store) -> None:
    check_data(stats_of(synthetic)["data"], Path(synthetic.root))


def test_every_metric_recomputes_from_real_shards(real: Store) -> None:
    check_data(stats_of(real)["data"], Path(real.root))


def test_the_table_of_shards_recomputes(synthetic: Store) -> None:
    table = pq.read_table(Path(synthetic.root) / STATS_TABLE).to_pylist()
    for row, (name, rows) in zip(table, shard_rows(Path(synthetic.root)).items(), strict=True):
        assert row["shard"] == name
        for metric in METRICS:
            numbers = values(written(rows), metric)
            assert row[f"{metric}_count"] == len(numbers) > 0
            assert row[f"{metric}_mean"] == math.fsum(numbers) / len(numbers)
            assert row[f"{metric}_median"] == statistics.median(numbers)
        assert {share: row[share] for share in rates([])} == {
            s: some / n for s, (some, n) in rates(rows).items()
        }
        manifest = json.loads(synthetic.read(f"shards/{name}.json"))
        assert row["seconds"] == manifest["run"]["seconds"]
        assert row["seconds_parse"] == manifest["run"]["stage_seconds"]["parse"]


def test_equal_outputs_give_equal_reports(synthetic: Store, tmp_path: Path) -> None:
    before = [synthetic.read(name) for name in (STATS, STATS_TABLE, REPORT)]
    shutil.copytree(synthetic.root, tmp_path / "elsewhere")
    write_report(str(tmp_path / "elsewhere"))
    assert [
        (tmp_path / "elsewhere" / name).read_bytes() for name in (STATS, STATS_TABLE, REPORT)
    ] == before


def test_time_counts_only_while_a_shard_is_made(synthetic: Store, tmp_path: Path) -> None:
    store = small_set(tmp_path, shards=4)
    spans = {0: (10.0, 4.0), 1: (12.0, 4.0), 2: (110.0, 5.0), 3: (111.0, 2.0)}  # finished, seconds
    for index, (finished, seconds) in spans.items():
        path = Path(store.path(f"shards/fgid-{index:06d}.json"))
        manifest = json.loads(path.read_text())
        manifest["run"] |= {
            "finished": finished,
            "seconds": seconds,
            "stage_seconds": {"source": 0.25, "parse": 0.75},
        }
        path.write_text(json.dumps(manifest))
    runs = compute(DatasetReader(store)).stats["runs"]
    assert runs["seconds"] == 12.0  # 6 to 12 and 105 to 111, without the pause
    assert runs["images_per_second"] == round(4 * 30 / 12, 3)
    # the shards of a resumed run
    second = [
        manifest
        for manifest in DatasetReader(store).manifests().values()
        if manifest.run.finished > 100
    ]
    assert images_per_second(second) == round(60 / 6, 3)
    assert runs["stage_seconds"] == {"source": 1.0, "parse": 3.0}
    assert runs["stage_share"] == {"source": 0.25, "parse": 0.75}


@pytest.mark.parametrize(
    "change", [{"written": 8}, {"inputs": 10}, {"dropped": {"no_face": 1}}, {"failed": {"x": 1}}]
)
def test_a_ledger_that_does_not_balance_is_an_error(tmp_path: Path, change: dict[str, Any]) -> None:
    store = small_set(tmp_path)
    path = Path(store.path("shards/fgid-000000.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShardError, match=r"fgid-000000 doesn't balance"):
        write_report(store)
    assert not store.exists(REPORT)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no committed shard"):
        write_report(str(tmp_path / "empty"))
    store = small_set(tmp_path)
    sidecar = Path(store.path("shards/fgid-000000.parquet"))
    pq.write_table(pq.read_table(sidecar).drop_columns(["status"]), sidecar)
    with pytest.raises(ShardError, match="fgid-000000: its sidecar has no column status"):
        write_report(store)
    sidecar.unlink()
    with pytest.raises(ShardError, match=r"fgid-000000\.parquet is missing"):
        write_report(store)


def test_columns_that_a_sidecar_lacks_have_no_values(tmp_path: Path) -> None:
    """As in a data set whose chain has fewer stages, or that an older program wrote."""
    store = small_set(tmp_path, shards=2)
    sidecar = Path(store.path("shards/fgid-000001.parquet"))
    lacking = [
        "sharpness",
        "license",
        "person",
        "trainable",
        "regions",
        "region_words",
        "label_areas",
    ]
    pq.write_table(pq.read_table(sidecar).drop_columns(lacking), sidecar)
    data = write_report(store).stats["data"]
    ok, others = (written(rows) for rows in shard_rows(Path(store.root)).values())
    assert data["metrics"]["sharpness"]["count"] == len(ok)
    assert data["metrics"]["brightness"]["count"] == len(ok) + len(others)
    assert data["trainable"]["unknown"] == len(others)
    stated = {entry["name"]: entry["count"] for entry in data["licenses"]["named"]}
    assert stated == Counter(row["license"] for row in ok) + Counter({"": len(others)})


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"time": "", "by": "hash", "inputs": 1, "removed": {}, "note": "", "sha256": []}'],
)
def test_a_takedown_log_that_can_not_be_read_is_an_error(tmp_path: Path, line: str) -> None:
    store = small_set(tmp_path)
    with Path(store.path("takedown.jsonl")).open("a") as log:
        log.write(line + "\n")
    with pytest.raises(ShardError, match=r"line 2 of takedown\.jsonl"):
        compute(DatasetReader(store))

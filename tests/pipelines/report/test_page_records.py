"""Page records: spread over the shards, with examples of every reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipelines.report.page_records import read_page_records
from pipelines.report.stats import compute
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.report.helpers import rows_of


def test_records_are_spread_evenly_and_examples_are_among_them(synthetic: Store) -> None:
    report = compute(DatasetReader(synthetic))
    records = read_page_records(
        DatasetReader(synthetic),
        report.manifests,
        report.examples,
        100,
        report.metrics,
        report.columns,
    )
    shards = Counter(records.columns["shard"])
    assert all(shards[index] >= 20 for index in range(5)), "each shard's fifth, and the examples"
    assert len(set(records.columns["key"])) == len(records) < 300
    rows = {row["key"]: row for row in rows_of(Path(synthetic.root))}
    for entry in report.stats["data"]["reasons"]:
        reason = [key for key, r in rows.items() if r["reason"] == entry["reason"]]
        assert set(reason[:8]) <= set(records.columns["key"])
    for at, key in enumerate(records.columns["key"]):
        row = rows[key]
        assert records.thumbnails[at] == (row["thumbnail"], row["thumbnail_labels"])
        assert records.columns["caption"][at] == row["caption"]
        lacking = sum((share == 0) << label for label, share in enumerate(row["label_areas"]))
        assert records.columns["missing"][at] == (lacking if row["label_areas"] else -1)
    whole = read_page_records(
        DatasetReader(synthetic),
        report.manifests,
        report.examples,
        10_000,
        report.metrics,
        report.columns,
    )
    assert whole.columns["key"] == list(rows), "of a small set all, in its order"

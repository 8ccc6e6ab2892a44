"""The data card and its Croissant description: every number recomputes, and text from outside the
program stays text.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlcroissant
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from configs.load import load_text
from configs.schema import DatasetConfig
from pipelines.report.card import readme
from pipelines.report.stats import compute
from pipelines.run import run
from pipelines.takedown import by_source, take_down
from stages.storage.reader import IDENTITIES_SCHEMA, DatasetReader
from stages.storage.samples import MEMBERS
from stages.storage.sidecar import STANDARD_COLUMNS
from stages.storage.store import Store
from tests.pipelines.helpers import NO_DEDUPLICATION, config
from tests.pipelines.report.helpers import plain, rows_of

EVIL = "CC|BY\n# hi <script>"
LICENSES = ("CC0-1.0", EVIL, "CC0-1.0", "", "CC BY 4.0", "CC0-1.0")
AUTHORS = ("*Ada*", "", "[x](javascript:1)", "| | |", "`rm`", "\u202eeve@example.com")


def write_card(store: Store) -> None:
    readme.write_card(store, compute(DatasetReader(store)))


@pytest.fixture(scope="module")
def store(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A table of six portraits, an image without a face and an HTML page. One portrait is
    quarantined for a small face."""
    folder = tmp_path_factory.mktemp("table")
    grey = io.BytesIO()
    Image.new("RGB", (300, 300), "grey").save(grey, "JPEG")
    images = [path.read_bytes() for path in sorted(portraits.glob("*.jpg"))[:6]]
    rows = {
        "image": [*images, grey.getvalue(), b"<!doctype html>"],
        "license": [*LICENSES, "", ""],
        "author": [*AUTHORS, "", ""],
        "person": ["Ada Lovelace", "Ada Lovelace", *[None] * 6],
        "name": [*(f"person of note {number}.jpg" for number in range(6)), "grey.jpg", "page.jpg"],
    }
    pq.write_table(pa.table(rows), folder / "in.parquet")
    output = tmp_path_factory.mktemp("store") / "out"
    more = (
        "rules.min_face=265",
        "global_pass.val_share=0.4",
        "global_pass.split_similarity=0.6",
        *NO_DEDUPLICATION,
    )
    run(config(folder / "in.parquet", output, "source.name_column=name", *more))
    store = Store(str(output))
    write_card(store)
    return store


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Store:
    shutil.copytree(store.root, tmp_path / "copy")
    return Store(str(tmp_path / "copy"))


def card_of(store: Store) -> tuple[dict[str, Any], str]:
    """(front matter, the rest)."""
    _, head, body = store.read("README.md").decode().split("---\n", 2)
    return yaml.safe_load(head), body


def tables(body: str) -> Iterator[list[list[str]]]:
    """Each table's rows of cells, as a Markdown parser reads them."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level > 3:
            kinds = {child.type for child in token.children or ()}
            assert kinds <= {"text", "text_special"}, f"{token.content!r} is more than text"
            rows[-1].append("".join(child.content for child in token.children or ()))
        elif token.type == "table_close":
            yield rows


def table(body: str, first: str) -> dict[str, list[str]]:
    """First cell → the others, of the table whose head begins with `first`."""
    [rows] = [rows[1:] for rows in tables(body) if rows[0][0] == first]
    return {row[0]: row[1:] for row in rows}


def test_every_number_recomputes_from_the_sidecars(store: Store) -> None:
    rows, (_, body) = rows_of(Path(store.root)), card_of(store)
    samples = [row for row in rows if row["status"] == "ok"]
    assert 0 < len(samples) < 6, "one must be quarantined, for the card to leave it out"
    assert f"{len(samples)} samples in 2 shards, made from 8 inputs" in body
    [ledger] = [rows[1:] for rows in tables(body) if rows[0] == ["status", "reason", "inputs"]]
    expected = Counter((row["status"], row["reason"]) for row in rows if row["status"] != "ok")
    assert {
        (how, reason): int(count) for how, reason, count in ledger if how != "written"
    } == expected
    licenses = Counter(" ".join((row["license"] or "not stated").split()) for row in samples)
    assert {name: int(count) for name, [count] in table(body, "licence").items()} == licenses
    assert sum(int(count) for [count] in table(body, "author").values()) == len(samples)
    stated = sum(bool(row["person"]) for row in samples)
    assert f"The source states the person of {stated} samples" in body and stated > 0
    assert "Lovelace" not in body
    identities = pq.read_table(Path(store.root) / "identities.parquet").to_pylist()
    sides = {
        side: [
            str(sum(row["split"] == side for row in identities)),
            str(len({row["identity_id"] for row in identities if row["split"] == side})),
        ]
        for side in {row["split"] for row in identities}
    }
    assert table(body, "split") == sides
    assert table(body, "setting")["rules.min_face"][0] in ("265", "265.0")
    dataset = json.loads(store.read("dataset.json"))
    assert [row[0] for row in table(body, "stage").values()] == dataset["signatures"]
    for weight in dataset["weights"]:
        assert table(body, "weights")[weight["file"]][:2] == [weight["sha256"], weight["license"]]
    assert table(body, "weights")["w600k_mbf.onnx"][2] == "no"


def test_text_from_outside_stays_in_its_cell(store: Store) -> None:
    head, body = card_of(store)
    samples = [row for row in rows_of(Path(store.root)) if row["status"] == "ok"]
    assert EVIL in {row["license"] for row in samples}, "or this tests nothing"
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    assert not [token for token in tokens if token.type.startswith("html")]
    headings = [
        tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"
    ]
    assert not [title for title in headings if "hi" in title.split()]
    assert "CC|BY # hi <script>" in table(body, "licence")
    authors = table(body, "author")
    for row in samples:
        assert (" ".join(row["author"].replace("\u202e", " ").split()) or "not stated") in authors
    assert "\u202e" not in body
    assert (
        "cc0-1.0" in head["license"] and "other" in head["license"] and head["license_name"] == EVIL
    )


def test_the_front_matter_names_the_samples_and_not_the_quarantine(store: Store) -> None:
    [entry] = card_of(store)[0]["configs"][0]["data_files"]
    names = {path.name for path in Path(store.root).glob(entry["path"])}
    assert names == {"fgid-000000.tar", "fgid-000001.tar"}
    assert list(Path(store.root).glob("shards/*.quarantine.tar")), (
        "nothing is quarantined, so the pattern proves nothing"
    )


def test_the_card_names_no_image_no_path_and_no_host(store: Store) -> None:
    sources = [row["source"] for row in rows_of(Path(store.root))]
    dataset = json.loads(store.read("dataset.json"))
    for name in ("README.md", "croissant.json"):
        text = store.read(name).decode()
        for private in (
            *sources,
            "person of note",
            dataset["source"],
            store.root,
            str(Path.home()),
        ):
            assert private not in text, f"{name} holds {private}"
        assert not platform.node() or f'"{platform.node()}"' not in text


def test_equal_outputs_give_equal_bytes(store: Store, copy: Store) -> None:
    for path in Path(copy.root).glob("shards/*.json"):
        manifest = json.loads(path.read_text())
        manifest["run"] |= {"finished": 1.0, "host": "elsewhere", "seconds": 9.0}
        path.write_text(json.dumps(manifest))
    for name in ("README.md", "croissant.json"):
        before = store.read(name)
        copy.remove(name)
        write_card(copy)
        assert copy.read(name) == before


def test_every_field_is_described(store: Store) -> None:
    body = card_of(store)[1]
    [files] = [rows[1:] for rows in tables(body) if rows[0] == ["file", "holds"]]
    assert [name for name, _ in files] == [f"KEY.{extension}" for extension in MEMBERS]
    columns = [rows[1:] for rows in tables(body) if rows[0] == ["column", "holds"]]
    assert [[name for name, _ in rows] for rows in columns] == [
        pq.read_schema(Path(store.root) / "shards/fgid-000000.parquet").names,
        IDENTITIES_SCHEMA.names,
    ]
    assert {*STANDARD_COLUMNS} <= {name for name, _ in columns[0]}
    assert all(text for rows in (files, *columns) for _, text in rows)


def test_croissant_is_valid_and_its_records_are_the_rows(store: Store) -> None:
    dataset = mlcroissant.Dataset(jsonld=store.path("croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert {each.id for each in dataset.metadata.record_sets} == {
        *("samples", "inputs", "label_maps", "sample_files", "identities", "splits"),
    }
    for name, expected in (
        ("inputs", rows_of(Path(store.root))),
        ("identities", pq.read_table(Path(store.root) / "identities.parquet").to_pylist()),
    ):
        records = [plain(record) for record in dataset.records(name)]
        assert len(records) == len(expected) > 0
        for record, row in zip(records, expected, strict=True):
            assert record == plain(row)


def check_digests(store: Store) -> None:
    """Checks that croissant.json lists every file with its digest."""
    distribution = json.loads(store.read("croissant.json"))["distribution"]
    root = Path(store.root)
    files = [
        *root.glob("shards/fgid-??????.tar"),
        *root.glob("shards/*.parquet"),
        root / "identities.parquet",
    ]
    assert {n["contentUrl"]: n["sha256"] for n in distribution if "contentUrl" in n} == {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_croissant_lists_every_file_with_its_digest(store: Store) -> None:
    check_digests(store)


def test_a_take_down_is_counted_and_the_digests_are_updated(copy: Store) -> None:
    sample = next(row for row in rows_of(Path(copy.root)) if row["status"] == "ok")
    settings = load_text(DatasetConfig, copy.read("config.yaml").decode(), [f"output={copy.root}"])
    assert "Nothing was taken down" in card_of(copy)[1]
    take_down(
        copy, settings, by_source(copy, sample["source"]), "source", "asked by person of note"
    )
    write_card(copy)
    body = card_of(copy)[1]
    assert table(body, "by") == {"source": ["1", "1"]}
    assert "person of note" not in body and ["dropped", "taken_down", "1"] in [
        r for t in tables(body) for r in t
    ]
    check_digests(copy)


def test_the_card_of_a_version_2_data_set_has_current_names(tmp_path: Path) -> None:
    shutil.copytree("tests/data/dataset_v2", tmp_path / "out")
    store = Store(str(tmp_path / "out"))
    write_card(store)
    body = card_of(store)[1]
    assert "quality_filter-1-" in body and "global_pass.val_share" in body
    assert "judge" not in body and "neighbours" not in body
    assert "other signatures" not in body, "both shards were made by the last run"
    described = store.read("croissant.json").decode()
    assert "quality_filter" in described and "judge" not in described


def test_mlcroissant_reads_the_rows_of_shards_of_which_some_lack_a_column(copy: Store) -> None:
    """As where an older program wrote them."""
    first = Path(copy.path("shards/fgid-000000.parquet"))
    pq.write_table(pq.read_table(first).drop_columns(["person"]), first)
    write_card(copy)
    records = mlcroissant.Dataset(jsonld=copy.path("croissant.json")).records("inputs")
    assert sum("inputs/key" in row for row in records) == len(rows_of(Path(copy.root)))
    assert "| person |" in card_of(copy)[1]


def test_an_identity_on_both_sides_is_stated(copy: Store) -> None:
    assert "No identity is on both sides" in card_of(copy)[1]
    path = Path(copy.root) / "identities.parquet"
    identities = pq.read_table(path)
    one = identities.set_column(2, "identity_id", pa.array(["id-1"] * len(identities)))
    pq.write_table(one, path)
    write_card(copy)
    body = card_of(copy)[1]
    assert "1 identities are on both sides" in body and "No identity is on both sides" not in body


def test_an_output_without_a_sample_has_a_card_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/page.jpg").write_bytes(b"<!doctype html>")
    run(config(tmp_path / "in", tmp_path / "out"))
    store = Store(str(tmp_path / "out"))
    write_card(store)
    assert card_of(store)[0]["license"] == "unknown"
    assert not mlcroissant.Dataset(jsonld=store.path("croissant.json")).metadata.ctx.issues.errors

"""The report: its figures recompute from the shards, and its page runs nothing that came with them."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import statistics
import subprocess
import tarfile
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs.errors import ShardError
from pipelines.dataset import run
from pipelines.report import INDEX, STATS, compute_stats, images_per_second, write_report
from pipelines.report.contact import MAX_SAMPLES, PALETTE, contact_sheet
from pipelines.report.spread import spread
from pipelines.shards import PlannedShard, ShardRun, commit, manifests
from pipelines.store import Store
from stages.codec import encode_jpeg, encode_labels
from stages.record import Face, Record, Status, key_of
from stages.regions import LABEL_IDS, LABELS, REGION_LABELS
from tests.pipelines.helpers import config

EVIL = "<script>alert(1)</script>"
EVIL_IMAGE = '"><img src=x onerror=alert(2)>'
SIZES = ((512, 512), (768, 512), (512, 640), (96, 64))
RED = (230, 30, 30)


# ------------------------------------------------------------------------------------------------ data sets


def written(number: int, width: int, height: int, **changes: Any) -> Record:
    """A whole sample: grey, with a red nose that the label map marks; the number decides which regions are missing."""
    x1, y1, x2, y2 = width // 4, height // 3, width // 4 + width // 5, height // 3 + height // 4
    image = np.full((height, width, 3), 110 + number % 40, np.uint8)
    labels = np.zeros((height, width), np.uint8)
    labels[height // 8 : -height // 8, width // 8 : -width // 8] = LABEL_IDS["skin"]
    for offset, name in enumerate(("left_eye", "right_ear", "lower_lip", "hair")):
        if number % (offset + 2):
            labels[: height // 10 + number, offset * width // 5 : (offset + 1) * width // 5] = LABEL_IDS[name]
    labels[y1:y2, x1:x2] = LABEL_IDS["nose"]
    image[y1:y2, x1:x2] = RED
    faces = tuple(
        Face(
            box=(5.5 + i, 4.0, 40.25 + number, 60.0 + i), landmarks=((x1 + 1.0, y1 + 1.0),) * 5, score=0.5 + number / 99
        )
        for i in range(1 + number % 3)
    )
    record = Record(
        key=key_of(f"{number}.jpg"), source=f"{number}.jpg", image=encode_jpeg(image, 95), width=width, height=height,
        faces=faces, face=len(faces) - 1, parsing=encode_labels(labels), identity=np.full(512, 512**-0.5, np.float32),
        caption="a coarse one " * (1 + number % 5), face_caption="fine, über alles " * (1 + number % 7),
    )  # fmt: skip
    return replace(record, **changes)


def ended(source: str, status: Status, reason: str, stage: str, detail: str = "") -> Record:
    return Record(key=key_of(source), source=source, status=status, reason=reason, stage=stage, detail=detail)


def shards() -> list[list[Record]]:
    """Four shards: plain, mixed, one where nothing was written, and one with evil words in every text."""
    many = [ended(f"copy {i}.png", Status.DROPPED, "duplicate", "source", f"of {i}") for i in range(7)]
    evil = ended(f"{EVIL_IMAGE}.jpg", Status.FAILED, "not_an_image", "resize", EVIL)
    return [
        [written(number, *SIZES[number % 4]) for number in range(9)],
        [*many[:3], *(written(number, *SIZES[number % 4]) for number in range(9, 30)), evil],
        [*many[3:], ended("dark.png", Status.DROPPED, "no_face", "detect")],
        [written(99, 512, 512, caption=EVIL, face_caption=EVIL_IMAGE, source=EVIL, license=EVIL, author=EVIL_IMAGE)],
    ]


def make(folder: Path, parts: list[list[Record]]) -> Store:
    store = Store(str(folder))
    for index, records in enumerate(parts):
        timing = ShardRun({"source": 0.25, "parse": 0.75}, "inline", started=0.0)
        shard = PlannedShard(index=index, inputs=len(records), bytes=0, digest="digest")
        commit(store, shard, records, ["parse-1-abc"], timing)
    return store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = make(tmp_path_factory.mktemp("made"), shards())
    weights = [{"name": "w", "file": "w.onnx", "sha256": "00", "license": EVIL}]
    store.write("dataset.json", json.dumps({"source": EVIL_IMAGE, "weights": weights}))
    write_report(store)
    return store


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, poisoned: Path) -> Store:
    """The poisoned set through the real stages, in shards of four."""
    output = tmp_path_factory.mktemp("real")
    run(config(poisoned, output))
    write_report(str(output))
    return Store(str(output))


# --------------------------------------------------------------------------------- figures, recomputed apart


def tar_samples(folder: Path) -> list[tuple[dict[str, Any], np.ndarray, str]]:
    """(json, label map, caption) of every sample, read with nothing but tarfile, json and Pillow."""
    samples = []
    for path in sorted(folder.glob("shards/*.tar")):
        with tarfile.open(path) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for key in dict.fromkeys(name.split(".", 1)[0] for name in data):
            labels = np.asarray(Image.open(io.BytesIO(data[f"{key}.parsing.png"])))
            samples.append((json.loads(data[f"{key}.json"]), labels, data[f"{key}.txt"].decode()))
    return samples


def check_spread(found: dict[str, Any], values: list[float]) -> None:
    assert found["count"] == len(values)
    assert found["counts"] == np.histogram(values, found["edges"])[0].tolist()
    assert found["min"] == round(min(values), 6)
    assert found["max"] == round(max(values), 6)
    assert found["mean"] == round(statistics.fmean(values), 6)
    assert found["median"] == round(float(np.median(values)), 6)


def label_shares(labels: np.ndarray) -> dict[int, float]:
    found = zip(*np.unique(labels, return_counts=True), strict=True)
    return {int(label): float(np.float32(count / labels.size)) for label, count in found}


def check_area(found: dict[str, Any], labels: tuple[str, ...], shares_of: list[dict[int, float]]) -> None:
    shares = [sum(shares.get(LABEL_IDS[name], 0.0) for name in labels) for shares in shares_of]
    present = [share for share in shares if share]
    assert found["missing"] == len(shares) - len(present)
    assert found["missing_rate"] == round(1 - len(present) / len(shares), 6)
    if present:
        check_spread(found["area"], present)


@pytest.mark.parametrize("name", ["made", "real"])
def test_every_figure_recomputes_from_the_shards(name: str, request: pytest.FixtureRequest) -> None:
    store: Store = request.getfixturevalue(name)
    data = json.loads(store.read(STATS))["data"]
    samples = tar_samples(Path(store.root))
    rows = [
        row for path in sorted(Path(store.root).glob("shards/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert data.pop("inputs") == len(rows)
    assert data.pop("written") == len(samples) > 0
    for status in ("dropped", "failed"):
        assert data.pop(status) == dict(Counter(row["reason"] for row in rows if row["status"] == status))
    stages = {row["stage"] for row in rows if row["status"] != "ok"}
    assert data.pop("by_stage") == {
        stage: {s: sum(row["status"] == s and row["stage"] == stage for row in rows) for s in ("dropped", "failed")}
        for stage in stages
    }
    for entry in data.pop("reasons"):
        same = [row for row in rows if all(row[column] == entry[column] for column in ("status", "stage", "reason"))]
        assert entry["count"] == len(same)
        assert entry["examples"] == [{"source": row["source"], "detail": row["detail"]} for row in same[:5]]
    for shard in data.pop("shards"):
        table = pq.read_table(Path(store.root) / "shards" / f"{shard['shard']}.parquet").to_pylist()
        tar = (Path(store.root) / "shards" / f"{shard['shard']}.tar").stat().st_size
        states = Counter(row["status"] for row in table)
        assert (shard["inputs"], shard["written"]) == (len(table), states["ok"])
        assert (shard["dropped"], shard["failed"]) == (states["dropped"], states["failed"])
        assert 0 <= tar - shard["tar_bytes"] <= 20 * 512  # the tar's own end mark
    metas = [meta for meta, _, _ in samples]
    chosen = [meta["faces"][meta["face"]] for meta in metas]
    assert data.pop("faces_per_image") == {
        str(n): count for n, count in sorted(Counter(len(meta["faces"]) for meta in metas).items())
    }
    check_spread(data.pop("detection_score"), [face["score"] for face in chosen])
    sides = [min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (face["box"] for face in chosen)]
    check_spread(data.pop("face_size"), sides)
    sizes = {(size["width"], size["height"]): size["count"] for size in data.pop("image_sizes")}
    assert sizes == Counter(labels.shape[::-1] for _, labels, _ in samples)
    shares_of = [label_shares(labels) for _, labels, _ in samples]
    for found, names in (
        (data.pop("regions"), REGION_LABELS),
        (data.pop("labels"), {name: (name,) for name in LABELS}),
    ):
        assert list(found) == list(names)
        for word in names:
            check_area(found[word], names[word], shares_of)
    for texts, name_of in (
        ([text for *_, text in samples], "caption"),
        ([m["face_caption"] for m in metas], "face_caption"),
    ):
        found = data.pop(name_of)
        check_spread(found["words"], [len(text.split()) for text in texts])
        check_spread(found["characters"], [len(text) for text in texts])
    assert not data, f"figures that nothing recomputes: {list(data)}"


def test_equal_outputs_give_equal_reports(made: Store, tmp_path: Path) -> None:
    before = made.read(STATS), made.read(INDEX)
    shutil.copytree(made.root, tmp_path / "elsewhere")
    write_report(str(tmp_path / "elsewhere"))
    assert ((tmp_path / "elsewhere" / STATS).read_bytes(), (tmp_path / "elsewhere" / INDEX).read_bytes()) == before


def test_time_counts_only_while_a_shard_is_made(made: Store, tmp_path: Path) -> None:
    store = make(tmp_path, shards())
    spans = {0: (10.0, 4.0), 1: (12.0, 4.0), 2: (110.0, 5.0), 3: (111.0, 2.0)}  # finished, seconds
    for index, (finished, seconds) in spans.items():
        path = tmp_path / f"shards/fgid-{index:06d}.json"
        manifest = json.loads(path.read_text())
        manifest["run"] |= {"finished": finished, "seconds": seconds}
        path.write_text(json.dumps(manifest))
    runs = compute_stats(store)["runs"]
    assert runs["seconds"] == 12.0  # 6 to 12 and 105 to 111: the hour at lunch is no work
    assert runs["images_per_second"] == round(compute_stats(made)["data"]["inputs"] / 12, 3)
    second = [manifest for manifest in manifests(store) if manifest["run"]["finished"] > 100]  # of a run that resumed
    assert images_per_second(second) == round(sum(manifest["inputs"] for manifest in second) / 6, 3)
    assert runs["stage_seconds"] == {"source": 1.0, "parse": 3.0}
    assert runs["stage_share"] == {"source": 0.25, "parse": 0.75}


@pytest.mark.parametrize("change", [{"written": 8}, {"inputs": 10}, {"dropped": {"no_face": 1}}, {"failed": {"x": 1}}])
def test_a_ledger_that_does_not_balance_is_an_error(tmp_path: Path, change: dict[str, Any]) -> None:
    store = make(tmp_path, shards()[:1])
    path = tmp_path / "shards/fgid-000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShardError, match=r"fgid-000000 doesn't balance"):
        write_report(store)
    assert not store.exists(INDEX)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no committed shard"):
        write_report(str(tmp_path / "empty"))
    store = make(tmp_path, shards()[:1])
    (tmp_path / "shards/fgid-000000.tar").unlink()
    with pytest.raises(ShardError, match="fgid-000000 has a manifest and no tar"):
        write_report(store)
    (tmp_path / "shards/fgid-000000.parquet").unlink()
    with pytest.raises(ShardError, match="fgid-000000 has a manifest and no sidecar"):
        write_report(store)


def test_a_data_set_without_a_sample_still_has_its_report(tmp_path: Path) -> None:
    store = make(tmp_path, shards()[2:3])
    stats = write_report(store)
    assert stats["data"]["written"] == 0
    assert stats["data"]["regions"]["nose"]["missing_rate"] is None
    assert "no samples" in Page(store).text


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60), st.booleans())
def test_a_histogram_holds_every_value_once(values: list[float], whole: bool) -> None:
    values = [float(round(value)) for value in values] if whole else values
    found = spread(values, whole=whole)
    edges, counts = found["edges"], found["counts"]
    assert edges == sorted(set(edges))
    assert edges[0] <= min(values) <= max(values) < edges[-1]
    assert sum(counts) == len(values) and len(counts) <= 26
    assert counts == [sum(a <= value < b for value in values) for a, b in itertools.pairwise(edges)]
    assert not whole or all(float(edge).is_integer() for edge in edges)


# ------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """index.html, parsed: every tag with its attributes, the visible text, the scripts."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [""], ""
        self.feed(store.read(INDEX).decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def test_words_from_outside_are_text_and_nothing_else(made: Store) -> None:
    page = Page(made)
    assert page.text.count(EVIL) == 5  # detail, caption, source and licence of a sample, licence of the weights
    assert page.text.count(EVIL_IMAGE) == 4  # source of the failed one, face caption, author, source of the data set
    assert "".join(page.scripts) == Path("pipelines/report/page.js").read_text(encoding="utf-8")
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [a["alt"] for tag, a in page.tags if tag == "img" and EVIL in (a["alt"] or "")] == [EVIL]


def test_the_page_needs_nothing_from_anywhere(made: Store) -> None:
    links = [a[name] for _, a in Page(made).tags for name in ("src", "href", "srcset", "action", "data") if name in a]
    assert len(links) > 2 * 31
    assert all((link or "").startswith(("data:", "#")) or link == "stats.json" for link in links)
    assert "url(" not in made.read(INDEX).decode()
    assert "@import" not in made.read(INDEX).decode()


@pytest.mark.parametrize("content", ["[1, 2", "[]", '{"weights": "none", "source": null}', '{"weights": [1, {}]}'])
def test_any_dataset_json_will_do(tmp_path: Path, content: str) -> None:
    store = make(tmp_path, shards()[:1])
    store.write("dataset.json", content)
    write_report(store)
    assert "9 of 9 samples" in Page(store).text


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def colour(label: str) -> tuple[int, ...]:
    return (*bytes.fromhex(PALETTE[LABEL_IDS[label]][1:]), 255)


@pytest.mark.parametrize("size", SIZES)
def test_the_overlay_lies_on_its_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    (sample,) = contact_sheet(make(tmp_path, [[written(1, *size)]]), [{"shard": "fgid-000000", "written": 1}])
    photo, overlay = decoded(sample.photo), decoded(sample.overlay).convert("RGBA")
    assert photo.size == overlay.size
    assert max(photo.size) == min(256, max(size))
    marked = (np.asarray(overlay) == colour("nose")).all(-1)
    red = np.asarray(photo)[..., 0].astype(int) - np.asarray(photo)[..., 1] > 80
    assert (marked ^ red).sum() <= 0.5 * (sum(np.ptp(np.nonzero(red), axis=1)) + 2)  # at most a quarter of its outline
    assert (np.asarray(overlay)[..., 3] == 0).any(), "the background is clear"


def test_noses_of_real_faces_are_coloured_as_noses(real: Store) -> None:
    samples = contact_sheet(real, compute_stats(real)["data"]["shards"])
    assert len(samples) >= 6
    for sample in samples:
        overlay = decoded(sample.overlay).convert("RGBA")
        x, y = sample.faces[sample.face].landmarks[2]
        at = int(x * overlay.width / sample.width), int(y * overlay.height / sample.height)
        assert overlay.getpixel(at) == colour("nose"), sample.source


def test_the_sheet_is_spread_evenly_over_the_shards(made: Store) -> None:
    table = compute_stats(made)["data"]["shards"]
    sheet = contact_sheet(made, table, count=10)
    assert Counter(sample.shard for sample in sheet) == {"fgid-000000": 3, "fgid-000001": 7}  # 9, 21, 0 and 1 written
    assert len({sample.key for sample in sheet}) == 10
    assert len(contact_sheet(made, table)) == 31 <= MAX_SAMPLES


def test_an_interrupted_run_says_so(real: Store, tmp_path: Path) -> None:
    shutil.copytree(real.root, tmp_path / "out")
    (tmp_path / "out/shards/fgid-000003.json").unlink()
    store = Store(str(tmp_path / "out"))
    assert write_report(store)["plan"]["shards"] == 4
    assert "3 of 4 planned shards are committed" in Page(store).text


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_chromium_shows_it_without_a_complaint(made: Store, tmp_path: Path) -> None:
    offline = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
        --disable-component-update --disable-sync --host-resolver-rules=MAP\t*\t~NOTFOUND --enable-logging=stderr --v=0"
    flags = [flag.replace("\t", " ") for flag in offline.split(" ") if flag]
    page = Path(made.path(INDEX)).as_uri()
    command = ["chromium", *flags, f"--user-data-dir={tmp_path}", "--dump-dom", page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert '<div id="controls">' in done.stdout, "the page's own script must run under its policy"

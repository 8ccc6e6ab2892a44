"""Inspect: any input is found and shown from its own bytes, and its texts are escaped."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner, Result

from configs.errors import PipelineError
from configs.load import load_text
from configs.schema import DatasetConfig
from pipelines.cli import app
from pipelines.inspect.find import Inspection, inspect
from pipelines.inspect.panes import COLORS, half_blocks, panes
from pipelines.inspect.tables import show
from pipelines.run import run
from pipelines.takedown import by_source, take_down
from stages.codec import decode_jpeg, decode_labels
from stages.record import Record, Status, key_of
from stages.regions import LABEL_IDS, REGION_WORDS
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.manifest import RunInfo
from stages.storage.reader import DatasetReader
from stages.storage.store import Store
from tests.pipelines.helpers import config

EVIL = "evil\x1b[31m[red] ünï\u202e.jpg"
MIN_FACE = 265  # pixels; the face of one of the four portraits is smaller


@pytest.fixture(scope="module")
def dataset(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four portraits, two with the same base name, one with a hostile name, one quarantined for a
    small face; an image without a face; and an HTML page."""
    folder = tmp_path_factory.mktemp("in")
    names = ("a/one.jpg", EVIL, "b/one.jpg", "small.jpg")
    for name, path in zip(names, sorted(portraits.glob("*.jpg")), strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / name)
    Image.new("RGB", (400, 300), "grey").save(folder / "nobody.jpg")
    (folder / "page.jpg").write_bytes(b"<!doctype html>")
    output = tmp_path_factory.mktemp("dataset") / "out"
    run(
        config(
            folder,
            output,
            f"rules.min_face={MIN_FACE}",
            "global_pass.max_hash_distance=-1",
            "source.author=[bold]Ada",
        )
    )
    return Store(str(output))


def call(store: Store, *arguments: object) -> Result:
    return CliRunner().invoke(
        app, ["inspect", store.root, *(str(argument) for argument in arguments)]
    )


def printed(inspection: Inspection, width: int = 100, terminal: bool = False) -> str:
    out = io.StringIO()
    colors: Literal["truecolor"] | None = "truecolor" if terminal else None
    show(
        inspection,
        Console(file=out, width=width, force_terminal=terminal, color_system=colors, markup=False),
    )
    return out.getvalue()


# --------------------------------------------------------------------------------------------------


def test_a_key_its_beginning_and_a_name_find_the_same(dataset: Store) -> None:
    key = key_of("small.jpg")
    for text in (key, key.upper(), key[:6], "small.jpg"):
        assert inspect(dataset, text).row["source"] == "small.jpg"
    assert inspect(dataset, "a/one.jpg").row["key"] == key_of("a/one.jpg")


def test_several_are_listed_and_none_gives_the_closest(dataset: Store) -> None:
    several = call(dataset, "one.jpg")
    assert several.exit_code == 2 and "may mean 2 inputs" in several.stderr
    assert all(key_of(f"{folder}/one.jpg") in several.stderr for folder in "ab")
    none = call(dataset, "smal.jpg")
    assert none.exit_code == 2 and "closest names are small.jpg" in none.stderr
    short = call(dataset, key_of("small.jpg")[:3])
    assert short.exit_code == 2 and "at least its first 4 digits" in short.stderr


def test_at_most_ten_are_listed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    names = [f"{number}/same.jpg" for number in range(13)]
    records = [
        Record(key=key_of(n), source=n, status=Status.FAILED, reason="http_404", stage="source")
        for n in names
    ]
    shard = PlannedShard(index=0, inputs=len(records), bytes=0, digest="")
    commit(store, shard, records, ChainInfo((), ()), RunInfo(finished=0.0, seconds=0.0))
    with pytest.raises(PipelineError, match="may mean 13 inputs") as caught:
        inspect(store, "same.jpg")
    assert str(caught.value).count("http_404") == 10 and "and 3 more" in str(caught.value)


def test_a_missing_sidecar_is_named(dataset: Store, tmp_path: Path) -> None:
    shutil.copytree(dataset.root, tmp_path / "copy")
    (tmp_path / "copy/shards/fgid-000000.parquet").unlink()
    done = call(Store(str(tmp_path / "copy")), "page.jpg")
    assert done.exit_code == 2 and "fgid-000000.parquet is missing" in done.stderr


# --------------------------------------------------------------------------------------------------


def test_everything_recorded_of_a_sample_is_shown(dataset: Store) -> None:
    inspection = inspect(dataset, "a/one.jpg")
    row, identity = inspection.row, inspection.identity
    assert identity is not None and row["status"] == "ok"
    text = " ".join(printed(inspection).split())
    for text_part in (
        row["key"],
        row["sha256"],
        "[bold]Ada",
        "not stated",
        identity["identity_id"],
        identity["split"],
    ):
        assert text_part in text
    assert f"{inspection.shard}.tar, {row['tar_size']:,} bytes at {row['tar_offset']:,}" in text
    assert f"source size {row['source_width']} × {row['source_height']}" in text
    assert f"face size, px {row['face_side']:.3f} at least {MIN_FACE}" in text
    for name in ("sharpness", "brightness", "clipped", "occlusion"):
        assert f"{name} {row[name]:.3f}" in text
    for key, cosine in zip(identity["nearest"], identity["similarity"], strict=True):
        assert f"{key} cosine {cosine:.3f}" in text
    nose = row["label_areas"][LABEL_IDS["nose"]]
    assert f"nose {nose:.2%}" in text and "□ glasses" in text
    assert row["caption"] in text and row["face_caption"] in text
    assert f"training text {row['text_tokens']} of 75; {row['cut']:.0%} cut" in text
    fused = [
        word for word, status in zip(REGION_WORDS, row["regions"], strict=True) if status == "fused"
    ]
    assert f"fused {', '.join(fused)}" in text and fused


def test_missing_regions_and_how_training_uses_the_others_are_shown(dataset: Store) -> None:
    inspection = inspect(dataset, "a/one.jpg")
    areas = list(inspection.row["label_areas"])
    areas[LABEL_IDS["left_ear"]] = areas[LABEL_IDS["right_ear"]] = 0.0
    regions = ["", "absent", "", "caption_too_long", ""]  # face, ears, eyes, nose, mouth
    inspection.row.update(label_areas=areas, regions=regions, trainable=False)
    text = " ".join(printed(inspection).split())
    assert "ears missing □ left ear □ right ear" in text and "named, not shown ears" in text
    assert "not fused nose: caption too long" in text and "not trainable" in text


def test_metrics_are_red_where_the_quality_filter_would_drop(dataset: Store) -> None:
    inspection = inspect(dataset, "a/one.jpg")
    main_face = inspection.row["faces"][inspection.row["face"]]
    red, small = "\x1b[1;31m", {**main_face, "box": [0.0, 0.0, 20.0, 20.0]}

    def line(name: str) -> str:
        lines = printed(inspection, terminal=True).splitlines()
        return next(line for line in lines if name in line)

    inspection.row.update(faces=[main_face, small], face=0, face_count=2, yaw=-70.0)
    assert "2" in line("faces per image") and red not in line("faces per image")
    assert "-70" in line("yaw") and red in line("yaw") and red not in line("pitch")
    inspection.row.update(faces=[main_face, main_face])
    assert red in line("faces per image")


def test_words_that_name_a_region_stand_out(dataset: Store) -> None:
    lines = printed(inspect(dataset, "a/one.jpg"), terminal=True).splitlines()
    [start] = [
        at for at, line in enumerate(lines) if "face caption" in line and "tokens" not in line
    ]
    for word in ("face", "nose"):
        assert any(
            f"m{word}\x1b[0m" in line and "\x1b[1;4" in line for line in lines[start : start + 4]
        ), word


def test_quarantined_failed_and_dropped_inputs_are_shown(dataset: Store) -> None:
    quarantined = inspect(dataset, "small.jpg")
    text = " ".join(printed(quarantined).split())
    assert (
        quarantined.record is not None and "dropped face_too_small (stage quality_filter)" in text
    )
    assert f"{quarantined.shard}.quarantine.tar" in text and quarantined.row["face_side"] < MIN_FACE
    failed = " ".join(printed(inspect(dataset, "page.jpg")).split())
    assert "failed not_an_image (stage resize)" in failed and "in no tar" in failed
    assert "dropped no_face (stage detect)" in " ".join(
        printed(inspect(dataset, "nobody.jpg")).split()
    )


def test_another_configuration_than_the_shards_is_stated(dataset: Store, tmp_path: Path) -> None:
    assert "wasn't made with" not in printed(inspect(dataset, "a/one.jpg"))
    shutil.copytree(dataset.root, tmp_path / "copy")
    store = Store(str(tmp_path / "copy"))
    changed = store.read("dataset.json").decode().replace("quality_filter-1-", "quality_filter-0-")
    store.write("dataset.json", changed)
    assert "of a configuration that the shard wasn't made with" in printed(
        inspect(store, "a/one.jpg")
    )


def test_names_and_captions_are_escaped(dataset: Store) -> None:
    done = call(dataset, EVIL)
    assert done.exit_code == 0 and "evil\\x1b[31m[red] ünï\\u202e.jpg" in done.stdout
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout and "▀" not in done.stdout
    inspection = inspect(dataset, EVIL)
    inspection.row.update(
        caption="a \x1b]0;owned\x07 nose\r\n[red]x", detail="\x9b31m", license="\x00"
    )
    text = printed(inspection, terminal=True)
    assert "\\x1b]0;owned\\x07" in text and "\\r\\n[red]x" in text and "\\x9b31m" in text
    assert not {"\x07", "\x9b", "\x00", "\r"} & set(text) and "\x1b]" not in text
    missing = call(dataset, "evil\x1b[31m[red] ünï.jpg")
    assert (
        missing.exit_code == 2
        and "\x1b[31m[" not in missing.stderr
        and "\\x1b[31m" in missing.stderr
    )


def test_of_a_removed_record_only_the_removal_is_shown(dataset: Store, tmp_path: Path) -> None:
    shutil.copytree(dataset.root, tmp_path / "copy")
    store = Store(str(tmp_path / "copy"))
    settings = load_text(
        DatasetConfig, store.read("config.yaml").decode(), [f"output={store.root}"]
    )
    take_down(store, settings, by_source(store, "b/one.jpg"), "source", "")
    key = key_of("b/one.jpg")
    for text in (key, key[:8], "b/one.jpg"):
        assert call(store, text).stdout == f"{key} was taken down.\n"
    refused = call(store, key, "--png", tmp_path / "x.png")
    assert refused.exit_code == 2 and not (tmp_path / "x.png").exists()


# --------------------------------------------------------------------------------------------------


def test_the_image_is_read_from_its_own_bytes_of_the_tar(dataset: Store, tmp_path: Path) -> None:
    shutil.copytree(dataset.root, tmp_path / "copy")
    store = Store(str(tmp_path / "copy"))
    for name in ("b/one.jpg", "small.jpg"):
        inspection = inspect(store, name)
        kind = "quarantine" if name == "small.jpg" else "tar"
        path = Path(store.path(f"shards/{inspection.tar}"))
        assert path.name == f"{inspection.shard}{'.quarantine' if kind == 'quarantine' else ''}.tar"
        start, size = inspection.row[f"{kind}_offset"], inspection.row[f"{kind}_size"]
        data = path.read_bytes()
        path.write_bytes(b"\xff" * start + data[start : start + size])
        again = inspect(store, name)
        assert again.record is not None and inspection.record is not None
        assert again.record.image == inspection.record.image


def test_the_overlay_lies_on_its_pixels_and_the_chosen_face_is_marked(dataset: Store) -> None:
    inspection = inspect(dataset, "a/one.jpg")
    assert inspection.record is not None
    photo, overlay = panes(inspection)
    image, labels = decode_jpeg(inspection.record.image), decode_labels(inspection.record.parsing)
    assert photo.shape == overlay.shape == image.shape
    for name in ("nose", "skin", "hair"):
        here = labels == LABEL_IDS[name]
        expected = 0.45 * image[here].astype(float) + 0.55 * COLORS[LABEL_IDS[name]]
        assert np.abs(overlay[here].astype(float) - expected).max() <= 1
    x1, y1, x2, y2 = (
        round(value) for value in inspection.row["faces"][inspection.row["face"]]["box"]
    )
    for x, y in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y1)):
        assert tuple(photo[y, x]) == (0, 255, 90)
    left_eye = [
        round(value) for value in inspection.row["faces"][inspection.row["face"]]["landmarks"][:2]
    ]
    assert tuple(photo[left_eye[1], left_eye[0]]) == (255, 40, 80)


def test_an_input_without_a_sample_is_shown_by_its_thumbnail(dataset: Store) -> None:
    inspection = inspect(dataset, "nobody.jpg")
    [photo] = panes(inspection)
    assert inspection.record is None and max(photo.shape) == 96
    assert panes(inspect(dataset, "page.jpg")) == []


@pytest.mark.parametrize("width", [40, 80, 200])
def test_half_blocks_fit_the_terminal(dataset: Store, width: int) -> None:
    text = printed(inspect(dataset, "a/one.jpg"), width, terminal=True)
    blocks = [line for line in text.splitlines() if "▀" in line]
    assert blocks and "\x1b[38;2;" in blocks[0]
    shown = half_blocks(panes(inspect(dataset, "a/one.jpg"), 20)).plain.splitlines()
    assert len(shown) == 10 and {cell_len(line) for line in shown} == {41}
    assert all(line.count("▀") <= width for line in blocks)
    assert "▀" not in printed(inspect(dataset, "a/one.jpg"), width)


def test_png_is_of_full_size_and_replaces_nothing_unasked(dataset: Store, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    assert call(dataset, "a/one.jpg", "--png", path).exit_code == 0
    image = np.asarray(Image.open(path))
    inspection = inspect(dataset, "a/one.jpg")
    photo, overlay = panes(inspection)
    height, width = photo.shape[:2]
    assert np.array_equal(image[:height, :width], photo)
    assert np.array_equal(image[:height, width : 2 * width], overlay)
    assert image.shape[1] > 2 * width and np.ptp(image[:, 2 * width :]) > 100, "the legend is drawn"
    before = path.read_bytes()
    refused = call(dataset, "small.jpg", "--png", path)
    assert (
        refused.exit_code == 2 and "--overwrite" in refused.stderr and path.read_bytes() == before
    )
    assert (
        call(dataset, "small.jpg", "--png", path, "--overwrite").exit_code == 0
        and path.read_bytes() != before
    )
    none = call(dataset, "page.jpg", "--png", tmp_path / "none.png")
    assert none.exit_code == 2 and "has no image, because of not_an_image" in none.stderr
    assert not (tmp_path / "none.png").exists()


def test_every_input_can_be_shown(dataset: Store) -> None:
    rows = [
        row
        for index in (0, 1)
        for row in DatasetReader(dataset).rows(index, ["key", "reason"]).to_pylist()
    ]
    assert len(rows) == 6 and {row["reason"] for row in rows} == {
        "",
        "face_too_small",
        "no_face",
        "not_an_image",
    }
    for row in rows:
        done = call(dataset, row["key"], "--no-image")
        assert done.exit_code == 0 and row["key"] in done.stdout

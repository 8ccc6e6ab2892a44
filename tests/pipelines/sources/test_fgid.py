"""The layout FGID is published in: exported from shards and imported again without a model call,
and imported as others have written it.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from configs.errors import SourceError
from configs.schema import DatasetConfig
from pipelines.cli import app
from pipelines.run import execute, plan_job, run
from pipelines.sources import build_source
from pipelines.sources.fgid import read_identity
from pipelines.sources.objects import read_objects
from stages.base import Failed, Stage
from stages.chain import build_stages
from stages.record import Record
from stages.storage.reader import DatasetReader
from tests.pipelines.helpers import config, digests, new_captions

COUNT = 3


@pytest.fixture(scope="module")
def dataset(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a data set of three portraits."""
    source, output = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("dataset")
    (source / "Ada").mkdir()
    for path in sorted(portraits.glob("*.jpg"))[:COUNT]:
        shutil.copy2(path, source / "Ada")
    stated = ("source.license=CC0-1.0", "source.author=nobody", "source.person_folder=true")
    run(config(source, output, *stated))
    return output


@pytest.fixture(scope="module")
def exported(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `export-json` wrote from `dataset`."""
    folder = tmp_path_factory.mktemp("exported") / "fgid"
    result = CliRunner().invoke(app, ["export-json", str(dataset), str(folder), "--color"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the name of a stage each time its `process` is called."""
    names: list[str] = []
    for stage in build_stages(DatasetConfig()):
        _record_calls(type(stage), names, monkeypatch)
    return names


def _record_calls(kind: type[Stage], names: list[str], patch: pytest.MonkeyPatch) -> None:
    original = kind.process

    def recorded(self: Stage, records: list[Record]) -> list[Record]:
        names.append(self.name)
        return original(self, records)

    patch.setattr(kind, "process", recorded)


def _fgid(path: Path, output: Path, *overrides: str) -> DatasetConfig:
    return config(path, output, "source.kind=fgid", *overrides)


def _entries(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "JSON_all.json").read_text())
    return entries


def _rewrite(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "JSON_all.json").write_text(json.dumps(entries))


def _samples(output: Path) -> dict[str, Record]:
    reader = DatasetReader(str(output))
    records = (record for index in reader.manifests() for record in reader.samples(index))
    return {record.source: record for record in records}


def _reasons(folder: Path, output: Path) -> dict[str, str]:
    """Lists and reads the source only; returns source → reason."""
    source = build_source(_fgid(folder, output))
    return {item.source: source.record(item).reason for item in source.list()}


def test_export_and_import_give_the_same_bytes_without_a_model_call(
    dataset: Path, exported: Path, tmp_path: Path, calls: list[str]
) -> None:
    moved = shutil.copytree(exported, tmp_path / "elsewhere")
    ledger = run(_fgid(moved, tmp_path / "out"))
    assert ledger.written == COUNT and calls == []
    assert digests(tmp_path / "out") == digests(dataset)


def test_the_reference_trainer_can_read_an_export(dataset: Path, exported: Path) -> None:
    """Reads as its MyDataset does: from three root folders, with plain torch.load."""
    samples = _samples(dataset)
    for entry in _entries(exported):
        record = samples[entry["source"]]
        identity = torch.load(exported / "all_faceID" / entry["id_embed_file_origin"])
        assert identity.shape == (1, 512) and record.identity is not None
        assert np.array_equal(identity[0].numpy(), record.identity)
        assert (exported / "resize_IMG" / entry["resize_IMG"]).read_bytes() == record.image
        mask = cv2.imread(
            str(exported / "parsing_mask_IMG" / entry["parsing_mask_IMG"]), cv2.IMREAD_UNCHANGED
        )
        overlay = cv2.imread(str(exported / "parsing_color_IMG" / entry["parsing_color_IMG"]))
        assert mask is not None and overlay is not None
        assert mask.shape == (record.height, record.width) == overlay.shape[:2]
        assert (entry["vqa_llva"], entry["vqa_llva_more_face_detail"]) == (
            record.caption,
            record.face_caption,
        )
        stated = tuple(entry[name] for name in ("license", "author", "person"))
        assert stated == ("CC0-1.0", "nobody", "Ada")


def test_a_folder_with_files_is_refused_without_overwrite(dataset: Path, exported: Path) -> None:
    before = (exported / "JSON_all.json").read_bytes()
    command = ["export-json", str(dataset), str(exported)]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "not empty" in refused.output
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    after = _entries(exported)
    assert [{**entry, "parsing_color_IMG": ""} for entry in json.loads(before)] == [
        {**entry, "parsing_color_IMG": ""} for entry in after
    ]


def test_a_failed_export_leaves_no_json(dataset: Path, tmp_path: Path) -> None:
    output = shutil.copytree(dataset, tmp_path / "copy")
    (tar,) = (output / "shards").glob("*.tar")
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    result = CliRunner().invoke(app, ["export-json", str(output), str(tmp_path / "fgid")])
    assert result.exit_code == 2
    assert list((tmp_path / "fgid" / "resize_IMG").rglob("*.jpg"))
    assert not list((tmp_path / "fgid").glob("*.json"))


def test_what_comes_with_an_entry_is_not_made_again_when_its_stage_changes(
    dataset: Path,
    exported: Path,
    tmp_path: Path,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(_fgid(exported, tmp_path / "out"))
    new_captions(monkeypatch)
    changed = _fgid(exported, tmp_path / "out", "parse.align=never")
    job = plan_job(changed)
    assert len(job.tasks) == 1
    list(execute(job, lambda count: None))
    assert calls == [] and plan_job(changed).tasks == []
    assert digests(tmp_path / "out") == digests(dataset)


def test_a_changed_entry_is_imported_again(
    exported: Path, tmp_path: Path, calls: list[str]
) -> None:
    folder, output = shutil.copytree(exported, tmp_path / "fgid"), tmp_path / "out"
    run(_fgid(folder, output))
    first, second, third = _entries(folder)
    first["vqa_llva"] = "Another description."
    del second["parsing_mask_IMG"]
    _rewrite(folder, [first, second, third])
    before = _samples(output)
    run(_fgid(folder, output, "parse.align=always"))
    after = _samples(output)
    assert calls == ["parse"]
    assert after[first["source"]].caption == "Another description."
    assert after[second["source"]].parsing != before[second["source"]].parsing
    assert after[third["source"]].parsing == before[third["source"]].parsing


@pytest.fixture
def published(exported: Path, tmp_path: Path) -> Path:
    """A set as the authors' machine would have written it: absolute paths of that machine, PNG
    images, other spellings of the keys, one object a line, and no key that only export-json adds.
    """
    folder = tmp_path / "published"
    for kind in ("resize_IMG", "parsing_mask_IMG", "all_faceID"):
        (folder / kind / "15").mkdir(parents=True)
    lines = []
    for number, entry in enumerate(_entries(exported)):
        pixels = cv2.imread(str(exported / "resize_IMG" / entry["resize_IMG"]))
        assert pixels is not None
        cv2.imwrite(str(folder / f"resize_IMG/15/{number}_resize.png"), pixels)
        shutil.copy(
            exported / "parsing_mask_IMG" / entry["parsing_mask_IMG"],
            folder / f"parsing_mask_IMG/15/{number}_mask.png",
        )
        shutil.copy(
            exported / "all_faceID" / entry["id_embed_file_resize"],
            folder / f"all_faceID/15/{number}_faceid.bin",
        )
        line = {
            "resize_IMG": f"/mnt/data/somebody/FGID/resize_IMG/15/{number}_resize.png",
            "parsing_mask_IMG": f"15/{number}_mask.png",
            "parsing_color_IMG": f"15/{number}_color.png",
            "id_embed_file_origin": f"/mnt/data/somebody/15/{number}_nowhere.bin",
            "id_embed_file_resize": f"/mnt/data/somebody/FGID/all_faceID/15/{number}_faceid.bin",
            "vqa_llva": f"Somebody, number {number}.",
            ("vqa_llva_facial", "vqa_llva_face_caption", "vqa_llva_more_face_detail")[
                number
            ]: "A nose.",
        }
        lines.append(json.dumps(line))
    (folder / "JSON_all.json").write_text("\n".join(lines) + "\n")
    return folder


def _published(folder: Path) -> list[dict[str, Any]]:
    return list(read_objects(folder / "JSON_all.json"))


def test_a_published_set_runs_face_detection_only(
    published: Path, dataset: Path, tmp_path: Path, calls: list[str]
) -> None:
    assert run(_fgid(published / "JSON_all.json", tmp_path / "out")).written == COUNT
    assert set(calls) == {"detect"}
    imported = _samples(tmp_path / "out")
    assert set(imported) == {
        f"mnt/data/somebody/FGID/resize_IMG/15/{number}_resize.png" for number in range(COUNT)
    }
    originals = _samples(dataset).values()
    for number, (old, new) in enumerate(zip(originals, imported.values(), strict=True)):
        assert old.parsing == new.parsing and np.array_equal(old.identity, new.identity)  # type: ignore[arg-type]
        assert (new.caption, new.face_caption) == (f"Somebody, number {number}.", "A nose.")
        assert new.image.startswith(b"\xff\xd8") and (new.width, new.height) == (
            old.width,
            old.height,
        )


def test_fields_that_an_entry_lacks_are_computed(
    published: Path, tmp_path: Path, calls: list[str]
) -> None:
    first, second, third = _published(published)
    del first["parsing_mask_IMG"]
    del second["id_embed_file_origin"], second["id_embed_file_resize"]
    del third["vqa_llva_more_face_detail"]
    _rewrite(published, [first, second, third])
    assert run(_fgid(published, tmp_path / "out")).written == COUNT
    assert sorted(calls) == ["caption", "detect", "detect", "detect", "embed", "parse", "resize"]
    records = list(_samples(tmp_path / "out").values())
    assert all(
        record.parsing and record.identity is not None and record.face_caption for record in records
    )
    assert records[0].face_caption == "A nose." != records[2].face_caption


def test_code_in_an_embedding_is_refused_and_not_run(published: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class TouchesFile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    torch.save(TouchesFile(), published / "all_faceID/15/0_faceid.bin")
    reasons = list(_reasons(published, tmp_path / "out").values())
    assert reasons == ["bad_embedding", "", ""] and not trace.exists()
    torch.load(published / "all_faceID/15/0_faceid.bin", weights_only=False)
    assert trace.exists(), "the pickle does nothing, so the test proves nothing"


def test_identities_are_normalised_and_anything_else_is_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32)
    torch.save(torch.from_numpy(values), tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", values[0])
    for name in ("a.bin", "a.npy"):
        identity = read_identity((tmp_path / name).read_bytes())
        assert identity.shape == (512,) and identity.dtype == np.float32
        assert np.allclose(identity, values[0] / np.linalg.norm(values), atol=1e-6)
    np.save(tmp_path / "code.npy", np.array([{}], object), allow_pickle=True)
    torch.save(torch.zeros(1, 512), tmp_path / "zero.bin")
    torch.save(torch.full((1, 512), float("nan")), tmp_path / "nan.bin")
    torch.save(torch.ones(2, 512), tmp_path / "two.bin")
    torch.save({"identity": torch.ones(1, 512)}, tmp_path / "dict.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:700])
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save(torch.zeros(4_000_000), tmp_path / "large.bin")
    with (
        zipfile.ZipFile(tmp_path / "large.bin") as stored,
        zipfile.ZipFile(tmp_path / "bomb.bin", "w", 8) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(Failed, match="unpacks to over"):
        read_identity((tmp_path / "bomb.bin").read_bytes())
    for name in ("code.npy", "zero.bin", "nan.bin", "two.bin", "dict.bin", "cut.bin", "empty.bin"):
        with pytest.raises(Failed) as caught:
            read_identity((tmp_path / name).read_bytes())
        assert caught.value.reason == "bad_embedding", name


def test_a_label_map_must_match_its_image(published: Path, tmp_path: Path) -> None:
    masks = [published / f"parsing_mask_IMG/15/{number}_mask.png" for number in range(COUNT)]
    labels = cv2.imread(str(masks[0]), cv2.IMREAD_UNCHANGED)
    assert labels is not None
    cv2.imwrite(str(masks[0]), labels[:-1])
    labels[0, 0] = 19
    cv2.imwrite(str(masks[1]), labels)
    masks[2].write_bytes(masks[2].read_bytes()[:-100])
    assert list(_reasons(published, tmp_path / "out").values()) == ["bad_parsing"] * COUNT


def test_nothing_outside_the_folder_is_read(published: Path, tmp_path: Path) -> None:
    first, second, third = _published(published)
    shutil.copy(published / "resize_IMG/15/0_resize.png", tmp_path / "secret.png")
    first["resize_IMG"] = "../secret.png"
    (published / "link.png").symlink_to(tmp_path / "secret.png")
    second["resize_IMG"] = "link.png"
    third["resize_IMG"] = str(tmp_path / "secret.png")
    _rewrite(published, [first, second, third])
    assert list(_reasons(published, tmp_path / "out").values()) == [
        "outside_source",
        "outside_source",
        "not_a_file",
    ]


def test_unusable_entries_fail_with_a_reason(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "fgid")
    first, second, third = _entries(folder)
    first["parsing_mask_IMG"] = "gone\0.png"
    second["faces"][0]["landmarks"] = [1, 2, 3]
    third["width"] += 1
    _rewrite(folder, [first, second, third, {"vqa_llva": "\ud800 nobody"}])
    assert list(_reasons(folder, tmp_path / "out").values()) == [
        "not_a_file",
        "bad_faces",
        "bad_faces",
        "bad_entry",
    ]


def test_objects_are_read_across_chunks_and_in_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    entries = [
        {"n": number, "text": '}],{["\\ ünï' * size}
        for number, size in enumerate((1, 40_000, 0, 7, 100_000))
    ]
    for text in (
        json.dumps(entries),
        json.dumps(entries, indent=1),
        "\n".join(map(json.dumps, entries)),
    ):
        file.write_text("\ufeff" + text, encoding="utf-8")
        assert list(read_objects(file)) == entries
    for text in ("[]", "", "\n"):
        file.write_text(text)
        assert list(read_objects(file)) == []
    for text in ('[{"a": 1}, {"b"', '[{"a": 1}', "[1]", "null", '[{"a": 1} x]'):
        file.write_text(text)
        with pytest.raises(SourceError, match="can't be read"):
            list(read_objects(file))


def test_a_missing_set_raises_a_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for path in (folder, folder / "JSON_all.json", Path("s3://bucket/JSON_all.json")):
        settings = replace(_fgid(folder, tmp_path / "out"), source=_fgid(path, folder).source)
        with pytest.raises(SourceError, match="no FGID set"):
            plan_job(settings)

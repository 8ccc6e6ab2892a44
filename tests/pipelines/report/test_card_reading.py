"""The code in the data card, run as it is printed, with the libraries that it names, on a data set
whose samples differ in everything that may differ.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.report import write_report
from pipelines.report.card.readme import write_card
from stages.annotations import ABSENT, FUSED, Measures, Review
from stages.record import Face, Record, Status, key_of
from stages.storage.commit import ChainInfo, PlannedShard, commit
from stages.storage.manifest import RunInfo
from stages.storage.reader import IDENTITIES_SCHEMA, DatasetReader
from stages.storage.samples import to_members
from stages.storage.store import Store
from tests.pipelines.report.helpers import plain, rows_of

VERSION_2 = Path("tests/data/dataset_v2")
ANNOTATIONS = (Measures, Review)
SAMPLES = 130
REGIONS = (("",) * 5, (FUSED, ABSENT, "", "caption_too_long", "word_not_in_caption"))


def record(number: int, rng: np.random.Generator) -> Record:
    """A complete record of 32 × 32 pixels. Samples over 100 differ from the first ones, from which
    libraries infer types: they have a review, regions, a licence, a norm, captions and measures."""
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    vector = rng.standard_normal(512).astype(np.float32)
    late = number > 100
    sample = Record(
        key=key_of(f"{number}.jpg"),
        source=f"{number}.jpg",
        sha256=f"{number:064x}",
        license="CC0-1.0" if late else "",
        author="Ada" if number % 2 else "",
        image=encoded(pixels, "JPEG"),
        parsing=encoded(rng.integers(0, 19, (32, 32), np.uint8), "PNG"),
        thumbnail=encoded(pixels, "WEBP"),
        width=32,
        height=32,
        source_width=640,
        source_height=480,
        faces=tuple(face(rng) for _ in range(1 + number % 3)),
        face=number % (1 + number % 3),
        identity=vector / np.linalg.norm(vector),
        identity_norm=21.5 if late else None,
        caption="A woman." if late or number % 4 else "",
        face_caption="A face." if late else "",
    )
    if number % 5 == 0 or late:
        measures = dict.fromkeys(("sharpness", "brightness", "clipped", "occlusion"), 0.25)
        angles = {"yaw": -3.5, "pitch": 0.0, "roll": 1.0}
        sample = sample.annotated(Measures(**measures, **angles, hash=f"{number:064x}"))
    if number % 7 == 0 or late:
        sample = sample.annotated(
            Review(
                caption_tokens=3,
                face_caption_tokens=2,
                text_tokens=5,
                cut=0.0,
                trainable=late,
                regions=REGIONS[late],
                region_words=(2, 0, 0, 1, 0) if late else (0,) * 5,
            )
        )
    return sample


def face(rng: np.random.Generator) -> Face:
    x, y = rng.uniform(0, 8, 2).tolist()
    return Face(box=(x, y, x + 16, y + 20.5), landmarks=((x, y),) * 5, score=0.75)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    with io.BytesIO() as out:
        Image.fromarray(pixels).save(out, kind)
        return out.getvalue()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with quarantined and failed inputs; the last one has no sample."""
    store = Store(str(tmp_path_factory.mktemp("output") / "out"))
    rng = np.random.default_rng(0)
    samples = [record(number, rng) for number in range(SAMPLES)]
    dropped = {"status": Status.DROPPED, "reason": "blurred", "stage": "quality_filter"}
    quarantined = [replace(record(number, rng), **dropped) for number in range(200, 204)]
    failed = [
        Record(
            key=key_of(f"{number}.jpg"),
            source=f"{number}.jpg",
            status=Status.FAILED,
            reason="truncated",
            stage="resize",
        )
        for number in range(300, 303)
    ]
    shards = [
        [*samples[:60], *quarantined[:2], failed[0]],
        [failed[1], *samples[60:], *quarantined[2:]],
        failed[2:],
    ]
    for index, records in enumerate(shards):
        planned = PlannedShard(index=index, inputs=len(records), bytes=0, digest="")
        chain = ChainInfo(("detect-1-ab",), ANNOTATIONS)
        commit(store, planned, records, chain, RunInfo(finished=1.0, seconds=1.0))
    rows = [
        {"key": sample.key, "shard": int(number >= 60), "split": "train" if number % 5 else "val"}
        for number, sample in enumerate(samples)
    ]
    constant = {"identity_size": 1, "split_group": "group-1", "nearest": [], "similarity": []}
    rows = [{**row, **constant, "identity_id": f"id-{row['key'][:12]}"} for row in rows]
    identities = pa.Table.from_pylist(rows, schema=IDENTITIES_SCHEMA)
    pq.write_table(identities, store.path("identities.parquet"))
    write_card(store, write_report(store))
    return Path(store.root)


def run_code(output: Path, library: str, result: str, scratch: Path) -> Any:
    """Runs the card's code that imports `library`; returns the value of the expression `result`."""
    blocks = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if re.search(rf"^(import|from) {library}\b", block, re.M)]
    script, answer = scratch / "code.py", scratch / "answer.pickle"
    script.write_text(
        f"{code}\nimport pickle\n"
        f"with open({str(answer)!r}, 'wb') as out:\n    pickle.dump({result}, out)\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch / "hf")}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=output,
        env={**os.environ, **offline, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(answer.read_bytes())


def samples_of(folder: Path) -> dict[str, Record]:
    reader = DatasetReader(str(folder))
    return {sample.key: sample for index in reader.manifests() for sample in reader.samples(index)}


def json_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The JSON of every sample, and of every quarantined one."""
    for path in sorted(folder.glob("shards/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    yield json.loads(stream.read())


def json_types(values: Iterator[dict[str, Any]]) -> set[pa.Schema]:
    """The Arrow types that are inferred from each sample's JSON alone."""
    return {pa.Table.from_pylist([value]).schema for value in values}


# ------------------------------------------------------------------------------------------------


def test_webdataset_reads_the_training_side(output: Path, tmp_path: Path) -> None:
    keys = run_code(output, "webdataset", "[sample['__key__'] for sample in samples]", tmp_path)
    identities = pq.read_table(output / "identities.parquet").to_pylist()
    expected = [row["key"] for row in identities if row["split"] == "train"]
    assert sorted(keys) == sorted(expected) and 0 < len(keys) < SAMPLES


def test_datasets_reads_every_sample_in_both_ways(output: Path, tmp_path: Path) -> None:
    result = (
        "[[{**row, 'jpg': row['jpg'].size, 'parsing.png': row['parsing.png'].tobytes()} "
        "for row in data] for data in (by_files, by_card)]"
    )
    expected = samples_of(output)
    for rows in run_code(output, "datasets", result, tmp_path):
        assert [row["__key__"] for row in rows] == list(expected)
        for row in rows:
            sample = expected[row["__key__"]]
            assert row["jpg"] == (32, 32) and row["txt"] == sample.caption
            labels = Image.open(io.BytesIO(sample.parsing))
            assert row["parsing.png"] == labels.tobytes()
            assert np.array_equal(np.float32(row["identity.npy"]), sample.identity)
            members = to_members(sample, ANNOTATIONS)
            assert row["json"] == json.loads(members["json"])


def test_mlcroissant_reads_every_sample_and_every_input(output: Path, tmp_path: Path) -> None:
    result = (
        "[[{name.split('/', 1)[1]: value for name, value in record.items()} for record in records]"
        " for records in (list(samples), list(inputs))]"
    )
    samples, inputs = run_code(output, "mlcroissant", result, tmp_path)
    rows = rows_of(output)
    assert [plain(row) for row in inputs] == [plain(row) for row in rows]
    expected, by_key = samples_of(output), {row["key"]: row for row in rows}
    assert {sample["key"].decode() for sample in samples} == {*expected}
    assert len(samples) == SAMPLES
    for sample in samples:
        key = sample["key"].decode()
        for name, data in (("image", expected[key].image), ("label_map", expected[key].parsing)):
            image, stored = sample.pop(name), Image.open(io.BytesIO(data))
            assert (image.mode, image.tobytes()) == (stored.mode, stored.tobytes())
        assert plain(sample) == plain(by_key[key])


# ------------------------------------------------------------------------------------------------


def test_the_json_of_all_samples_has_one_type(output: Path) -> None:
    values = list(json_of(output))
    assert len(values) == SAMPLES + 4
    for name in ("annotations", "license", "caption", "identity_norm"):
        assert len({bool(value[name]) for value in values}) == 2, f"{name} doesn't vary"
    assert len({len(value["faces"]) for value in values}) == 3
    assert len({tuple(value["review"]["regions"]) for value in values}) == 2
    assert len(json_types(iter(values))) == 1


def test_the_json_of_version_2_has_several() -> None:
    """What the test above guards against: parts that are null, lists that are empty in some samples
    only."""
    values = list(json_of(VERSION_2))
    assert len(json_types(iter(values))) > 1
    value = next(value for value in values if value["review"])
    assert value["review"]["unfused"] == []
    unfused = [["nose", "caption_too_long"]]
    other = {**value, "review": {**value["review"], "unfused": unfused}}
    assert len(json_types(iter([value, other]))) == 2

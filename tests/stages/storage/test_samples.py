"""Samples: records as tar members are read back unchanged; all samples' JSON has one type."""

from __future__ import annotations

import gc
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ShardError
from stages.annotations import ABSENT, FUSED, Measures, Review
from stages.record import Face, Record
from stages.storage.layout import FORMAT_VERSION
from stages.storage.samples import (
    TarWriter,
    from_members,
    parse_sample,
    read_sample,
    record_of,
    to_members,
)
from tests.stages.records import records, same_record

KINDS = (Measures, Review)
FACE = Face(box=(1.0, 2.0, 30.0, 40.0), landmarks=((1.0, 2.0),) * 5, score=0.5)
SAMPLE = Record(
    key="0" * 20,
    source="a",
    image=b"i",
    parsing=b"p",
    identity=np.ones(512, np.float32),
    faces=(FACE,),
    face=0,
)
MEASURES = Measures(
    sharpness=0.3,
    brightness=0.5,
    clipped=0.0,
    yaw=-3.0,
    pitch=0.0,
    roll=1.0,
    occlusion=0.0,
    hash="0" * 64,
)
REVIEW = Review(
    caption_tokens=9,
    face_caption_tokens=30,
    text_tokens=40,
    cut=0.0,
    trainable=True,
    regions=(FUSED, "not_named", ABSENT, "", FUSED),
    region_words=(3, 0, 4, 0, 2),
)


@settings(max_examples=50, deadline=None)
@given(records)
def test_members_round_trip(record: Record) -> None:
    norm = 0.5 if record.identity_norm is None else record.identity_norm
    record = replace(record, identity_norm=norm)
    without_others = replace(record, other_identities=None)  # only the sidecar has them
    assert same_record(from_members(to_members(record, ())), without_others)


def test_writing_an_incomplete_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a complete sample"):
        to_members(Record(key="0" * 20, source="a.jpg", image=b"x"), ())


def test_reading_an_unknown_format_version_is_an_error() -> None:
    members = to_members(SAMPLE, ())
    version = f'"version": {FORMAT_VERSION}'.encode()
    assert version in members["json"]
    members["json"] = members["json"].replace(version, b'"version": 99')
    with pytest.raises(ValueError, match="format version 99"):
        from_members(members)


def test_threads_read_samples_at_the_same_time() -> None:
    members = to_members(SAMPLE, ())
    thresholds = gc.get_threshold()

    def switch_threads(*_: object) -> None:
        time.sleep(0)

    gc.callbacks.append(switch_threads)
    gc.set_threshold(10)  # frequent garbage collections, each of which switches threads
    try:
        for _ in range(40):
            with ThreadPoolExecutor(4) as pool:
                assert len([*pool.map(from_members, [members] * 20)]) == 20
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(switch_threads)


def test_a_pickled_identity_is_not_loaded() -> None:
    members = to_members(SAMPLE, ())
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        from_members({**members, "identity.npy": stream.getvalue()})


def test_missing_fields_get_their_defaults() -> None:
    members = to_members(SAMPLE.annotated(MEASURES), KINDS)
    meta = json.loads(members["json"])
    for name in ("consent", "source_width", "face_caption"):
        del meta[name]
    del meta["measures"]["pitch"]
    record = from_members({**members, "json": json.dumps(meta).encode()})
    assert (record.consent, record.source_width, record.face_caption) == ("", 0, "")
    assert record.annotation(Measures) == replace(MEASURES, pitch=0.0)


def test_the_json_of_all_samples_has_one_type() -> None:
    """Libraries infer the type from the first samples, so there must be no nulls and no missing
    values.
    """
    empty = replace(REVIEW, regions=("",) * 5, region_words=(0,) * 5, trainable=False)
    samples = [
        SAMPLE.annotated(MEASURES).annotated(REVIEW),
        SAMPLE.annotated(MEASURES).annotated(empty),
        SAMPLE.annotated(MEASURES),
        SAMPLE,
        replace(SAMPLE, identity_norm=12.5, faces=(FACE, FACE), license="CC0-1.0", caption="a man"),
    ]
    schemas = [
        pa.Table.from_pylist([json.loads(to_members(sample, KINDS)["json"])]).schema
        for sample in samples
    ]
    assert all(schema == schemas[0] for schema in schemas)
    assert "null" not in str(schemas[0])
    records_read = [from_members(to_members(sample, KINDS)) for sample in samples]
    assert [sorted(record.annotations) for record in records_read] == [
        *[["measures", "review"]] * 2,
        ["measures"],
        [],
        [],
    ]
    assert [record.identity_norm for record in records_read] == [None] * 4 + [12.5]


def test_an_annotation_of_an_unknown_class_is_kept() -> None:
    sample = replace(SAMPLE, annotations={"of_a_later_program": {"value": 3}})
    rewritten = from_members(to_members(from_members(to_members(sample, KINDS)), KINDS))
    assert rewritten.annotations == {"of_a_later_program": {"value": 3}}


def test_a_sample_is_read_from_its_place_in_a_tar_and_from_its_bytes(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as stream:
        tar = TarWriter(stream)
        first = tar.add("0" * 20, to_members(SAMPLE, ()))
        second = tar.add("1" * 20, to_members(replace(SAMPLE, key="1" * 20, caption="b"), ()))
        tar.finish()
    data = (tmp_path / "a.tar").read_bytes()
    assert len(data) == tar.count
    with (tmp_path / "a.tar").open("rb") as stream:
        assert read_sample(stream, {**second, "key": "1" * 20, "source": "a"}).caption == "b"
        with pytest.raises(ShardError, match=r"the tar has sample 1{20} at its place"):
            read_sample(stream, {**second, "key": "0" * 20, "source": "a"})
    part = data[first["offset"] : first["offset"] + first["size"]]
    assert parse_sample(part, "0" * 20, "a.tar").key == "0" * 20
    with pytest.raises(ShardError, match=r"expected sample 1{20}"):
        parse_sample(part, "1" * 20, "a.tar")


@settings(max_examples=300)
@given(place=st.integers(0), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_part_of_a_tar_is_a_sample_or_a_shard_error(
    place: int, value: int, cut: bool
) -> None:
    stream = io.BytesIO()
    TarWriter(stream).add(SAMPLE.key, to_members(SAMPLE, ()))
    part = bytearray(stream.getvalue())
    # in its second half of cases only in headers, which begin with the key
    headers = [at for at in range(0, len(part), 512) if part[at : at + 20] == b"0" * 20]
    at = headers[place % 5] + place // 10 % 512 if place % 2 else place // 2 % len(part)
    part[at] = value
    with suppress(ShardError):
        parse_sample(bytes(part[:at] if cut else part), SAMPLE.key, "a.tar")


def numpy_file(values: object) -> bytes:
    with io.BytesIO() as stream:
        np.save(stream, np.asarray(values, np.float32))
        return stream.getvalue()


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("json", b""),
        ("json", b"[]"),
        ("json", b"\xff"),
        ("json", b'{"version": 3, "faces": 1}'),
        ("identity.npy", b""),
        ("identity.npy", b"\xff" * 64),
        ("identity.npy", numpy_file([1.0])),
        ("identity.npy", numpy_file(np.ones((512, 1)))),
        ("identity.npy", numpy_file(np.ones(512)).replace(b"}", b"[")),
        ("identity.npy", numpy_file(np.ones(512)).replace(b"{'", b"  ").replace(b", ", b"\n ")),
    ],
)
def test_a_damaged_member_is_an_error_that_names_the_sample(member: str, data: bytes) -> None:
    members = {**to_members(SAMPLE, ()), member: data}
    with pytest.raises(ShardError, match="a place can't be read"):
        record_of(members, SAMPLE.key, "a place")

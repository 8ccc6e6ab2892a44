"""Record ⇄ Arrow row ⇄ shard members: nothing is lost, nothing is pickled."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.schema import DatasetConfig, ResizeConfig
from stages.base import BackendStage, Dropped, RecordStage, Stage, check_chain, reject, run_stage
from stages.chain import build_stages
from stages.codec import decode_jpeg, decode_labels, encode_jpeg, encode_labels
from stages.record import Face, Record, Status, from_table, key_of, to_table
from stages.storage.samples import from_members, to_members

number = st.floats(-1e4, 1e4)
faces = st.builds(
    Face,
    box=st.tuples(number, number, number, number),
    landmarks=st.lists(st.tuples(number, number), min_size=5, max_size=5).map(tuple),
    score=st.floats(0, 1),
)
text = st.text(st.characters(codec="utf-8"), max_size=40)
records = st.builds(
    Record,
    key=text.map(key_of),
    source=text,
    sha256=text,
    license=text,
    author=text,
    image=st.binary(min_size=1, max_size=50),
    width=st.integers(0, 9999),
    height=st.integers(0, 9999),
    faces=st.lists(faces, max_size=3).map(tuple),
    face=st.integers(-1, 2),
    parsing=st.binary(min_size=1, max_size=50),
    identity=st.integers(0, 2**31).map(
        lambda seed: np.random.default_rng(seed).standard_normal(512, np.float32)
    ),
    caption=text,
    face_caption=text,
)


def same(one: Record, two: Record) -> bool:
    plain = [f.name for f in fields(Record) if f.name != "identity"]
    return all(getattr(one, n) == getattr(two, n) for n in plain) and np.array_equal(
        one.identity, two.identity
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(records, max_size=3))
def test_arrow_round_trip(given_records: list[Record]) -> None:
    assert all(
        same(a, b) for a, b in zip(given_records, from_table(to_table(given_records)), strict=True)
    )


@settings(max_examples=50, deadline=None)
@given(records)
def test_members_round_trip(record: Record) -> None:
    assert same(from_members(to_members(record)), record)


def test_an_incomplete_record_has_no_members() -> None:
    with pytest.raises(ValueError, match="not a whole sample"):
        to_members(Record(key="0" * 20, source="a.jpg", image=b"x"))


def test_another_schema_is_refused() -> None:
    record = Record(
        key="0" * 20, source="a", image=b"i", parsing=b"p", identity=np.ones(512, np.float32)
    )
    members = to_members(record)
    members["json"] = members["json"].replace(b'"schema": 2', b'"schema": 99')
    with pytest.raises(ValueError, match="schema 99"):
        from_members(members)


def test_a_pickled_identity_is_refused() -> None:
    import io

    record = Record(
        key="0" * 20, source="a", image=b"i", parsing=b"p", identity=np.ones(512, np.float32)
    )
    members = to_members(record)
    sink = io.BytesIO()
    np.save(sink, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        from_members({**members, "identity.npy": sink.getvalue()})


def test_pixels_round_trip() -> None:
    labels = np.random.default_rng(0).integers(0, 19, (33, 47), np.uint8)
    assert np.array_equal(decode_labels(encode_labels(labels)), labels)
    image = np.full((32, 48, 3), (200, 30, 60), np.uint8)
    assert np.abs(decode_jpeg(encode_jpeg(image, 95)).astype(int) - image).max() <= 3


class Odd(RecordStage):
    """Drops every other record, by its source."""

    name = "odd"

    def process_one(self, record: Record) -> Record:
        if int(record.source) % 2:
            raise Dropped("odd", "at 0x7f00deadbeef")
        return replace(record, caption="even")


def test_a_stage_answers_each_record_in_order_and_skips_ended_ones() -> None:
    given_records = [Record(key=key_of(str(i)), source=str(i), image=b"x") for i in range(5)]
    given_records[2] = reject(given_records[2], Dropped("before"), "earlier")
    done = run_stage(Odd(ResizeConfig()), given_records)
    assert [r.source for r in done] == ["0", "1", "2", "3", "4"]
    assert [(r.status, r.reason) for r in done] == [
        (Status.OK, ""),
        (Status.DROPPED, "odd"),
        (Status.DROPPED, "before"),
        (Status.DROPPED, "odd"),
        (Status.OK, ""),
    ]
    assert done[1].detail == "at 0x…" and done[1].image == b"" and done[1].stage == "odd"


def test_a_stage_that_loses_a_record_is_a_programming_error() -> None:
    class Loses(Odd):
        def process(self, batch: list[Record]) -> list[Record]:
            return batch[1:]

    with pytest.raises(AssertionError, match="must answer each record"):
        run_stage(Loses(ResizeConfig()), [Record(key=key_of("1"), source="1")])


def test_a_chain_is_checked_before_it_starts() -> None:
    chain = build_stages(DatasetConfig())
    check_chain(chain)
    with pytest.raises(ConfigError, match=r"'caption' requires .*parsing"):
        check_chain([stage for stage in chain if stage.name != "parse"])


def test_signatures_change_with_what_changes_answers_only() -> None:
    def signature(stage: int, *overrides: str) -> str:
        from configs.load import load

        return build_stages(load(DatasetConfig, None, overrides))[stage].signature()

    asked = ("caption.backend=openai", "caption.openai.model=a", "caption.openai.base_url=http://a")
    assert signature(4) != signature(4, *asked)
    assert signature(4, *asked) != signature(4, *asked, "caption.openai.prompt=another")
    assert signature(1) == signature(1, *asked, "caption.openai.prompt=another")
    assert signature(1) != signature(1, "detect.weights=det_10g")
    assert signature(2) == signature(2, "parse.placement.batch_size=8", "parse.device=cuda:1")


def test_a_backend_is_asked_for_only_after_setup() -> None:
    stage: Any = build_stages(DatasetConfig())[1]
    assert isinstance(stage, BackendStage) and isinstance(stage, Stage)
    with pytest.raises(AssertionError, match="setup"):
        _ = stage.backend

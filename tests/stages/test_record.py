"""Records, their Arrow rows, and the stage contract."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.schema import DatasetConfig, ResizeConfig
from stages.base import BackendStage, Dropped, RecordStage, Stage, check_chain, reject, run_stage
from stages.chain import build_stages
from stages.codec import decode_jpeg, decode_labels, encode_jpeg, encode_labels
from stages.fields import Annotation, Metric, stored
from stages.record import Record, Status, from_table, key_of, to_table
from tests.stages.records import records, same_record


@settings(max_examples=50, deadline=None)
@given(st.lists(records, max_size=3))
def test_arrow_round_trip(given_records: list[Record]) -> None:
    assert all(
        same_record(a, b)
        for a, b in zip(given_records, from_table(to_table(given_records)), strict=True)
    )


def test_pixels_round_trip() -> None:
    labels = np.random.default_rng(0).integers(0, 19, (33, 47), np.uint8)
    assert np.array_equal(decode_labels(encode_labels(labels)), labels)
    image = np.full((32, 48, 3), (200, 30, 60), np.uint8)
    assert np.abs(decode_jpeg(encode_jpeg(image, 95)).astype(int) - image).max() <= 3


class Odd(RecordStage):
    """Drops records whose source is an odd number."""

    name = "odd"

    def process_one(self, record: Record) -> Record:
        if int(record.source) % 2:
            raise Dropped("odd", "at 0x7f00deadbeef")
        return replace(record, caption="even")


def test_run_stage_keeps_the_order_and_skips_dropped_records() -> None:
    inputs = [Record(key=key_of(str(i)), source=str(i), image=b"x") for i in range(5)]
    inputs[2] = reject(inputs[2], Dropped("before"), "earlier")
    results = run_stage(Odd(ResizeConfig()), inputs)
    assert [r.source for r in results] == ["0", "1", "2", "3", "4"]
    assert [(r.status, r.reason) for r in results] == [
        (Status.OK, ""),
        (Status.DROPPED, "odd"),
        (Status.DROPPED, "before"),
        (Status.DROPPED, "odd"),
        (Status.OK, ""),
    ]
    dropped = results[1]
    assert (dropped.detail, dropped.image, dropped.stage) == ("at 0x…", b"", "odd")


def test_a_stage_that_returns_too_few_records_is_a_programming_error() -> None:
    class Incomplete(Odd):
        def process(self, batch: list[Record]) -> list[Record]:
            return batch[1:]

    with pytest.raises(AssertionError, match="must return each record"):
        run_stage(Incomplete(ResizeConfig()), [Record(key=key_of("1"), source="1")])


def test_a_chain_in_which_no_stage_provides_a_required_field_is_an_error() -> None:
    chain = build_stages(DatasetConfig())
    check_chain(chain)
    with pytest.raises(
        ConfigError, match=r"'caption' requires parsing, .*list: source: key,.*detect: faces"
    ):
        check_chain([stage for stage in chain if stage.name != "parse"])


def test_a_stage_whose_annotation_and_provides_disagree_is_an_error() -> None:
    class Noted(Annotation):
        name = "noted"

    class Forgetful(Odd):
        provides = ("noted",)

    class Silent(Odd):
        annotation = Noted

    with pytest.raises(ConfigError, match="'odd' provides noted, but its `annotation` is not set"):
        check_chain([Forgetful(ResizeConfig())])
    with pytest.raises(ConfigError, match="provides no annotation, but its `annotation` is noted"):
        check_chain([Silent(ResizeConfig())])


@pytest.mark.parametrize("reserved", ["caption", "version"])
def test_an_annotation_named_like_a_value_of_the_json_is_an_error(reserved: str) -> None:
    class Reserved(Annotation):
        name = reserved

    class Colliding(Odd):
        provides = (reserved,)
        annotation = Reserved

    with pytest.raises(ConfigError, match=f"an annotation can't be called {reserved}"):
        check_chain([Colliding(ResizeConfig())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Annotation):
    name: ClassVar[str] = "noted"

    numbers: tuple[float, ...] = stored("numbers", pa.list_(pa.float64()), length=2)


def test_none_in_a_field_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"noted\.numbers is None: expected list"):
        Record(key=key_of("1"), source="1").annotated(Noted(numbers=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_record_with_a_number_that_is_not_finite_fails(value: float) -> None:
    class Measuring(Odd):
        def process_one(self, record: Record) -> Record:
            return record.annotated(Noted(numbers=(1.0, value)))

    [record] = run_stage(Measuring(ResizeConfig()), [Record(key=key_of("1"), source="1")])
    assert (record.status, record.reason, record.stage) == (Status.FAILED, "not_a_number", "odd")
    assert record.detail == f"noted.numbers is {value}" and not record.annotations


def test_a_metric_of_a_text_is_an_error() -> None:
    with pytest.raises(TypeError, match="'Shade': expected a field of numbers, not of string"):
        stored("a shade", pa.string(), metric=Metric(title="Shade"))


def test_an_exception_of_a_stage_names_the_input() -> None:
    class Faulty(Odd):
        def process_one(self, record: Record) -> Record:
            raise IndexError("of a programming error")

    with pytest.raises(IndexError) as caught:
        run_stage(Faulty(ResizeConfig()), [Record(key=key_of("1"), source="1.jpg")])
    assert caught.value.__notes__ == ["stage odd, input '1.jpg'"]


def test_signatures_depend_on_settings_that_change_results_only() -> None:
    def signature(stage: int, *overrides: str) -> str:
        from configs.load import load

        return build_stages(load(DatasetConfig, None, overrides))[stage].signature()

    openai = (
        "caption.backend=openai",
        "caption.openai.model=a",
        "caption.openai.base_url=http://a",
        "caption.openai.root=a",
    )
    assert signature(4) != signature(4, *openai)
    assert signature(4, *openai) != signature(4, *openai, "caption.openai.prompt=another")
    assert signature(1) == signature(1, *openai, "caption.openai.prompt=another")
    assert signature(1) != signature(1, "detect.weights=det_10g")
    assert signature(2) == signature(2, "parse.placement.batch_size=8", "parse.device=cuda:1")


def test_using_a_backend_before_setup_is_a_programming_error() -> None:
    stage: Any = build_stages(DatasetConfig())[1]
    assert isinstance(stage, BackendStage) and isinstance(stage, Stage)
    with pytest.raises(AssertionError, match="setup"):
        _ = stage.backend

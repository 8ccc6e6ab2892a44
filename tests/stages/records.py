"""Records for tests: a Hypothesis strategy for any record, and records of drawn faces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import strategies as st

from stages.backends.protocols import Answer
from stages.base import Failed
from stages.codec import encode_jpeg, encode_labels
from stages.record import EMBEDDINGS, Face, Record, key_of
from tests.stages.drawing import ALL_PARTS, draw

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
    other_identities=st.none()
    | st.integers(0, 3).map(lambda count: np.arange(512 * count, dtype=np.float32)),
    caption=text,
    face_caption=text,
    annotations=st.dictionaries(
        st.sampled_from(["measures", "review", "of_a_later_program"]),
        st.dictionaries(st.text("abc_", min_size=1), st.one_of(number, text, st.booleans())),
        max_size=3,
    ),
)


def drawn_record(name: str, parts: frozenset[str] = ALL_PARTS) -> Record:
    """Returns a record of a drawn face, as the caption stage gets it."""
    drawing = draw(parts)
    return Record(
        key=key_of(name),
        source=name,
        image=encode_jpeg(drawing.image, 95),
        width=512,
        height=512,
        faces=(drawing.face,),
        face=0,
        parsing=encode_labels(drawing.labels),
    )


def texts_of(answers: Sequence[tuple[Answer, Answer] | Failed]) -> list[Any]:
    """Returns for each record the texts of the answers to both prompts, or its Failed."""
    return [a if isinstance(a, Failed) else (a[0].text, a[1].text) for a in answers]


def same_record(one: Record, two: Record) -> bool:
    """Returns whether all fields are equal."""
    plain = [f.name for f in fields(Record) if f.name not in EMBEDDINGS]
    return all(getattr(one, n) == getattr(two, n) for n in plain) and all(
        np.array_equal(getattr(one, n), getattr(two, n)) for n in EMBEDDINGS
    )

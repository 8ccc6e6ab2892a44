"""Fixtures: four people of the data set, measured, and the models that measure them."""

from __future__ import annotations

from pathlib import Path

import pytest

from infer.evaluation.faces import FaceMeasurer, MeasuredPicture
from infer.evaluation.people import Person, by_person, held_out_people
from infer.evaluation.pictures import photographs
from infer.identity import Identity
from infer.pipelines import ConsistentIDPipeline
from stages.storage.reader import DatasetReader


@pytest.fixture(scope="session")
def measurer() -> FaceMeasurer:
    return FaceMeasurer()


@pytest.fixture(scope="session")
def people(data: Path) -> list[Person]:
    """Four people, each with one photograph."""
    return held_out_people(DatasetReader(str(data)), 4, seed=3, split="all")


@pytest.fixture(scope="session")
def references(people: list[Person], measurer: FaceMeasurer) -> dict[str, MeasuredPicture]:
    return by_person(people, measurer.records([person.reference for person in people]))


@pytest.fixture(scope="session")
def small_photos(people: list[Person], measurer: FaceMeasurer) -> dict[str, MeasuredPicture]:
    """The people's photographs at 64 pixels."""
    photos = photographs([person.reference for person in people], 64)
    return by_person(people, measurer.pictures(photos))


@pytest.fixture(scope="session")
def identities(pipe: ConsistentIDPipeline, people: list[Person]) -> dict[str, Identity]:
    return {person.name: pipe.encode_identity(person.reference) for person in people}

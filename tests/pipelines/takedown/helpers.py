"""Helpers for tests of removal requests: small data sets of scenes (tests/pipelines/stub_chain)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from configs.schema import DatasetConfig
from pipelines.run import run
from pipelines.takedown import PhotoRequest
from stages.base import Stage
from stages.record import Record
from stages.storage.commit import ChainInfo
from stages.storage.store import Store
from tests.pipelines.helpers import NO_DEDUPLICATION, NO_RULES, config
from tests.pipelines.stub_chain import Scene, StubConfig, StubEmbed, stub_chain

PLAIN = (*NO_DEDUPLICATION, *NO_RULES, "shard_size=2")


def settings_of(folder: Path, *overrides: str) -> DatasetConfig:
    return config(folder / "photos", folder / "out", *(overrides or PLAIN))


def make(folder: Path, scenes: dict[str, Scene], *overrides: str) -> Store:
    """Adds scenes to the source, runs the cheap stages, and returns the data set's store."""
    (folder / "photos").mkdir(exist_ok=True, parents=True)
    for name, scene in scenes.items():
        (folder / "photos" / f"{name}.jpg").write_bytes(scene.encode())
    run(settings_of(folder, *overrides), chain=stub_chain)
    return Store(str(folder / "out"))


def without_other_faces(config: DatasetConfig) -> list[Stage]:
    """The chain of a program that had no such stage."""
    return [stage for stage in stub_chain(config) if stage.name != "other_faces"]


class OwnIdentity(StubEmbed):
    """In place of a source that brings embeddings along: their norm is not known."""

    def process_one(self, record: Record) -> Record:
        return replace(super().process_one(record), identity_norm=None)


def with_own_identities(config: DatasetConfig) -> list[Stage]:
    own = OwnIdentity(StubConfig())
    return [own if stage.name == own.name else stage for stage in stub_chain(config)]


def request(folder: Path, *people: str, cosine: float = 0.6) -> PhotoRequest:
    """A request with a photograph of each of `people`; scenes of a person have a cosine of 0.8."""
    signatures = ChainInfo.of(stub_chain(settings_of(folder))).signatures
    [embedder] = [each for each in signatures if each.startswith("embed-")]
    vectors = np.stack([Scene(person=person, shot=99).identity for person in people])
    return PhotoRequest(vectors=vectors, cosine=cosine, embedder=embedder, weights="w600k_mbf")


def sources(matches: list[object]) -> list[str]:
    return sorted(match.source.removesuffix(".jpg") for match in matches)  # type: ignore[attr-defined]

"""A chain of cheap, deterministic stages without models, with the names, `requires` and `provides`
of the real ones.

An input is a few bytes of JSON, a `Scene`, which states what each stage will find. Rights,
thumbnail and quality filter are the real stages; the others answer from the scene.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from configs.common import NOT_HASHED, PlacementConfig
from configs.schema import DatasetConfig
from stages.annotations import Measures
from stages.base import Dropped, Failed, RecordStage, Stage, check_chain
from stages.caption import CaptionStage
from stages.codec import encode_jpeg, encode_labels
from stages.detect import DetectStage
from stages.embed import EmbedStage
from stages.measure import MeasureStage
from stages.other_faces import OtherFacesStage
from stages.parse import ParseStage
from stages.quality_filter import QualityFilterStage
from stages.record import IDENTITY_DIM, Face, FloatArray, Record
from stages.resize import ResizeStage
from stages.rights import RightsStage
from stages.thumbnail import ThumbnailStage

OUTAGE: Final = "outage.json"  # beside the source's folder: keys whose captioning fails
_END: Final = b"\xff\xd9"  # of a JPEG
_SIDE: Final = 16  # pixels


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an input shows.

    person: whose face, "" for no face. Two scenes of one person have a cosine of about 0.8.
    shot: two scenes with the same person and shot are copies of each other: by hash (the
    perceptual hashes differ by at most four bits), or, where one is cropped, by face only. saved:
    makes other bytes of the same scene. beside: the people beside the main face.
    """

    person: str
    shot: int = 1
    sharpness: float = 0.5
    cropped: bool = False
    saved: int = 0
    beside: tuple[str, ...] = ()

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(data: bytes) -> Scene:
        """Of an input's bytes, or of the JPEG that the resize stage made of them."""
        return Scene(**json.loads(data.rpartition(_END)[2]))

    @property
    def identity(self) -> FloatArray:
        """float32[512], unit norm."""
        own = _direction(self.person)
        if self.person == "twin":  # a cosine of about 0.5 to ann's scenes
            own = 0.6 * _direction("ann") + 0.8 * own
        of_shot = 0.5 * _direction(f"{self.person} {self.shot}")
        of_crop = 0.1 * _direction(f"{self.person} {self.shot} cropped") * self.cropped
        vector = own + of_shot + of_crop
        return np.asarray(vector / np.linalg.norm(vector), np.float32)

    @property
    def other_identities(self) -> FloatArray:
        """float32[512 F], unit norm."""
        vectors = [replace(self, person=person).identity for person in self.beside]
        return np.asarray(np.concatenate(vectors) if vectors else [], np.float32)

    @property
    def perceptual_hash(self) -> str:
        """64 hex digits."""
        seen = hashlib.sha256(f"{self.person} {self.shot} {self.cropped}".encode()).hexdigest()
        return f"{int(seen, 16) ^ self.saved:064x}"


def _direction(name: str) -> FloatArray:
    """float32[512], unit norm; those of two names are almost orthogonal."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    vector = np.random.default_rng(seed).standard_normal(IDENTITY_DIM)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


@dataclass(frozen=True, kw_only=True)
class StubConfig:
    """setting: changes the answers of its stage."""

    setting: str = ""
    placement: PlacementConfig = field(default_factory=PlacementConfig, metadata=NOT_HASHED)


class StubResize(RecordStage):
    name = ResizeStage.name
    requires = ResizeStage.requires
    provides = ResizeStage.provides
    config: StubConfig

    def process_one(self, record: Record) -> Record:
        """Makes a flat JPEG, with the scene after its end for the stages that follow. The result
        differs if the input was resized before.
        """
        try:
            scene = Scene.decode(record.image)
        except ValueError:
            raise Failed("undecodable", "not a scene") from None
        grey = (record.image[0] + record.image[-2] + int(self.config.setting)) % 256
        pixels = np.full((_SIDE, _SIDE, 3), grey, np.uint8)
        return replace(
            record,
            image=encode_jpeg(pixels, 90) + scene.encode(),
            width=_SIDE,
            height=_SIDE,
            source_width=2 * _SIDE,
            source_height=2 * _SIDE,
        )


class StubDetect(RecordStage):
    name = DetectStage.name
    requires = DetectStage.requires
    provides = DetectStage.provides
    config: StubConfig

    def process_one(self, record: Record) -> Record:
        if not Scene.decode(record.image).person:
            raise Dropped("no_face", "nobody")
        low, high = 2.0, float(_SIDE - 2)
        corners = (low, low), (high, low), (high, high), (low, high)
        face = Face(
            box=(low, low, high, high),
            landmarks=(*corners, (low, low)),
            score=float(self.config.setting),
        )
        beside = len(Scene.decode(record.image).beside)
        return replace(record, faces=(face,) * (1 + beside), face=0)


class StubParse(RecordStage):
    name = ParseStage.name
    requires = ParseStage.requires
    provides = ParseStage.provides

    def process_one(self, record: Record) -> Record:
        labels = np.ones((_SIDE, _SIDE), np.uint8)
        labels[: Scene.decode(record.image).shot] = 17  # hair
        return replace(record, parsing=encode_labels(labels))


class StubEmbed(RecordStage):
    name = EmbedStage.name
    requires = EmbedStage.requires
    provides = EmbedStage.provides

    def process_one(self, record: Record) -> Record:
        identity = Scene.decode(record.image).identity
        return replace(record, identity=identity, identity_norm=20.0)


class StubOtherFaces(RecordStage):
    name = OtherFacesStage.name
    requires = OtherFacesStage.requires
    provides = OtherFacesStage.provides

    def process_one(self, record: Record) -> Record:
        return replace(record, other_identities=Scene.decode(record.image).other_identities)


class StubMeasure(RecordStage):
    name = MeasureStage.name
    requires = MeasureStage.requires
    provides = MeasureStage.provides
    annotation = MeasureStage.annotation

    def process_one(self, record: Record) -> Record:
        scene = Scene.decode(record.image)
        others = ("brightness", "clipped", "yaw", "pitch", "roll", "occlusion")
        measures = Measures(
            sharpness=scene.sharpness,
            hash=scene.perceptual_hash,
            **dict.fromkeys(others, 0.5),
        )
        return record.annotated(measures)


class StubCaption(RecordStage):
    """setting: the prompt. Fails for the keys that the file `outage` lists, if there is one, as
    where a server is away.
    """

    name = CaptionStage.name
    requires = CaptionStage.requires
    provides = CaptionStage.provides
    config: StubConfig

    def __init__(self, config: StubConfig, outage: Path) -> None:
        super().__init__(config)
        self._outage = outage

    def process(self, records: list[Record]) -> list[Record]:
        outage = self._outage.read_text() if self._outage.exists() else "[]"
        self._failing = set(json.loads(outage))
        return super().process(records)

    def process_one(self, record: Record) -> Record:
        if record.key in self._failing:
            raise Failed("caption_failed", "no answer")
        scene = Scene.decode(record.image)
        text = f"{self.config.setting} {scene.person}, {record.main_face.score:.1f}"
        return replace(record, caption=text, face_caption=f"{text}: {scene.shot}")


def stub_chain(config: DatasetConfig) -> list[Stage]:
    """In place of `pipelines.chain.build_chain`. These settings decide: resize.jpeg_quality,
    detect.min_score, caption.llava.prompt, rules.*, rights.* and thumbnail.*.
    """
    plain: Any = StubConfig()
    chain: list[Stage] = [
        RightsStage(config.rights),
        StubResize(StubConfig(setting=str(config.resize.jpeg_quality))),
        ThumbnailStage(config.thumbnail),
        StubDetect(StubConfig(setting=str(config.detect.min_score))),
        StubParse(plain),
        StubEmbed(plain),
        StubOtherFaces(plain),
        StubMeasure(plain),
        QualityFilterStage(config.rules),
        StubCaption(
            StubConfig(setting=config.caption.llava.prompt),
            Path(config.source.path).with_name(OUTAGE),
        ),
    ]
    check_chain(chain)
    return chain

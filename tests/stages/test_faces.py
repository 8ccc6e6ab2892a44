"""Resize, detect, parse and embed on real faces."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from configs.schema import DatasetConfig, DetectConfig, EmbedConfig, ParseConfig, ResizeConfig
from stages.backends.weights import Weights
from stages.base import Dropped, Failed, run_chain
from stages.chain import build_stages
from stages.codec import decode_jpeg, decode_labels, encode_jpeg
from stages.detect import DetectStage
from stages.embed import EmbedStage
from stages.parse import PAIRS, ParseStage, mend_sides
from stages.record import Record, key_of
from stages.resize import ResizeStage, decode


def record_of(data: bytes, name: str = "a.jpg") -> Record:
    return Record(key=key_of(name), source=name, image=data)


@pytest.fixture(scope="module")
def made(portraits: Path) -> list[Record]:
    """The portraits and the astronaut, through the four face stages."""
    chain = build_stages(DatasetConfig())[:4]
    for stage in chain:
        stage.setup()
    given = [record_of(path.read_bytes(), path.name) for path in sorted(portraits.glob("*.jpg"))]
    given.append(record_of(encode_jpeg(skimage.data.astronaut(), 95), "astronaut.jpg"))
    return run_chain(chain, given)


def test_every_portrait_is_found_with_one_plausible_face(made: list[Record]) -> None:
    assert [r.reason for r in made] == [""] * len(made)
    for record in made[:-1]:
        x1, y1, x2, y2 = record.main_face.box
        assert 0.3 < (y2 - y1) / record.height < 0.95, f"{record.source}: {record.main_face}"
        left, right, nose, _, _ = record.main_face.landmarks
        assert x1 < left[0] < nose[0] + 40 and nose[0] - 40 < right[0] < x2


def test_identity_survives_shrinking_and_tells_people_apart(
    made: list[Record], portraits: Path
) -> None:
    chain = build_stages(DatasetConfig())[:4]
    for stage in chain:
        stage.setup()
    smaller = []
    for path in sorted(portraits.glob("*.jpg")):
        image = decode_jpeg(path.read_bytes())
        small = cv2.resize(image, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA)
        smaller.append(record_of(encode_jpeg(np.asarray(small, np.uint8), 92), path.name))
    again = run_chain(chain, smaller)
    one = np.stack([r.identity for r in made[:-1] if r.identity is not None])
    two = np.stack([r.identity for r in again if r.identity is not None])
    assert (one * two).sum(1).min() > 0.9
    cosines = (one @ one.T)[np.triu_indices(len(one), 1)]
    assert np.median(cosines) < 0.3
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5) and one.dtype == np.float32


def test_parts_lie_where_the_landmarks_are(made: list[Record]) -> None:
    for record in made:
        labels = decode_labels(record.parsing)
        assert labels.shape == (record.height, record.width) and labels.max() < 19
        _, _, nose, left_corner, right_corner = record.main_face.landmarks
        assert labels[round(nose[1]), round(nose[0])] == 10, record.source
        lips = np.argwhere(np.isin(labels, (11, 12, 13)))
        middle = lips.mean(0)
        assert left_corner[0] - 10 < middle[1] < right_corner[0] + 10


def test_the_half_body_photograph_gets_its_brows_and_eyes_from_the_aligned_pass(
    made: list[Record],
) -> None:
    astronaut = made[-1]
    aligned = set(np.unique(decode_labels(astronaut.parsing)).tolist())
    stage = ParseStage(ParseConfig(align="never"), Weights())
    stage.setup()
    whole = set(
        np.unique(
            decode_labels(stage.process([replace(astronaut, parsing=b"")])[0].parsing)
        ).tolist()
    )
    assert {2, 3, 4, 5, 10, 12, 13} <= aligned
    assert len(whole & {2, 3, 4, 5}) < 4, (
        "parsed whole it would do as well, and the second pass could go"
    )
    assert 16 in aligned, "clothes come from the whole picture"


def test_left_parts_lie_left_of_right_ones_even_when_mislabelled(made: list[Record]) -> None:
    for record in made:
        labels = decode_labels(record.parsing)
        swapped = labels.copy()
        for left, right in PAIRS:
            swapped[labels == left], swapped[labels == right] = right, left
        assert np.array_equal(mend_sides(swapped, record.main_face), labels)
        for left, right in PAIRS:
            if (labels == left).any() and (labels == right).any():
                assert np.where(labels == left)[1].mean() < np.where(labels == right)[1].mean()


def test_close_ups_need_the_border_or_the_smaller_scale(portraits: Path) -> None:
    records = [
        ResizeStage(ResizeConfig()).process_one(record_of(path.read_bytes()))
        for path in sorted(portraits.glob("*.jpg"))
    ]
    found = {}
    for name, config in {
        "plain": DetectConfig(pad=0, scales=(640,)),
        "border": DetectConfig(scales=(640,)),
        "smaller": DetectConfig(pad=0, scales=(640, 320)),
    }.items():
        stage = DetectStage(config, Weights())
        stage.setup()
        found[name] = sum(record.ok for record in stage.process(records))
    assert found["border"] == found["smaller"] == len(records)
    assert found["plain"] < len(records), "if the plain call finds them all, neither is needed"


def test_the_largest_face_is_chosen(poisoned: Path) -> None:
    photo = ResizeStage(ResizeConfig()).process_one(
        record_of((poisoned / "three faces.jpg").read_bytes())
    )

    def detect(**settings: object) -> Record:
        stage = DetectStage(DetectConfig(**settings), Weights())  # type: ignore[arg-type]
        stage.setup()
        return stage.process([photo])[0]

    everyone = detect()
    assert len(everyone.faces) == 3 and everyone.main_face.area == max(
        face.area for face in everyone.faces
    )
    assert detect(min_score=0.999).reason == "no_face"


def test_an_embedding_of_another_size_is_a_failure_not_a_zero(made: list[Record]) -> None:
    stage = EmbedStage(EmbedConfig(), Weights())
    stage._backend = type(
        "Broken", (), {"embed": lambda self, images, faces: [np.zeros(512, np.float32)]}
    )()
    assert stage.process([made[0]])[0].reason == "no_identity"


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(1024, 1024, (512, 512)), (300, 200, (768, 512)), (64, 200, (512, 1600))],
)
def test_the_short_side_becomes_the_working_size(
    width: int, height: int, size: tuple[int, int]
) -> None:
    data = encode_jpeg(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8), 90)
    record = ResizeStage(ResizeConfig()).process_one(record_of(data))
    assert (record.width, record.height) == size == decode_jpeg(record.image).shape[1::-1]


def test_squash_ignores_the_aspect_as_the_reference_does() -> None:
    data = encode_jpeg(np.zeros((200, 300, 3), np.uint8), 90)
    record = ResizeStage(ResizeConfig(mode="squash")).process_one(record_of(data))
    assert (record.width, record.height) == (512, 512)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    base = Image.fromarray(np.full((100, 120), 128, np.uint8))
    image = (
        Image.fromarray(np.full((100, 120), 128 * 257, np.uint16))
        if mode == "I;16"
        else base.convert(mode)
    )
    with io.BytesIO() as out:
        image.save(out, "TIFF")
        pixels = decode(out.getvalue(), ResizeConfig())
    assert pixels.shape == (100, 120, 3) and pixels.dtype == np.uint8
    if mode != "1":
        assert abs(int(pixels[50, 60].mean()) - 128) < 12


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"<html>", "not_an_image"),
        (b"\xff\xd8\xff\xe0garbage", "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "undecodable"),
    ],
)
def test_what_is_no_picture_fails_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Failed) as caught:
        decode(data, ResizeConfig())
    assert caught.value.reason == reason


def test_limits_hold_before_decoding() -> None:
    data = encode_jpeg(np.zeros((200, 200, 3), np.uint8), 90)
    for settings, reason in (
        ({"max_bytes": 10}, "too_many_bytes"),
        ({"max_pixels": 100}, "too_many_pixels"),
    ):
        with pytest.raises(Failed) as caught:
            decode(data, ResizeConfig(**settings))  # type: ignore[arg-type]
        assert caught.value.reason == reason
    with pytest.raises(Dropped) as dropped:
        ResizeStage(ResizeConfig()).process_one(
            record_of(encode_jpeg(np.zeros((100, 900, 3), np.uint8), 90))
        )
    assert dropped.value.reason == "extreme_aspect"


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((1024, 1024), (512, 512)),
        ((1023, 1400), (1023, 1400)),
        ((2100, 3000), (525, 750)),
        ((5000, 4096), (625, 512)),
    ],
)
def test_a_large_jpeg_is_decoded_smaller_but_never_under_the_working_size(
    size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    image = cv2.resize(skimage.data.astronaut(), size, interpolation=cv2.INTER_CUBIC)
    data = encode_jpeg(np.asarray(image, np.uint8), 95)
    assert min(decode(data, ResizeConfig(size=64, min_side=min(size))).shape[:2]) == min(size)
    found = decode(data, ResizeConfig(size=512))
    assert found.shape == (decoded[1], decoded[0], 3)
    averaged = cv2.resize(image, decoded, interpolation=cv2.INTER_AREA)
    error = np.square(found.astype(float) - averaged).mean()
    assert 10 * np.log10(255**2 / error) > 40, "the same picture as one averaged after decoding"

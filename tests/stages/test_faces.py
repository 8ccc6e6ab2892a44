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
from stages.parse import PAIRS, ParseStage, assign_sides
from stages.record import Record, key_of
from stages.resize import ResizeStage, decode


def record_of(data: bytes, name: str = "a.jpg") -> Record:
    return Record(key=key_of(name), source=name, image=data)


@pytest.fixture(scope="module")
def records(portraits: Path) -> list[Record]:
    """The portraits and, last, the astronaut, each after resize, detect, parse and embed."""
    chain = build_stages(DatasetConfig())[:4]
    for stage in chain:
        stage.setup()
    inputs = [record_of(path.read_bytes(), path.name) for path in sorted(portraits.glob("*.jpg"))]
    inputs.append(record_of(encode_jpeg(skimage.data.astronaut(), 95), "astronaut.jpg"))
    return run_chain(chain, inputs)


def test_every_portrait_has_a_plausible_face(records: list[Record]) -> None:
    assert [r.reason for r in records] == [""] * len(records)
    for record in records[:-1]:
        x1, y1, x2, y2 = record.main_face.box
        assert 0.3 < (y2 - y1) / record.height < 0.95, f"{record.source}: {record.main_face}"
        left, right, nose, _, _ = record.main_face.landmarks
        assert x1 < left[0] < nose[0] + 40 and nose[0] - 40 < right[0] < x2


def test_embeddings_hardly_change_with_size_and_differ_between_people(
    records: list[Record], portraits: Path
) -> None:
    chain = build_stages(DatasetConfig())[:4]
    for stage in chain:
        stage.setup()
    smaller = []
    for path in sorted(portraits.glob("*.jpg")):
        image = decode_jpeg(path.read_bytes())
        small = cv2.resize(image, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA)
        smaller.append(record_of(encode_jpeg(np.asarray(small, np.uint8), 92), path.name))
    smaller = run_chain(chain, smaller)
    one = np.stack([r.identity for r in records[:-1] if r.identity is not None])
    two = np.stack([r.identity for r in smaller if r.identity is not None])
    assert (one * two).sum(1).min() > 0.9
    cosines = (one @ one.T)[np.triu_indices(len(one), 1)]
    assert np.median(cosines) < 0.3
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5) and one.dtype == np.float32


def test_the_label_map_agrees_with_the_landmarks(records: list[Record]) -> None:
    for record in records:
        labels = decode_labels(record.parsing)
        assert labels.shape == (record.height, record.width) and labels.max() < 19
        _, _, nose, left_corner, right_corner = record.main_face.landmarks
        assert labels[round(nose[1]), round(nose[0])] == 10, record.source
        lips = np.argwhere(np.isin(labels, (11, 12, 13)))
        middle = lips.mean(0)
        assert left_corner[0] - 10 < middle[1] < right_corner[0] + 10


def test_brows_and_eyes_of_a_half_body_photograph_come_from_the_aligned_crop(
    records: list[Record],
) -> None:
    astronaut = records[-1]
    aligned = set(np.unique(decode_labels(astronaut.parsing)).tolist())
    stage = ParseStage(ParseConfig(align="never"), Weights())
    stage.setup()
    (without_crop,) = stage.process([replace(astronaut, parsing=b"")])
    whole = set(np.unique(decode_labels(without_crop.parsing)).tolist())
    assert {2, 3, 4, 5, 10, 12, 13} <= aligned
    assert len(whole & {2, 3, 4, 5}) < 4, "else the aligned crop would not be needed"
    assert 16 in aligned, "clothes come from the whole image"


def test_left_and_right_are_assigned_by_position_and_not_by_the_parsers_labels(
    records: list[Record],
) -> None:
    for record in records:
        labels = decode_labels(record.parsing)
        swapped = labels.copy()
        for left, right in PAIRS:
            swapped[labels == left], swapped[labels == right] = right, left
        assert np.array_equal(assign_sides(swapped, record.main_face), labels)
        for left, right in PAIRS:
            if (labels == left).any() and (labels == right).any():
                assert np.where(labels == left)[1].mean() < np.where(labels == right)[1].mean()


def test_close_ups_need_padding_or_the_smaller_detector_size(portraits: Path) -> None:
    resized = [
        ResizeStage(ResizeConfig()).process_one(record_of(path.read_bytes()))
        for path in sorted(portraits.glob("*.jpg"))
    ]
    configs = {
        "plain": DetectConfig(pad=0, scales=(640,)),
        "padded": DetectConfig(scales=(640,)),
        "smaller": DetectConfig(pad=0, scales=(640, 320)),
    }
    detected = {}
    for name, config in configs.items():
        stage = DetectStage(config, Weights())
        stage.setup()
        detected[name] = sum(record.ok for record in stage.process(resized))
    assert detected["padded"] == detected["smaller"] == len(resized)
    assert detected["plain"] < len(resized), "else neither would be needed"


def test_the_main_face_is_the_largest(poisoned: Path) -> None:
    photo = ResizeStage(ResizeConfig()).process_one(
        record_of((poisoned / "three faces.jpg").read_bytes())
    )

    def detect(**settings: object) -> Record:
        stage = DetectStage(DetectConfig(**settings), Weights())  # type: ignore[arg-type]
        stage.setup()
        return stage.process([photo])[0]

    record = detect()
    assert len(record.faces) == 3
    assert record.main_face.area == max(face.area for face in record.faces)
    assert detect(min_score=0.999).reason == "no_face"


def test_an_embedding_of_zeros_fails(records: list[Record]) -> None:
    stage = EmbedStage(EmbedConfig(), Weights())

    class Broken:
        def embed(self, images: object, faces: object) -> list[np.ndarray]:
            return [np.zeros(512, np.float32)]

    stage._backend = Broken()
    assert stage.process([records[0]])[0].reason == "no_identity"


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


def test_squash_ignores_the_aspect_ratio_as_in_the_reference() -> None:
    data = encode_jpeg(np.zeros((200, 300, 3), np.uint8), 90)
    record = ResizeStage(ResizeConfig(mode="squash")).process_one(record_of(data))
    assert (record.width, record.height) == (512, 512)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((100, 120), 128 * 257, np.uint16))
    else:
        image = Image.fromarray(np.full((100, 120), 128, np.uint8)).convert(mode)
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
def test_data_that_is_not_an_image_fails_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Failed) as caught:
        decode(data, ResizeConfig())
    assert caught.value.reason == reason


def test_limits_are_checked_before_decoding() -> None:
    data = encode_jpeg(np.zeros((200, 200, 3), np.uint8), 90)
    for settings, reason in (
        ({"max_bytes": 10}, "too_many_bytes"),
        ({"max_pixels": 100}, "too_many_pixels"),
    ):
        with pytest.raises(Failed) as caught:
            decode(data, ResizeConfig(**settings))  # type: ignore[arg-type]
        assert caught.value.reason == reason
    wide = record_of(encode_jpeg(np.zeros((100, 900, 3), np.uint8), 90))
    with pytest.raises(Dropped) as dropped:
        ResizeStage(ResizeConfig()).process_one(wide)
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
def test_a_large_jpeg_is_decoded_reduced_but_never_below_the_working_size(
    size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    image = cv2.resize(skimage.data.astronaut(), size, interpolation=cv2.INTER_CUBIC)
    data = encode_jpeg(np.asarray(image, np.uint8), 95)
    assert min(decode(data, ResizeConfig(size=64, min_side=min(size))).shape[:2]) == min(size)
    reduced = decode(data, ResizeConfig(size=512))
    assert reduced.shape == (decoded[1], decoded[0], 3)
    averaged = cv2.resize(image, decoded, interpolation=cv2.INTER_AREA)
    error = np.square(reduced.astype(float) - averaged).mean()
    assert 10 * np.log10(255**2 / error) > 40, "nearly equal to reducing after decoding"

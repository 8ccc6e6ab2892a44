"""Legacy reading of photographs, against insightface, facexlib, Pillow and transformers alone."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from diffusers.utils import load_image
from insightface.app.common import Face
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.model_zoo.scrfd import SCRFD
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from configs.errors import ConfigError
from configs.schema import DatasetConfig, ResizeConfig
from infer.legacy import LegacyReader
from infer.photo import photo_record
from model.conditions import build_conditions
from model.spec import SPECS
from stages.backends.bisenet import bisenet
from stages.backends.weights import Weights
from stages.codec import decode_labels
from stages.record import Record
from stages.resize import as_read
from stages.storage.samples import from_members, to_members
from tests.bases import base_copy

# the first label of each of the reference's regions, in its order
LABELS = {"Face": (1,), "Eye": (4, 5), "Ear": (7, 8), "Nose": (10,), "Lip": (12, 13)}


@dataclass(frozen=True)
class Expected:
    """What the reference makes of a photograph. faces: embeddings in the detector's order."""

    faces: list[npt.NDArray[np.float32]]
    labels: npt.NDArray[np.uint8]
    clip_pixels: Tensor
    region_pixels: Tensor


def session(name: str) -> tuple[str, Any]:
    path = str(Weights().fetch(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return path, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any, Any]:
    """insightface's detector and embedder, and facexlib's parser."""
    detector, embedder = session("scrfd_500m_bnkps"), session("w600k_mbf")
    parser = bisenet(19)
    path = Weights().fetch("parsing_bisenet")
    state = torch.load(path, map_location="cpu", weights_only=True)
    parser.load_state_dict(state)
    return (
        SCRFD(model_file=detector[0], session=detector[1]),
        ArcFaceONNX(model_file=embedder[0], session=embedder[1]),
        parser.eval(),
    )


@torch.no_grad()
def derived(path: Path, model: str, networks: tuple[Any, Any, Any]) -> Expected:
    """Derives what the reference makes of a photograph from its description alone."""
    detector, embedder, parser = networks
    raw = load_image(str(path))
    side, size = (1280, 512) if model == "sdxl" else (512, 640)
    seen = cv2.imread(str(path)) if model == "sdxl" else np.array(raw)
    _, landmarks = detector.detect(seen, input_size=(size, size), det_thresh=0.5)
    faces = [Face(kps=points) for points in landmarks]
    for face in faces:
        embedder.get(seen, face)

    array = np.array(raw.resize((side, side), Image.Resampling.BILINEAR))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (torch.from_numpy(array).float() / 255 - mean) / std
    logits = parser(normal.permute(2, 0, 1)[None])[0]
    labels = logits[0].argmax(0).numpy().astype(np.uint8)

    processor = CLIPImageProcessorPil()
    images = []
    for ids in LABELS.values():
        label = next((label for label in ids if (labels == label).any()), None)
        if label is None:
            continue
        area = (labels == label).astype(np.uint8) * 255
        outlines, _ = cv2.findContours(area, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        filled = np.zeros_like(area)
        for outline in outlines:
            cv2.fillPoly(filled, [outline], 255)
        shown = Image.new("RGB", raw.size)
        shown.paste(raw, (0, 0), Image.fromarray(filled).resize(raw.size))
        images.append(shown)
    pixels = processor(images=[raw, *images], return_tensors="pt").pixel_values
    return Expected([face.normed_embedding for face in faces], labels, pixels[0], pixels[1:])


@pytest.fixture(scope="module")
def pair(portraits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph of two people, wide, the second one larger and at the right edge."""
    one, two = (Image.open(path) for path in sorted(portraits.glob("*.jpg"))[2:4])
    canvas = Image.new("RGB", (1500, 900), (96, 130, 90))
    canvas.paste(one.resize((500, 500)), (520, 300))
    canvas.paste(two.resize((420, 420)), (40, 60))
    path = tmp_path_factory.mktemp("legacy") / "pair.jpg"
    canvas.save(path, quality=92)
    return path


@pytest.fixture(scope="module")
def readers() -> dict[str, LegacyReader]:
    both = {name: LegacyReader(SPECS[name], DatasetConfig()) for name in ("sd15", "sdxl")}
    for reader in both.values():
        reader.set_up()
    return both


def photograph(path: Path) -> Record:
    return photo_record(path.read_bytes(), path.name)


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_conditions_of_a_photograph_are_the_references(
    model: str,
    pair: Path,
    readers: dict[str, LegacyReader],
    networks: tuple[Any, Any, Any],
    tiny_base: Path,
) -> None:
    expected, reader = derived(pair, model, networks), readers[model]
    first, left, right = (reader.read(photograph(pair), number) for number in (0, 1, 2))
    assert len(expected.faces) == len(first.faces) == 2
    assert first.face == 0 and {left.face, right.face} == {0, 1}
    assert left.main_face.box[0] < right.main_face.box[0]
    for record in (first, left, right):
        assert record.ok and record.image == pair.read_bytes()
        embedding = expected.faces[record.face]
        np.testing.assert_allclose(record.identity, embedding, rtol=0, atol=1e-4)
    assert np.abs(expected.faces[0] - expected.faces[1]).max() > 0.05
    assert np.array_equal(decode_labels(first.parsing), expected.labels)
    conditions = build_conditions(
        first,
        base_copy(SPECS["tiny"], tiny_base).tokenizer,
        SPECS[model],
        "legacy",
        prompt="a person",
        resolution=64,
    )
    assert (conditions.clip_pixels - expected.clip_pixels).abs().max() <= 1e-4
    count = len(conditions.regions)
    assert count == len(expected.region_pixels) >= 4
    assert (conditions.region_pixels[:count] - expected.region_pixels).abs().max() <= 1e-4


def test_the_order_of_colours_is_the_models(pair: Path, readers: dict[str, LegacyReader]) -> None:
    one, other = (readers[name].read(photograph(pair)).identity for name in ("sd15", "sdxl"))
    assert one is not None and other is not None and float(one @ other) < 0.99


def test_a_portrait_that_only_a_border_makes_detectable_has_no_face(
    portraits: Path, readers: dict[str, LegacyReader]
) -> None:
    record = readers["sd15"].read(photograph(sorted(portraits.glob("*.jpg"))[0]))
    assert (record.reason, record.stage, record.identity) == ("no_face", "detect", None)
    assert "border" in record.detail


def test_a_face_that_is_not_there_is_said(pair: Path, readers: dict[str, LegacyReader]) -> None:
    with pytest.raises(ConfigError, match="face=3: the photograph shows 2 faces"):
        readers["sd15"].read(photograph(pair), 3)


def test_the_record_is_the_same_after_saving(pair: Path, readers: dict[str, LegacyReader]) -> None:
    image = Image.open(pair).convert("L")
    record = readers["sd15"].read(photo_record(png(image), "grey.png"))
    saved = from_members(to_members(record, ()))
    assert record.ok and (saved.image, saved.parsing) == (record.image, record.parsing)
    assert np.array_equal(saved.identity, record.identity)  # type: ignore[arg-type]
    assert (saved.faces, saved.face) == (record.faces, record.face)


@pytest.mark.parametrize(
    ("mode", "form", "unchanged"),
    [
        ("RGB", "JPEG", True),
        ("L", "JPEG", False),
        ("CMYK", "JPEG", False),
        ("RGB", "WEBP", True),
        ("RGBA", "WEBP", False),
        ("P", "GIF", False),
        ("I;16", "PNG", False),
        ("RGB", "TIFF", True),
        ("RGB", "BMP", True),
        ("RGB", "AVIF", False),
    ],
)
def test_every_format_is_read_as_diffusers_reads_it(
    mode: str, form: str, unchanged: bool, tmp_path: Path
) -> None:
    gradient = Image.linear_gradient("L").resize((48, 64))
    image = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))
    path = tmp_path / f"image.{form.lower()}"
    if mode == "I;16":
        image = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(64, 48) * 20)
    elif mode == "RGBA":
        image.putalpha(gradient)
    else:
        image = image.convert(mode)
    image.save(path)
    data = path.read_bytes()
    file, pixels = as_read(data, ResizeConfig())
    assert np.array_equal(pixels, np.array(load_image(str(path))))
    assert (file == data) == unchanged
    with Image.open(io.BytesIO(file)) as stored:
        assert np.array_equal(np.array(stored.convert("RGB")), pixels)


def test_a_file_that_must_change_becomes_a_png_of_its_pixels(
    pair: Path, readers: dict[str, LegacyReader]
) -> None:
    image = Image.open(pair).crop((500, 280, 1040, 820))
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = png(image.rotate(90, expand=True), exif=exif)
    plain = readers["sd15"].read(photo_record(png(image), "plain.png"))
    assert plain.ok and plain.image == png(image)
    for data in (png(alpha), rotated):
        record = readers["sd15"].read(photo_record(data, "other.png"))
        assert record.image != data
        with Image.open(io.BytesIO(record.image)) as stored:
            assert stored.mode == "RGB" and np.array_equal(np.array(stored), np.array(image))
        assert (record.width, record.height) == image.size
        assert np.array_equal(record.identity, plain.identity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"<html>sign in</html>", "not_an_image"),
        (0.5, "truncated"),
        (1.0, "too_many_pixels"),
    ],
)
def test_bad_files_have_the_stages_reasons(
    data: bytes | float, reason: str, pair: Path, readers: dict[str, LegacyReader]
) -> None:
    reader = readers["sd15"]
    if not isinstance(data, bytes):
        whole = pair.read_bytes()
        data = whole[: int(len(whole) * data)]
    if reason == "too_many_pixels":
        config = replace(DatasetConfig(), resize=ResizeConfig(max_pixels=1_000_000))
        reader = LegacyReader(SPECS["sd15"], config)
    record = reader.read(photo_record(data, "bad.jpg"))
    assert (record.reason, record.stage, record.image) == (reason, "resize", b"")

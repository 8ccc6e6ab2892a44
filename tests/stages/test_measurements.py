"""The metrics of the quality rules: on real portraits, planted defects and degenerate input."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import cv2
import imagehash
import numpy as np
import pytest
import skimage.data

from configs.quality import RulesConfig
from configs.schema import DatasetConfig, ParseConfig
from stages.annotations import Measures
from stages.base import run_chain
from stages.chain import build_stages
from stages.codec import Image, LabelMap, decode_jpeg, decode_labels, encode_jpeg
from stages.measurements import FACE_MM, Points, angles_of, measure, rotation_of
from stages.record import Face, Record, key_of

RULES = RulesConfig()


@dataclass(frozen=True, slots=True)
class ParsedImage:
    image: Image
    labels: LabelMap
    face: Face

    def measure(self) -> Measures:
        return measure(self.image, self.labels, self.face)

    def with_image(self, image: object) -> ParsedImage:
        """Returns the same face and label map with another image; its regions must not move."""
        return replace(self, image=np.asarray(image).clip(0, 255).round().astype(np.uint8))


def parse_images(images: list[Image]) -> list[ParsedImage]:
    """Runs resize, detect and parse."""
    chain = build_stages(DatasetConfig(parse=ParseConfig(dtype="bfloat16")))[:3]
    for stage in chain:
        stage.setup()
    inputs = [
        Record(key=key_of(str(i)), source=str(i), image=encode_jpeg(image, 95))
        for i, image in enumerate(images)
    ]
    records = run_chain(chain, inputs)
    assert [record.reason for record in records] == [""] * len(records)
    return [
        ParsedImage(decode_jpeg(record.image), decode_labels(record.parsing), record.main_face)
        for record in records
    ]


@pytest.fixture(scope="module")
def clean(portraits: Path) -> list[ParsedImage]:
    """The eight portraits, then the astronaut, whose face is a sixth of the image."""
    images = [decode_jpeg(path.read_bytes()) for path in sorted(portraits.glob("*.jpg"))]
    return parse_images([*images, np.asarray(skimage.data.astronaut(), np.uint8)])


def blurred(image: Image, sigma: float) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)


def resized(parsed: ParsedImage, scale: float) -> ParsedImage:
    """The image, its label map and its face, reduced by `scale`."""
    size = (round(parsed.image.shape[1] * scale), round(parsed.image.shape[0] * scale))
    image = cv2.resize(parsed.image, size, interpolation=cv2.INTER_AREA)
    labels = cv2.resize(parsed.labels, size, interpolation=cv2.INTER_NEAREST)
    face = Face(
        box=tuple(value * scale for value in parsed.face.box),  # type: ignore[arg-type]
        landmarks=tuple((x * scale, y * scale) for x, y in parsed.face.landmarks),
        score=parsed.face.score,
    )
    return ParsedImage(np.asarray(image, np.uint8), np.asarray(labels, np.uint8), face)


def mirrored(parsed: ParsedImage) -> ParsedImage:
    width = parsed.image.shape[1]
    x1, y1, x2, y2 = parsed.face.box
    left, right, nose, left_corner, right_corner = (
        (width - x, y) for x, y in parsed.face.landmarks
    )
    face = Face(
        box=(width - x2, y1, width - x1, y2),
        landmarks=(right, left, nose, right_corner, left_corner),
        score=parsed.face.score,
    )
    return ParsedImage(
        np.ascontiguousarray(parsed.image[:, ::-1]),
        np.ascontiguousarray(parsed.labels[:, ::-1]),
        face,
    )


def rotation_matrix(yaw: float, pitch: float, roll: float) -> Points:
    """The rotation matrix of angles in degrees, computed independently of the module."""
    y, p, r = np.radians([-yaw, -pitch, roll])
    around_x = np.array([[1, 0, 0], [0, math.cos(p), -math.sin(p)], [0, math.sin(p), math.cos(p)]])
    around_y = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    around_z = np.array([[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1]])
    return np.asarray(around_z @ around_y @ around_x, np.float64)


def face_at(points: Points) -> Face:
    """A face with these five landmarks."""
    (x1, y1), (x2, y2) = points.min(axis=0) - 20, points.max(axis=0) + 20
    return Face(
        box=(x1, y1, x2, y2), landmarks=tuple((float(x), float(y)) for x, y in points), score=0.9
    )


def test_clean_portraits_meet_every_rule_by_a_margin(clean: list[ParsedImage]) -> None:
    for parsed in clean:
        metrics = parsed.measure()
        assert RULES.min_sharpness * 1.1 < metrics.sharpness < 1
        assert RULES.min_brightness * 2 < metrics.brightness < RULES.max_brightness
        assert metrics.clipped < RULES.max_clipped / 10
        assert metrics.occlusion < RULES.max_occlusion / 4
        assert abs(metrics.yaw) < 45 and abs(metrics.pitch) < 30 and abs(metrics.roll) < 15


def test_mirroring_flips_yaw_and_roll_and_nothing_else(clean: list[ParsedImage]) -> None:
    for parsed in clean:
        one, other = parsed.measure(), mirrored(parsed).measure()
        assert np.allclose(
            [one.yaw, one.pitch, one.roll], [-other.yaw, other.pitch, -other.roll], atol=0.5
        )
        assert one.sharpness == pytest.approx(other.sharpness, rel=0.03)
        assert one.brightness == pytest.approx(other.brightness, rel=0.01)
        assert one.occlusion == pytest.approx(other.occlusion, abs=0.02)


def test_metrics_of_a_sharp_face_do_not_depend_on_its_size(clean: list[ParsedImage]) -> None:
    for parsed in clean[:8]:
        whole = parsed.measure()
        quarter = resized(parsed, 0.25).measure()  # a face of about 70 pixels
        assert quarter.sharpness == pytest.approx(whole.sharpness, rel=0.35)
        assert quarter.brightness == pytest.approx(whole.brightness, abs=0.01)
        assert np.allclose(astuple(quarter)[3:6], astuple(whole)[3:6], atol=0.1)
        assert quarter.occlusion == pytest.approx(whole.occlusion, abs=0.02)


def test_the_same_image_gives_the_same_metrics(clean: list[ParsedImage]) -> None:
    assert clean[0].measure() == clean[0].measure()


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25])
def test_one_threshold_detects_blur_in_large_and_small_faces(
    clean: list[ParsedImage], scale: float
) -> None:
    for original in clean[:8]:
        parsed = resized(original, scale)
        sigma = max(1.5, 0.011 * parsed.face.side)  # 3 pixels for a face of 280
        soft = parsed.with_image(blurred(parsed.image, sigma))
        assert soft.measure().sharpness < RULES.min_sharpness < parsed.measure().sharpness


def test_motion_blur_in_any_direction_is_detected(clean: list[ParsedImage]) -> None:
    for streak in (np.ones((1, 21)), np.ones((21, 1)), np.eye(15)):
        for parsed in clean[:8]:
            moved = parsed.with_image(cv2.filter2D(parsed.image, -1, streak / streak.sum()))
            assert moved.measure().sharpness < RULES.min_sharpness


def test_dim_light_does_not_change_whether_blur_is_detected(clean: list[ParsedImage]) -> None:
    for parsed in clean[:8]:
        dim = parsed.with_image(parsed.image * 0.25)
        assert dim.measure().sharpness > RULES.min_sharpness
        dim_and_soft = dim.with_image(blurred(parsed.image, 4.0) * 0.25)
        assert dim_and_soft.measure().sharpness < RULES.min_sharpness


def test_a_sharp_background_does_not_make_a_blurred_face_sharp(clean: list[ParsedImage]) -> None:
    parsed = clean[0]
    noise = np.random.default_rng(0).integers(0, 255, parsed.image.shape)
    x1, y1, x2, y2 = (round(value) for value in parsed.face.box)
    image = noise.copy()
    image[y1:y2, x1:x2] = blurred(parsed.image, 4.0)[y1:y2, x1:x2]
    assert parsed.with_image(image).measure().sharpness < RULES.min_sharpness


def test_darkness_and_glare_are_detected_and_dim_light_passes(clean: list[ParsedImage]) -> None:
    for parsed in clean[:8]:
        assert parsed.with_image(parsed.image * 0.15).measure().brightness < RULES.min_brightness
        assert parsed.with_image(parsed.image * 0.4).measure().brightness > RULES.min_brightness
        glare = parsed.with_image(parsed.image * 3.0).measure()
        assert glare.brightness > RULES.max_brightness or glare.clipped > RULES.max_clipped


def test_the_darkest_well_lit_skin_is_not_too_dark(clean: list[ParsedImage]) -> None:
    """The skin's mean is set to the darkest tone of the Monk scale (#292420); shading is kept."""
    for parsed in clean[:8]:
        skin = np.isin(parsed.labels, (1, 10))
        image = parsed.image.astype(np.float64)
        image[skin] *= np.array([0x29, 0x24, 0x20]) / image[skin].mean(axis=0)
        metrics = parsed.with_image(image).measure()
        assert RULES.min_brightness < metrics.brightness < 0.15
        assert metrics.clipped < RULES.max_clipped


def test_exposure_depends_on_the_faces_pixels_only(clean: list[ParsedImage]) -> None:
    for parsed in clean[:8]:
        face_only = np.where(np.isin(parsed.labels, range(1, 14))[..., None], parsed.image, 0)
        one, other = parsed.measure(), parsed.with_image(face_only).measure()
        assert (one.brightness, one.clipped) == (other.brightness, other.clipped)


@pytest.mark.parametrize("yaw", [-60, -35, -10, 0, 20, 45, 60])
@pytest.mark.parametrize(("pitch", "roll"), [(0, 0), (-25, 30), (20, -40), (10, 90)])
def test_angles_of_a_face_at_70_cm_are_recovered(yaw: float, pitch: float, roll: float) -> None:
    posed = FACE_MM @ rotation_matrix(yaw, pitch, roll).T
    points = 800 * posed[:, :2] / (700 + posed[:, 2:]) + [300, 200]  # perspective: 70 cm away
    assert np.allclose(angles_of(rotation_of(face_at(points))), (yaw, pitch, roll), atol=4)


def test_the_signs_of_the_angles_are_as_the_viewer_sees_them() -> None:
    frontal = FACE_MM[:, :2] * 2 + [200, 200]
    to_the_right, upwards, clockwise = frontal.copy(), frontal.copy(), frontal.copy()
    to_the_right[2, 0] += 20  # the nose tip
    upwards[2, 1] -= 20
    clockwise[:, 1] += 0.2 * (frontal[:, 0] - 200)  # the viewer's right goes down
    assert np.allclose(angles_of(rotation_of(face_at(frontal))), 0, atol=0.5)
    assert angles_of(rotation_of(face_at(to_the_right)))[0] > 5
    assert angles_of(rotation_of(face_at(upwards)))[1] > 5
    assert angles_of(rotation_of(face_at(clockwise)))[2] > 5


@pytest.mark.parametrize("degrees", [-45, 30, 120])
def test_rotating_an_image_changes_roll_only(clean: list[ParsedImage], degrees: float) -> None:
    angle = math.radians(degrees)
    spin = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    for parsed in clean:
        before = np.array(angles_of(rotation_of(parsed.face)))
        after = np.array(angles_of(rotation_of(face_at(np.array(parsed.face.landmarks) @ spin))))
        assert np.allclose(after - before, (0, 0, degrees), atol=0.5)


def test_an_image_rotated_before_detection_has_roll(portraits: Path) -> None:
    images = [decode_jpeg(path.read_bytes()) for path in sorted(portraits.glob("*.jpg"))[:3]]
    matrix = cv2.getRotationMatrix2D((512, 512), -45, 0.8)  # OpenCV's angle is counter-clockwise
    tilted = [
        cv2.warpAffine(im, matrix, (1024, 1024), borderMode=cv2.BORDER_REFLECT) for im in images
    ]
    for parsed in parse_images([np.asarray(image, np.uint8) for image in tilted]):
        assert RULES.max_roll < parsed.measure().roll < 60


def covered(parsed: ParsedImage, part: str, pattern: str) -> Image:
    """Returns the image with a rectangle over the face's lower half, mouth or upper half."""
    x1, y1, x2, y2 = parsed.face.box
    _, _, nose, *corners = (y for _, y in parsed.face.landmarks)
    top, bottom = {
        "lower": (nose + 5, y2 + 10),
        "mouth": (min(corners) - 15, y2),
        "upper": (y1 - 5, nose),
    }[part]
    rows = slice(max(0, round(top)), round(bottom))
    columns = slice(max(0, round(x1 - 8)), round(x2 + 8))
    image = parsed.image.copy()
    shape = image[rows, columns].shape
    if pattern == "cloth":
        image[rows, columns] = (90, 130, 200)
    elif pattern == "black":
        image[rows, columns] = 0
    else:
        coarse = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
        image[rows, columns] = cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return image


@pytest.mark.parametrize(
    ("part", "pattern"),
    [("lower", "black"), ("lower", "texture"), ("mouth", "cloth"), ("upper", "black")],
)
def test_a_covered_half_is_detected_whatever_its_labels(
    clean: list[ParsedImage], part: str, pattern: str
) -> None:
    for parsed in parse_images([covered(parsed, part, pattern) for parsed in clean[1:5]]):
        assert parsed.measure().occlusion > RULES.max_occlusion


def test_hair_over_the_eyes_counts_as_occlusion_and_a_beard_does_not(
    clean: list[ParsedImage],
) -> None:
    parsed = clean[0]
    x1, y1, x2, y2 = (round(value) for value in parsed.face.box)
    eyes, nose = round(parsed.face.landmarks[0][1]), round(parsed.face.landmarks[2][1])
    fringe, beard, glasses = parsed.labels.copy(), parsed.labels.copy(), parsed.labels.copy()
    fringe[y1 : eyes + 20, x1:x2] = 17
    below = beard[nose + 15 : y2, x1:x2]
    below[below == 1] = 17
    glasses[eyes - 15 : eyes + 15, x1:x2] = 6
    plain = parsed.measure().occlusion
    assert replace(parsed, labels=fringe).measure().occlusion > RULES.max_occlusion
    assert replace(parsed, labels=beard).measure().occlusion == pytest.approx(plain, abs=0.01)
    assert replace(parsed, labels=glasses).measure().occlusion == pytest.approx(plain, abs=0.01)


@pytest.mark.parametrize("label", [0, 14, 16, 18])
def test_occlusion_is_the_area_of_other_labels_inside_the_face(
    clean: list[ParsedImage], label: int
) -> None:
    """Half of eyes, nose and mouth stays visible, so only the labels inside the face count."""
    for parsed in clean[:8]:
        labels = parsed.labels.copy()
        side = labels[:, : round(parsed.face.landmarks[2][0])]
        side[side == 1] = label
        assert 0.2 < replace(parsed, labels=labels).measure().occlusion < 0.5


@pytest.mark.parametrize("label", [0, 14, 16, 18])
def test_a_label_map_without_a_face_is_fully_occluded(clean: list[ParsedImage], label: int) -> None:
    assert replace(clean[0], labels=np.full_like(clean[0].labels, label)).measure().occlusion == 1


def test_hashes_of_changed_copies_are_close_and_those_of_different_people_are_not(
    clean: list[ParsedImage],
) -> None:
    hashes = [imagehash.hex_to_hash(parsed.measure().hash) for parsed in clean]
    for parsed, whole in zip(clean, hashes, strict=True):
        for copy in (resized(parsed, 0.75), parsed.with_image(parsed.image * 0.8)):
            text = copy.measure().hash
            assert len(text) == 64 and imagehash.hex_to_hash(text) - whole <= 12
        # `measure` reduces the image before hashing, this doesn't
        assert whole - imagehash.phash(imagehash.Image.fromarray(parsed.image), hash_size=16) <= 8
    between = [one - other for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(between) > 60


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 64)])
@pytest.mark.parametrize(
    "points",
    [
        [(5.0, 5.0)] * 5,
        [(float(i), 2.0 * i) for i in range(5)],
        [(-900.0, -900.0), (-800.0, -900.0), (-850.0, -850.0), (-880.0, -800.0), (-820.0, -800.0)],
        [(1e7, 0.0), (2e7, 0.0), (1.5e7, 1e7), (1e7, 2e7), (2e7, 2e7)],
        [(20.0, 40.0), (40.0, 40.0), (30.0, 30.0), (22.0, 20.0), (38.0, 20.0)],
    ],
)
def test_metrics_of_degenerate_faces_are_finite(
    shape: tuple[int, int], points: list[tuple[float, float]]
) -> None:
    face = Face(box=(*points[0], *points[4]), landmarks=tuple(points), score=0.5)
    image = np.full((*shape, 3), 90, np.uint8)
    for label in (0, 1):
        labels = np.full(shape, label, np.uint8)
        metrics = measure(image, labels, face)
        numbers = astuple(metrics)[:7]
        assert all(math.isfinite(number) for number in numbers)
        assert all(0 <= number <= 1 for number in (*numbers[:3], numbers[6]))
        assert len(metrics.hash) == 64
        assert metrics == measure(image, labels, face)

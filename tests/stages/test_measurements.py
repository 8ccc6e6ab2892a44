"""The measured figures: on real portraits, on planted defects, and where nothing can be measured."""

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
class Seen:
    image: Image
    labels: LabelMap
    face: Face

    def measure(self) -> Measures:
        return measure(self.image, self.labels, self.face)

    def with_image(self, image: object) -> Seen:
        """The same face in changed pixels, that move no part of it."""
        return replace(self, image=np.asarray(image).clip(0, 255).round().astype(np.uint8))


def see(images: list[Image]) -> list[Seen]:
    """Through resize, detect and parse."""
    chain = build_stages(DatasetConfig(parse=ParseConfig(dtype="bfloat16")))[:3]
    for stage in chain:
        stage.setup()
    given = [
        Record(key=key_of(str(i)), source=str(i), image=encode_jpeg(im, 95))
        for i, im in enumerate(images)
    ]
    made = run_chain(chain, given)
    assert [record.reason for record in made] == [""] * len(made)
    return [Seen(decode_jpeg(r.image), decode_labels(r.parsing), r.main_face) for r in made]


@pytest.fixture(scope="module")
def clean(portraits: Path) -> list[Seen]:
    """The eight portraits, then the astronaut, whose face is a sixth of the picture."""
    images = [decode_jpeg(path.read_bytes()) for path in sorted(portraits.glob("*.jpg"))]
    return see([*images, np.asarray(skimage.data.astronaut(), np.uint8)])


def blurred(image: Image, sigma: float) -> Image:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)


def smaller(seen: Seen, by: float) -> Seen:
    """The picture shrunk: its face and its label map with it."""
    size = (round(seen.image.shape[1] * by), round(seen.image.shape[0] * by))
    image = cv2.resize(seen.image, size, interpolation=cv2.INTER_AREA)
    labels = cv2.resize(seen.labels, size, interpolation=cv2.INTER_NEAREST)
    face = Face(
        box=tuple(value * by for value in seen.face.box),  # type: ignore[arg-type]
        landmarks=tuple((x * by, y * by) for x, y in seen.face.landmarks),
        score=seen.face.score,
    )
    return Seen(np.asarray(image, np.uint8), np.asarray(labels, np.uint8), face)


def mirrored(seen: Seen) -> Seen:
    width = seen.image.shape[1]
    x1, y1, x2, y2 = seen.face.box
    left, right, nose, left_corner, right_corner = ((width - x, y) for x, y in seen.face.landmarks)
    face = Face(
        box=(width - x2, y1, width - x1, y2),
        landmarks=(right, left, nose, right_corner, left_corner),
        score=seen.face.score,
    )
    return Seen(
        np.ascontiguousarray(seen.image[:, ::-1]), np.ascontiguousarray(seen.labels[:, ::-1]), face
    )


def turned(yaw: float, pitch: float, roll: float) -> Points:
    """Rotation by angles as the measures have them, axis by axis, written down independently of the
    module.
    """
    y, p, r = np.radians([-yaw, -pitch, roll])
    around_x = np.array([[1, 0, 0], [0, math.cos(p), -math.sin(p)], [0, math.sin(p), math.cos(p)]])
    around_y = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    around_z = np.array([[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1]])
    return np.asarray(around_z @ around_y @ around_x, np.float64)


def face_at(points: Points) -> Face:
    (x1, y1), (x2, y2) = points.min(axis=0) - 20, points.max(axis=0) + 20
    return Face(
        box=(x1, y1, x2, y2), landmarks=tuple((float(x), float(y)) for x, y in points), score=0.9
    )


# --------------------------------------------------------------------------------------------------


def test_clean_portraits_keep_every_rule_with_room(clean: list[Seen]) -> None:
    for seen in clean:
        found = seen.measure()
        assert RULES.min_sharpness * 1.1 < found.sharpness < 1
        assert RULES.min_brightness * 2 < found.brightness < RULES.max_brightness
        assert found.clipped < RULES.max_clipped / 10 and found.occlusion < RULES.max_occlusion / 4
        assert abs(found.yaw) < 45 and abs(found.pitch) < 30 and abs(found.roll) < 15


def test_mirroring_flips_yaw_and_roll_and_nothing_else(clean: list[Seen]) -> None:
    for seen in clean:
        one, other = seen.measure(), mirrored(seen).measure()
        assert np.allclose(
            [one.yaw, one.pitch, one.roll], [-other.yaw, other.pitch, -other.roll], atol=0.5
        )
        assert one.sharpness == pytest.approx(other.sharpness, rel=0.03)
        assert one.brightness == pytest.approx(other.brightness, rel=0.01)
        assert one.occlusion == pytest.approx(other.occlusion, abs=0.02)


def test_size_changes_no_figure_of_a_sharp_face(clean: list[Seen]) -> None:
    for seen in clean[:8]:
        whole, quarter = seen.measure(), smaller(seen, 0.25).measure()  # a face of about 70 pixels
        assert quarter.sharpness == pytest.approx(whole.sharpness, rel=0.35)
        assert quarter.brightness == pytest.approx(whole.brightness, abs=0.01)
        assert np.allclose(astuple(quarter)[3:6], astuple(whole)[3:6], atol=0.1)
        assert quarter.occlusion == pytest.approx(whole.occlusion, abs=0.02)


def test_the_same_picture_gives_the_same_figures(clean: list[Seen]) -> None:
    assert clean[0].measure() == clean[0].measure()


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [1.0, 0.5, 0.25])
def test_one_threshold_finds_blur_in_large_and_small_faces(clean: list[Seen], by: float) -> None:
    for seen in map(smaller, clean[:8], [by] * 8):
        side = min(seen.face.box[2] - seen.face.box[0], seen.face.box[3] - seen.face.box[1])
        soft = seen.with_image(blurred(seen.image, max(1.5, 0.011 * side)))  # 3 px of a face of 280
        assert soft.measure().sharpness < RULES.min_sharpness < seen.measure().sharpness


def test_motion_in_any_direction_is_blur(clean: list[Seen]) -> None:
    for streak in (np.ones((1, 21)), np.ones((21, 1)), np.eye(15)):
        for seen in clean[:8]:
            moved = seen.with_image(cv2.filter2D(seen.image, -1, streak / streak.sum()))
            assert moved.measure().sharpness < RULES.min_sharpness


def test_dim_light_is_no_blur_and_hides_none(clean: list[Seen]) -> None:
    for seen in clean[:8]:
        dim = seen.with_image(seen.image * 0.25)
        assert dim.measure().sharpness > RULES.min_sharpness
        assert (
            dim.with_image(blurred(seen.image, 4.0) * 0.25).measure().sharpness
            < RULES.min_sharpness
        )


def test_a_sharp_background_makes_no_soft_face_sharp(clean: list[Seen]) -> None:
    seen = clean[0]
    noise = np.random.default_rng(0).integers(0, 255, seen.image.shape)
    x1, y1, x2, y2 = (round(value) for value in seen.face.box)
    image = noise.copy()
    image[y1:y2, x1:x2] = blurred(seen.image, 4.0)[y1:y2, x1:x2]
    assert seen.with_image(image).measure().sharpness < RULES.min_sharpness


# --------------------------------------------------------------------------------------------------


def test_darkness_and_glare_are_told_from_dim_light(clean: list[Seen]) -> None:
    for seen in clean[:8]:
        assert seen.with_image(seen.image * 0.15).measure().brightness < RULES.min_brightness
        assert seen.with_image(seen.image * 0.4).measure().brightness > RULES.min_brightness
        glare = seen.with_image(seen.image * 3.0).measure()
        assert glare.brightness > RULES.max_brightness or glare.clipped > RULES.max_clipped


def test_the_darkest_skin_well_lit_is_not_too_dark(clean: list[Seen]) -> None:
    """Skin brought to the darkest swatch of the Monk scale (#292420), its shading kept."""
    for seen in clean[:8]:
        skin = np.isin(seen.labels, (1, 10))
        image = seen.image.astype(np.float64)
        image[skin] *= np.array([0x29, 0x24, 0x20]) / image[skin].mean(axis=0)
        found = seen.with_image(image).measure()
        assert RULES.min_brightness < found.brightness < 0.15 and found.clipped < RULES.max_clipped


def test_only_the_faces_own_pixels_count_as_light(clean: list[Seen]) -> None:
    for seen in clean[:8]:
        outside = np.where(np.isin(seen.labels, range(1, 14))[..., None], seen.image, 0)
        one, other = seen.measure(), seen.with_image(outside).measure()
        assert (one.brightness, one.clipped) == (other.brightness, other.clipped)


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yaw", [-60, -35, -10, 0, 20, 45, 60])
@pytest.mark.parametrize(("pitch", "roll"), [(0, 0), (-25, 30), (20, -40), (10, 90)])
def test_known_angles_are_recovered_from_a_camera_at_arms_length(
    yaw: float, pitch: float, roll: float
) -> None:
    posed = FACE_MM @ turned(yaw, pitch, roll).T
    points = 800 * posed[:, :2] / (700 + posed[:, 2:]) + [300, 200]  # perspective: 70 cm away
    assert np.allclose(angles_of(rotation_of(face_at(points))), (yaw, pitch, roll), atol=4)


def test_the_signs_are_what_a_viewer_sees() -> None:
    frontal = FACE_MM[:, :2] * 2 + [200, 200]
    to_the_right, upwards, clockwise = frontal.copy(), frontal.copy(), frontal.copy()
    to_the_right[2, 0] += 20  # the nose tip
    upwards[2, 1] -= 20
    clockwise[:, 1] += 0.2 * (frontal[:, 0] - 200)  # what is on the viewer's right sinks
    assert np.allclose(angles_of(rotation_of(face_at(frontal))), 0, atol=0.5)
    assert angles_of(rotation_of(face_at(to_the_right)))[0] > 5
    assert angles_of(rotation_of(face_at(upwards)))[1] > 5
    assert angles_of(rotation_of(face_at(clockwise)))[2] > 5


@pytest.mark.parametrize("degrees", [-45, 30, 120])
def test_rotating_a_picture_is_roll_alone(clean: list[Seen], degrees: float) -> None:
    angle = math.radians(degrees)
    spin = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    for seen in clean:
        before = np.array(angles_of(rotation_of(seen.face)))
        after = np.array(angles_of(rotation_of(face_at(np.array(seen.face.landmarks) @ spin))))
        assert np.allclose(after - before, (0, 0, degrees), atol=0.5)


def test_a_picture_rotated_before_detection_is_found_tilted(portraits: Path) -> None:
    images = [decode_jpeg(path.read_bytes()) for path in sorted(portraits.glob("*.jpg"))[:3]]
    matrix = cv2.getRotationMatrix2D((512, 512), -45, 0.8)  # OpenCV's angle is counter-clockwise
    tilted = [
        cv2.warpAffine(im, matrix, (1024, 1024), borderMode=cv2.BORDER_REFLECT) for im in images
    ]
    for seen in see([np.asarray(image, np.uint8) for image in tilted]):
        assert RULES.max_roll < seen.measure().roll < 60


# --------------------------------------------------------------------------------------------------


def covered(seen: Seen, part: str, pattern: str) -> Image:
    """A rectangle over the face's lower or upper half, in its 512² picture."""
    x1, y1, x2, y2 = seen.face.box
    _, _, nose, *corners = (y for _, y in seen.face.landmarks)
    top, bottom = {
        "lower": (nose + 5, y2 + 10),
        "mouth": (min(corners) - 15, y2),
        "upper": (y1 - 5, nose),
    }[part]
    rows, columns = (
        slice(max(0, round(top)), round(bottom)),
        slice(max(0, round(x1 - 8)), round(x2 + 8)),
    )
    image = seen.image.copy()
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
def test_a_covered_half_is_found_whatever_the_parser_calls_it(
    clean: list[Seen], part: str, pattern: str
) -> None:
    for seen in see([covered(seen, part, pattern) for seen in clean[1:5]]):
        assert seen.measure().occlusion > RULES.max_occlusion


def test_hair_covers_eyes_and_a_beard_covers_nothing(clean: list[Seen]) -> None:
    seen = clean[0]
    x1, y1, x2, y2 = (round(value) for value in seen.face.box)
    eyes, nose = round(seen.face.landmarks[0][1]), round(seen.face.landmarks[2][1])
    fringe, beard, glasses = seen.labels.copy(), seen.labels.copy(), seen.labels.copy()
    fringe[y1 : eyes + 20, x1:x2] = 17
    below = beard[nose + 15 : y2, x1:x2]
    below[below == 1] = 17
    glasses[eyes - 15 : eyes + 15, x1:x2] = 6
    plain = seen.measure().occlusion
    assert replace(seen, labels=fringe).measure().occlusion > RULES.max_occlusion
    assert replace(seen, labels=beard).measure().occlusion == pytest.approx(plain, abs=0.01)
    assert replace(seen, labels=glasses).measure().occlusion == pytest.approx(plain, abs=0.01)


@pytest.mark.parametrize("label", [0, 14, 16, 18])
def test_a_hand_beside_the_nose_counts_by_its_area(clean: list[Seen], label: int) -> None:
    """Eyes, nose and mouth all stay in part: only the foreign pixels tell."""
    for seen in clean[:8]:
        labels = seen.labels.copy()
        side = labels[:, : round(seen.face.landmarks[2][0])]
        side[side == 1] = label
        assert 0.2 < replace(seen, labels=labels).measure().occlusion < 0.5


@pytest.mark.parametrize("label", [0, 14, 16, 18])
def test_a_map_of_something_else_is_all_covered(clean: list[Seen], label: int) -> None:
    assert replace(clean[0], labels=np.full_like(clean[0].labels, label)).measure().occlusion == 1


# -------------------------------------------------------------------------------------------------


def test_copies_hash_alike_and_people_do_not(clean: list[Seen]) -> None:
    hashes = [imagehash.hex_to_hash(seen.measure().hash) for seen in clean]
    for seen, whole in zip(clean, hashes, strict=True):
        text = smaller(seen, 0.75).measure().hash
        assert len(text) == 64 and imagehash.hex_to_hash(text) - whole <= 12
        assert imagehash.hex_to_hash(seen.with_image(seen.image * 0.8).measure().hash) - whole <= 12
        # shrunk first
        assert whole - imagehash.phash(imagehash.Image.fromarray(seen.image), hash_size=16) <= 8
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
def test_where_nothing_can_be_measured_figures_are_finite(
    shape: tuple[int, int], points: list[tuple[float, float]]
) -> None:
    face = Face(box=(*points[0], *points[4]), landmarks=tuple(points), score=0.5)
    for value in (0, 1):
        found = measure(np.full((*shape, 3), 90, np.uint8), np.full(shape, value, np.uint8), face)
        figures = astuple(found)[:7]
        assert all(math.isfinite(figure) for figure in figures)
        assert (
            all(0 <= figure <= 1 for figure in (*figures[:3], figures[6])) and len(found.hash) == 64
        )
        assert found == measure(
            np.full((*shape, 3), 90, np.uint8), np.full(shape, value, np.uint8), face
        )

"""AVIF, HEIF and formats that can't be read: pixels, orientation, bombs, cut files, and the reason
where a decoder is not installed.
"""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from configs.schema import ResizeConfig
from stages.base import Failed
from stages.formats import HEAD, READABLE, format_of
from stages.resize import decode
from tests.pipelines.sources import corpus_formats

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
KINDS = ("AVIF", "HEIF")
_TURN = Image.Transpose
# EXIF orientation → how an upright image is stored with it
_STORED = {3: _TURN.ROTATE_180, 6: _TURN.ROTATE_90, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_270}


def drawing() -> Image.Image:
    """Red at the left, green at the top right, blue below it; 160 × 96 pixels."""
    pixels = np.zeros((96, 160, 3), np.uint8)
    pixels[:, :80], pixels[:48, 80:], pixels[48:, 80:] = RED, GREEN, BLUE
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "HEIF":
        return corpus_formats.heif(image, exif.tobytes())
    return corpus_formats.encoded(image, kind, exif=exif)


def reason(data: bytes, **settings: int) -> tuple[str, str]:
    """The reason and detail with which `data` fails."""
    with pytest.raises(Failed) as caught:
        decode(data, ResizeConfig(**settings))
    return caught.value.reason, caught.value.detail


def assert_is_drawing(pixels: np.ndarray) -> None:
    assert pixels.shape == (96, 160, 3)
    for (row, column), color in {(4, 4): RED, (4, 155): GREEN, (91, 155): BLUE}.items():
        assert np.abs(pixels[row, column] - np.array(color)).max() < 12, pixels[row, column]


@pytest.mark.parametrize("kind", KINDS)
def test_orientation_is_applied_once(kind: str) -> None:
    assert_is_drawing(decode(encoded(drawing(), kind), ResizeConfig()))
    for orientation, transposition in _STORED.items():
        data = encoded(drawing().transpose(transposition), kind, orientation)
        # the file must hold turned pixels and say how to turn them, or this proves nothing
        if kind == "HEIF":
            assert b"irot" in data or b"imir" in data
        assert_is_drawing(decode(data, ResizeConfig()))


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_is_laid_on_white(kind: str) -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert decode(encoded(clear, kind), ResizeConfig()).min() > 250
    if kind == "HEIF":
        assert decode(encoded(clear.convert("RGBa"), kind), ResizeConfig()).min() > 250


def test_ten_bits_become_eight() -> None:
    wide = np.asarray(drawing(), np.uint16)
    with io.BytesIO() as out:
        pillow_heif.from_bytes("RGB;16", (160, 96), (wide * 257).tobytes()).save(out)
        heif = out.getvalue()
    assert pillow_heif.open_heif(io.BytesIO(heif)).info["bit_depth"] == 10
    assert_is_drawing(decode(heif, ResizeConfig()))
    depth = [cv2.IMWRITE_AVIF_DEPTH, 10]
    assert_is_drawing(
        decode(cv2.imencode(".avif", wide[..., ::-1] * 4, depth)[1].tobytes(), ResizeConfig())
    )


def test_of_several_images_the_first_frame_or_the_primary_image_is_used() -> None:
    other = Image.new("RGB", (160, 96), "yellow")
    with io.BytesIO() as out:
        drawing().save(out, "AVIF", save_all=True, append_images=[other])
        assert_is_drawing(decode(out.getvalue(), ResizeConfig()))
    images = pillow_heif.from_pillow(other)
    images.add_from_pillow(drawing())
    with io.BytesIO() as out:
        images.save(out, primary_index=1)
        assert_is_drawing(decode(out.getvalue(), ResizeConfig()))


def test_a_heif_of_tiles_is_read_as_phones_write_it() -> None:
    with io.BytesIO() as out:
        pillow_heif.from_pillow(drawing()).save(out, tile_size=64)
        data = out.getvalue()
    assert b"grid" in data
    assert_is_drawing(decode(data, ResizeConfig()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_truncated_and_a_broken_one_undecodable(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), kind)
    for length in (20, 40, 200, len(whole) // 2, len(whole) - 1):
        name, detail = reason(whole[:length])
        assert (name, bool(detail)) == ("truncated", True), length
    meta = whole.index(b"meta")
    name, detail = reason(whole[: meta + 8] + bytes(200) + whole[meta + 208 :])
    assert (name, bool(detail)) == ("undecodable", True)


def test_damage_anywhere_has_a_reason() -> None:
    random = np.random.default_rng(0)
    reasons = set()
    for kind in KINDS:
        whole = np.frombuffer(encoded(drawing(), kind), np.uint8)
        for _ in range(300):
            damaged = whole.copy()
            damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
            try:
                decode(damaged[: random.integers(1, 2 * len(whole))].tobytes(), ResizeConfig())
            except Failed as failure:
                reasons.add(failure.reason)
                assert failure.detail
    assert {"truncated", "undecodable"} <= reasons


@pytest.mark.parametrize("kind", KINDS)
def test_the_declared_size_is_checked_before_decoding(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(drawing(), kind)
    assert reason(data, max_bytes=len(data) - 1)[0] == "too_many_bytes"
    plugin = "PIL.AvifImagePlugin.AvifImageFile" if kind == "AVIF" else "pillow_heif.HeifImageFile"
    monkeypatch.setattr(f"{plugin}.load", lambda image: pytest.fail("decoded"))
    assert reason(data, max_pixels=160 * 96 - 1)[0] == "too_many_pixels"


def test_a_heif_that_is_larger_than_its_header_says_is_refused() -> None:
    data = encoded(Image.new("RGB", (1000, 1000)), "HEIF")
    place = data.index(b"ispe") + 8
    small = data[:place] + struct.pack(">II", 64, 64) + data[place + 8 :]
    name, detail = reason(small)
    assert name == "undecodable" and "1000x1000" in detail


def test_the_brands_tell_avif_from_heif() -> None:
    for kind in KINDS:
        whole = encoded(drawing(), kind)
        assert format_of(whole[:HEAD]) == kind
        # both may begin with the brand of their container
        assert format_of(whole[:8] + b"mif1" + whole[12:HEAD]) == kind


def test_other_formats_are_named() -> None:
    heads = {
        "JPEG XL": b"\xff\x0a\xfa\x7f",
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
        "Photoshop": b"8BPS\0\1",
        "camera raw": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>',
    }
    for name, head in heads.items():
        because, detail = reason(head + bytes(400))
        assert (because, detail.startswith(name)) == ("unsupported_format", True), (name, detail)
    assert format_of(b"BM is how this text begins" * 9) == ""


def test_an_ending_tells_camera_raw_from_tiff() -> None:
    with io.BytesIO() as out:
        drawing().save(out, "TIFF")
        tiff = out.getvalue()
    assert format_of(tiff, ".tif") == "TIFF" in READABLE
    assert format_of(tiff, ".nef") == "camera raw" not in READABLE


_DECODE = """
import sys
from pathlib import Path
from configs.schema import ResizeConfig
from stages.base import Failed
from stages.resize import decode
assert "pillow_heif" not in sys.modules, "only a HEIF image needs it"
for name in sys.argv[1:]:
    try:
        print(name, decode(Path(name).read_bytes(), ResizeConfig()).shape)
    except Failed as failure:
        print(name, failure.reason, failure.detail)
"""


def test_without_a_decoder_the_reason_names_what_to_install(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / kind).write_bytes(encoded(drawing(), kind))
    drawing().save(tmp_path / "PNG", "PNG")
    done = _python_without(tmp_path, r"_?pillow_heif.*", r"_avif\..*")
    by_name = dict(line.split(" ", 1) for line in done.splitlines())
    assert re.match("unsupported_format an AVIF image.* pip install .*pillow$", by_name["AVIF"])
    assert re.match("unsupported_format a HEIF .* pip install pillow-heif$", by_name["HEIF"])
    assert by_name["PNG"] == "(96, 160, 3)"
    # the same with both, so that it is their absence that fails
    done = _python_without(tmp_path, "nothing", "nothing")
    assert {line.split(" ", 1)[1] for line in done.splitlines()} == {"(96, 160, 3)"}


def _python_without(folder: Path, packages: str, of_pillow: str) -> str:
    """Decodes the files of `folder` in an interpreter whose site-packages lack what matches the
    patterns: a folder of links to the installed ones. Returns what it prints.
    """
    installed, linked = Path(sysconfig.get_paths()["purelib"]), folder / f"site {packages[:3]}"
    (linked / "PIL").mkdir(parents=True)
    for path in installed.iterdir():
        if path.name != "PIL" and not re.fullmatch(packages, path.name):
            (linked / path.name).symlink_to(path)
    for path in (installed / "PIL").iterdir():
        if not re.fullmatch(of_pillow, path.name):
            (linked / "PIL" / path.name).symlink_to(path)
    code = [sys.executable, "-S", "-c", _DECODE, *KINDS, "PNG"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(linked)])}
    done = subprocess.run(code, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

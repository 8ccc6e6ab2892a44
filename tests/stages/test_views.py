"""What a model sees of a picture: all of it, and the crop of a small face as a second image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from configs.captions import CaptionConfig, LlavaConfig, OpenAIConfig
from configs.errors import ConfigError
from stages.annotations import Answers
from stages.backends import views
from stages.backends.llava import Llava
from stages.backends.openai import OpenAICaptioner
from stages.backends.protocols import Kind
from stages.backends.weights import Weights
from stages.base import run_stage
from stages.caption import CaptionStage
from stages.codec import decode_jpeg, encode_jpeg
from stages.record import Face, Record, key_of
from tests.stages.chat_server import ChatServer, Reply, Request, completion
from tests.stages.records import drawn_record, texts_of
from tests.stages.tiny_llava import PUBLISHED, make_checkpoint

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
BAND = 64  # pixels
KINDS: tuple[Kind, Kind] = (0, 1)


def record_of(image: Any, face: Face | None = None) -> Record:
    jpeg = encode_jpeg(image, 95)
    height, width = image.shape[:2]
    faces = (face,) if face else ()
    name = f"{width}x{height}"
    return Record(
        key=key_of(name),
        source=name,
        image=jpeg,
        width=width,
        height=height,
        faces=faces,
        face=0 if face else -1,
    )


def face_of(x: float, y: float, width: float, height: float) -> Face:
    return Face(box=(x, y, x + width, y + height), landmarks=((x, y),) * 5, score=1.0)


def photograph(width: int, height: int) -> Any:
    return np.tile(astronaut(), (2, 2, 1))[:height, :width]


def with_each_band_changed(width: int, height: int) -> list[Record]:
    """Returns records of a picture, and of it with one band across its longer side inverted."""
    plain = photograph(width, height)
    changed = [plain]
    for start in range(0, max(width, height), BAND):
        image = plain.copy()
        band = image[start : start + BAND] if height > width else image[:, start : start + BAND]
        band[:] = 255 - band
        changed.append(image)
    return [record_of(image) for image in changed]


def llava(folder: Path, **changes: Any) -> Llava:
    settings: dict[str, Any] = {"device": "cpu", "max_new_tokens": 8, **changes}
    settings.setdefault("face_max_new_tokens", settings["max_new_tokens"])
    return Llava(LlavaConfig(model=str(folder), **settings))


def pixel_values(backend: Llava, shown: Sequence[Any]) -> list[bytes]:
    """Returns what the model gets of each picture."""
    process = backend.decoder.processor.image_processor
    inputs = [process(images=[Image.fromarray(image)], return_tensors="pt") for image in shown]
    return [each["pixel_values"].numpy().tobytes() for each in inputs]


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_band_of_a_tall_or_wide_picture_reaches_the_model(kind: Any, tmp_path: Path) -> None:
    backend = llava(make_checkpoint(tmp_path, kind, size=PUBLISHED[kind]))
    for width, height in ((512, 1024), (1024, 512)):
        records = with_each_band_changed(width, height)
        seen = pixel_values(backend, [backend.shown(record, 0)[0] for record in records])
        assert len(set(seen)) == len(records) == 17
    if kind != "llava":
        assert backend.shown(records[0], 0)[0].shape == (512, 1024, 3), (
            "it sees the whole picture without padding, which would cost it tokens"
        )


def test_each_band_reaches_a_llava_behind_a_server(tmp_path: Path) -> None:
    backend = llava(make_checkpoint(tmp_path, size=PUBLISHED["llava"]))
    for width, height in ((512, 1024), (1024, 512)):
        records = with_each_band_changed(width, height)
        sent = [request.jpeg for request in requests_for(records)]
        assert len(sent) == 2 * len(records) and len(set(sent)) == len(records)
        seen = pixel_values(backend, [decode_jpeg(jpeg) for jpeg in set(sent)])
        assert len(set(seen)) == len(records)
        again = {request.jpeg for request in requests_for(records[:2])}
        assert again < set(sent), "the same pictures give the same bytes"


def requests_for(records: list[Record], **changes: Any) -> list[Request]:
    """Returns the requests that a server gets for captions of these records."""
    with ChatServer() as server:
        config = OpenAIConfig(base_url=server.base_url, model="m", tries=1, **changes)
        OpenAICaptioner(config).caption(records)
    return server.requests


def test_padding_is_equal_on_both_sides_and_has_the_mean_colour(tmp_path: Path) -> None:
    backend = llava(make_checkpoint(tmp_path, size=PUBLISHED["llava"]))
    wide = record_of(photograph(301, 200))
    (shown,) = backend.shown(wide, 0)
    assert shown.shape == (301, 301, 3)
    assert (shown[50:250] == decode_jpeg(wide.image)).all()
    assert (shown[:50] == views.CLIP_MEAN).all() and (shown[250:] == views.CLIP_MEAN).all()
    sent = decode_jpeg(requests_for([wide])[0].jpeg).astype(int)
    assert sent.shape == (301, 301, 3) and abs(sent - shown).max() < 40
    assert abs(sent[:48] - views.CLIP_MEAN).max() <= 1


def test_a_square_picture_and_one_that_is_not_to_be_padded_are_sent_unchanged() -> None:
    square, wide = record_of(astronaut()), record_of(photograph(512, 256))
    assert {request.jpeg for request in requests_for([square])} == {square.image}
    sent = requests_for([square, wide], pad_to_square=False)
    assert {request.jpeg for request in sent} == {square.image, wide.image}


def test_without_padding_the_ends_are_lost_as_in_version_0_1(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, size=PUBLISHED["llava"])
    backend = llava(folder, pad_to_square=False)
    records = with_each_band_changed(512, 1024)
    seen = pixel_values(backend, [backend.shown(record, 0)[0] for record in records])
    assert len(set(seen)) == 11, "six of the eight bands in the outer quarters are lost"


def test_the_crop_is_a_square_around_the_face_inside_the_picture() -> None:
    image = np.zeros((400, 300, 3), np.uint8)
    boxes = {
        "middle": (140, 180, 30, 40),
        "corner": (270, 5, 30, 40),
        "beyond the edge": (-10, 380, 30, 40),
        "wide": (0, 100, 290, 60),
    }
    for name, (x, y, width, height) in boxes.items():
        marked = image.copy()
        marked[max(y, 0) : y + height, max(x, 0) : x + width] = (255, 0, 0)
        record = record_of(marked, face_of(x, y, width, height))
        crop = views.face_crop(record)
        assert crop.shape == (views.CROP_SIDE, views.CROP_SIDE, 3), name
        red = (crop[..., 0] > 127).sum() / views.CROP_SIDE**2
        side = min(2 * max(width, height), 300)
        expected = (marked[..., 0] > 127).sum() / side**2
        assert red == pytest.approx(expected, rel=0.1), f"{name}: all of the face is in it"
        above = views.has_small_face(record, height / 400 + 0.001)
        assert above or name == "beyond the edge"
        assert not views.has_small_face(record, views.face_height(record))
    assert not views.has_small_face(record_of(image), 0.0), "the option needs no main face if off"


def small_and_large() -> list[Record]:
    """Returns two records with a small face, and one with a large face between them."""
    pictures = (photograph(96, 128), photograph(128, 128)[::-1], photograph(128, 96))
    faces = (face_of(40, 10, 16, 20), face_of(20, 20, 80, 100), face_of(60, 30, 16, 20))
    return [record_of(*pair) for pair in zip(pictures, faces, strict=True)]


def expected_answer(backend: Llava, record: Record, kind: Kind, prompts: Any) -> str:
    """Returns what a `generate` call writes about the images for a caption of this kind."""
    picture = backend.shown(record, 0)[0]
    images = (
        [picture, views.face_crop(record)] if kind and record.main_face.side < 50 else [picture]
    )
    text = backend.decoder.templated(prompts[kind], len(images))
    inputs = backend.decoder.processor(
        images=[[Image.fromarray(image) for image in images]], text=[text], return_tensors="pt"
    )
    with torch.inference_mode():
        tokens = backend.decoder.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer: str = backend.decoder.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return answer.strip()


@pytest.mark.parametrize("kind", [*FAMILIES, "qwen3_5"])
def test_llava_gets_the_crop_of_a_small_face_for_the_face_caption(
    kind: Any, tmp_path: Path
) -> None:
    records = small_and_large()
    folder = make_checkpoint(tmp_path, kind, seed=3)
    plain, backend = llava(folder), llava(folder, face_view_below=0.25)
    prompts = (backend.config.prompt, backend.config.face_prompt)
    expected = [
        tuple(expected_answer(backend, record, k, prompts) for k in KINDS) for record in records
    ]
    for size in (1, 3):
        assert texts_of(backend.caption(records, size)) == expected
    without = texts_of(plain.caption(records, 3))
    assert [pair[0] for pair in without] == [pair[0] for pair in expected]
    assert without[1] == expected[1] and without != expected
    retry_prompts = (backend.config.retry_prompt, backend.config.face_retry_prompt)
    kinds: list[Kind] = [1, 1, 0]
    asked = zip(records, kinds, strict=True)
    again = [expected_answer(backend, record, k, retry_prompts) for record, k in asked]
    for size in (1, 3):
        assert [answer.text for answer in backend.retry(records, kinds, size)] == again


def test_a_prompt_without_chat_template_has_an_image_token_for_each_image(tmp_path: Path) -> None:
    backend = llava(make_checkpoint(tmp_path, chat_template=False))
    assert backend.decoder.templated("Who?", 2) == "USER: <image>\n<image>\nWho? ASSISTANT:"


def test_a_server_gets_the_crop_in_the_same_message_and_the_sample_states_it() -> None:
    def decide(request: Request) -> Reply:
        useless = request.prompt == config.face_prompt
        return completion(request, text="..." if useless else "The face has a closed mouth.")

    large = drawn_record("large")
    box = face_of(200, 100, 50, 60)
    small = replace(drawn_record("small"), faces=(replace(box, landmarks=((1, 1),) * 5),))
    with ChatServer(decide) as server:
        config = OpenAIConfig(
            base_url=server.base_url, model="m", tries=1, face_view_below=0.25, concurrency=1
        )
        stage = CaptionStage(CaptionConfig(backend="openai", openai=config), Weights())
        results = run_stage(stage, [small, large])
    sent = [(request.prompt, len(request.jpegs)) for request in server.requests]
    assert sorted(sent) == sorted(
        [
            *[(config.prompt, 1)] * 2,
            *[(config.face_prompt, count) for count in (1, 2)],
            *[(config.face_retry_prompt, count) for count in (1, 2)],
        ]
    )
    pairs = [request.jpegs for request in server.requests if len(request.jpegs) == 2]
    assert all(picture == small.image for picture, _ in pairs)
    crop = decode_jpeg(pairs[0][1])
    assert crop.shape == (views.CROP_SIDE, views.CROP_SIDE, 3)
    assert abs(crop.astype(int) - views.face_crop(small)).mean() < 2
    recorded = [result.annotation(Answers) for result in results]
    assert [(each.face_height, each.face_view) for each in recorded if each] == [
        (60 / 512, True),
        (290 / 512, False),
    ]


@pytest.mark.parametrize("section", [LlavaConfig, OpenAIConfig])
def test_a_share_outside_0_to_1_is_an_error(section: Any) -> None:
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"face_view_below=.*expected 0 "):
            section(face_view_below=value)

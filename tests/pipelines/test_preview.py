"""A dry run captions three pictures, and writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from configs.captions import FACE_PROMPT
from pipelines.cli import app
from stages.storage import layout
from tests.pipelines.helpers import DEMO, count_model_calls, digests
from tests.stages.chat_server import ChatServer, Reply, Request, completion

CAPTION = "A person with curly hair looks at the camera."
FACE = "The face is oval, the eyes are open, the nose is small, and the lips are thin."


def answer(request: Request) -> Reply:
    return completion(request, text=FACE if request.prompt == FACE_PROMPT else f"Sure! {CAPTION}")


def openai(base_url: str) -> list[str]:
    return ["caption.backend=openai", f"caption.openai={{base_url: '{base_url}', model: m}}"]


def dry_run(source: Path, output: Path, *settings: str) -> Result:
    paths = (f"source.path={source}", f"output={output}")
    arguments = ("run", "-c", DEMO, *paths, "executor=inline", "threads=1", *settings)
    return CliRunner().invoke(app, [*map(str, arguments), "--dry-run"])


def test_a_dry_run_prints_captions_of_three_pictures(portraits: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "0.jpg").write_bytes(b"no image")
    first, second, third, fourth = sorted(portraits.glob("*.jpg"))[:4]
    for number, path in enumerate((first, second, third, fourth), start=1):
        shutil.copy(path, photos / f"{number}.jpg")
    with ChatServer(answer) as server:
        result = dry_run(photos, tmp_path / "out", *openai(server.base_url))
    assert result.exit_code == 0, result.output
    printed = result.stdout.partition("captions of the first pictures")[2]
    names = [line.strip() for line in printed.splitlines() if line.endswith(".jpg")]
    assert names == ["1.jpg", "2.jpg", "3.jpg"]
    assert printed.count(f"    caption: {CAPTION}\n      removed from the answer: preamble") == 3
    assert printed.count(f"    face caption: {FACE}") == 3
    assert "s a picture, after the model was loaded" in printed
    assert not (tmp_path / "out").exists()


def test_inputs_that_do_not_reach_the_captioner_are_shown_with_the_reason(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.jpg").write_bytes(b"no image" * (1 + number))
    result = dry_run(photos, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("    failed: not_an_image") == 3


def test_what_needs_no_caption_is_not_captioned(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(data, tmp_path / "out"))
    networks, before = count_model_calls(monkeypatch), digests(output)
    command = ["run", "-c", str(output / layout.CONFIG), f"output={output}", "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert "no shard" in result.stdout and "captions of" not in result.stdout
    result = CliRunner().invoke(app, [*command, "claims.min_agreement=0.5"])
    assert "through claims" in result.stdout and "captions of" not in result.stdout
    with ChatServer(answer) as server:
        result = CliRunner().invoke(app, [*command, *openai(server.base_url)])
    assert result.stdout.count(f"caption: {FACE}") == 3, result.output
    assert networks == [], "pictures, faces and label maps come from the shards"
    assert digests(output) == before


def test_a_server_that_is_away_is_the_error_of_the_run(portraits: Path, tmp_path: Path) -> None:
    with ChatServer(answer) as server:
        url = server.base_url
    result = dry_run(portraits, tmp_path / "out", *openai(url))
    assert result.exit_code == 2 and url in result.stderr

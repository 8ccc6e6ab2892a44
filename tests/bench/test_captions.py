"""bench.captions: the table, on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from bench.captions import main, pictures
from tests.stages.tiny_llava import make_checkpoint


def run(model: Path, least: float) -> int:
    with pytest.raises(typer.Exit) as ended:
        main(
            model=str(model),
            device="cpu",
            dtype="float32",
            tiles="all",
            tokens=4,
            face_tokens=6,
            batch_size=2,
            batches=2,
            rounds=2,
            threads=1,
            least=least,
        )
    return int(ended.value.exit_code)


def test_all_ways_write_the_same_texts_and_a_slow_captioner_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint(tmp_path)
    assert run(folder, least=0.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 pictures, 10 tokens each"
    ways = ["captions", "without a thread", "generate", "two calls"]
    assert [line[:17].strip() for line in lines[2:6]] == ways
    assert all(line.endswith("100%") for line in lines[2:6])
    assert "1.00 (1.00, 1.00)" in lines[4] and lines[6].startswith("captions ÷ generate: ")
    assert run(folder, least=100.0) == 1


def test_pictures_differ() -> None:
    assert len({record.image for record in pictures(20)}) == 20

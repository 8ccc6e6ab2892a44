"""The benchmark of named colours in other light, on two portraits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bench.attributes import COLORS, LIGHTS, main, relit, table
from stages.backends.appearance import Appearance

APP = typer.Typer()
APP.command()(main)


def test_relit_images_are_multiplied_in_linear_light() -> None:
    greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    assert (relit(greys, (1, 1, 1)) == greys).all()
    halved = relit(greys, (0.5, 0.5, 0.25))[0]
    assert halved[188].tolist() == [137, 137, 99]  # 188 is half of the light of 255
    assert relit(greys, (4, 4, 4))[0, 200].tolist() == [255, 255, 255]


def test_changes_are_counted_by_kind() -> None:
    def person(hair: str) -> Appearance:
        return Appearance(regions=frozenset(), hair_color=hair)

    names = [("black", "black"), ("brown", "black"), ("dark", ""), ("", "blond"), ("", "")]
    pairs = [
        (person(before), {light: person(after) for light in LIGHTS}) for before, after in names
    ]
    pairs.append((person("grey"), dict.fromkeys(LIGHTS)))  # no face after
    lines = list(table(pairs))
    assert len(lines) == 1 + len(LIGHTS) * len(COLORS)
    assert lines[1].split() == ["1", "stop", "darker", "hair", "4", "1", "2", "1", "75.0%"]
    assert lines[2].split()[3:] == ["clothes", "0", "0", "0", "0", "-"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--parse-again"]])
def test_portraits_are_relit_and_compared(
    portraits: Path, tmp_path: Path, options: list[str]
) -> None:
    for path in sorted(portraits.iterdir())[:2]:
        shutil.copy(path, tmp_path)
    (tmp_path / "damaged.jpg").write_bytes(b"not an image")
    result = CliRunner().invoke(APP, [str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert "2 of 3 photographs have a usable face" in result.output
    for light in LIGHTS:
        assert light in result.output


def test_a_folder_without_faces_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, [str(tmp_path)])
    assert result.exit_code == 2 and "none of the 0 images" in result.output

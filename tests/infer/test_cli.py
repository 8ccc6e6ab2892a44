"""The command: its output, its errors, and that --help loads no large library."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from configs.load import load, to_yaml
from configs.portraits import InferConfig
from infer.cli import app
from infer.generate import generate
from infer.identity import Identity
from infer.pipelines import ConsistentIDPipeline
from infer.portrait import portrait_seed
from infer.schedulers import known_schedulers
from infer.sheet import contact_sheet
from tests.infer.helpers import small

PRESETS = sorted(Path("configs/infer").glob("*.yaml"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def preset(adapter: Path, tmp_path: Path) -> Path:
    path = tmp_path / "preset.yaml"
    path.write_text(to_yaml(small(adapter, output=str(tmp_path / "out"))))
    return path


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_writes_everything_and_its_own_configuration_repeats_it(
    preset: Path, photo: Path, tmp_path: Path
) -> None:
    prompts = ("a man in a suit", "eine Frau im Café – 漢字")
    arguments = [item for prompt in prompts for item in ("--prompt", prompt)]
    result = run("--config", preset, "--photo", photo, *arguments, "num_images_per_prompt=2")
    assert result.exit_code == 0, result.output
    first = read(tmp_path / "out")
    names = [f"portrait-{j:02d}-{i:02d}.png" for j in (0, 1) for i in (0, 1)]
    assert set(first) == {*names, "contact_sheet.png", "identity.safetensors", "infer.yaml"}
    assert all(str(tmp_path / "out" / name) in result.stdout.replace("\n", "") for name in names)

    for index, name in enumerate(names):
        with Image.open(tmp_path / "out" / name) as image:
            metadata = image.text  # type: ignore[attr-defined]
            assert image.size == (32, 32)
        expected = {
            "prompt": prompts[index // 2],
            "prompt_index": str(index // 2),
            "image_index": str(index % 2),
            "negative_prompt": "blurry",
            "seed": "5",
            "steps": "4",
            "start_merge_step": "2",
            "guidance_scale": "2.0",
            "scheduler": "EulerDiscreteScheduler",
            "mode": "corrected",
            "spec": "tiny",
            "photo": photo.name,
        }
        assert expected.items() <= metadata.items()
        assert len(metadata["adapter_sha256"]) == len(metadata["photo_sha256"]) == 64

    again = run("--config", tmp_path / "out" / "infer.yaml")
    assert again.exit_code == 0, again.output
    assert read(tmp_path / "out") == first

    other = run("--config", tmp_path / "out" / "infer.yaml", "seed=6")
    assert other.exit_code == 2
    assert "holds portraits of another configuration" in other.stderr
    assert read(tmp_path / "out") == first, "a refused run must change nothing"

    fewer = run(
        "--config", tmp_path / "out" / "infer.yaml", "num_images_per_prompt=1", "overwrite=true"
    )
    assert fewer.exit_code == 0, fewer.output
    files = read(tmp_path / "out")
    assert {name for name in files if name.startswith("portrait")} == {names[0], names[2]}
    assert files[names[0]] == first[names[0]]

    identity = tmp_path / "out" / "identity.safetensors"
    reused = run(
        "--config",
        preset,
        "--identity",
        identity,
        "--prompt",
        prompts[0],
        f"output={tmp_path / 'reused'}",
    )
    assert reused.exit_code == 0, reused.output
    assert (tmp_path / "reused" / names[0]).read_bytes() == first[names[0]]


def test_errors_name_the_fault_and_nothing_is_written(
    preset: Path, photo: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (200, 200), "teal").save(tmp_path / "wall.png")
    (tmp_path / "note.txt").write_text("hello")
    common = ["--config", preset, "--prompt", "a"]
    cases: list[tuple[list[object], str]] = [
        ([*common, "--photo", tmp_path / "wall.png"], "no face found in"),
        ([*common, "--photo", tmp_path / "none.jpg"], "no photograph at"),
        ([*common, "--photo", tmp_path], "is a folder"),
        ([*common, "--photo", tmp_path / "note.txt"], "is not an image"),
        (common, "no person given"),
        (["--config", preset, "--photo", photo], "no prompt given"),
        ([*common, "--photo", photo, "--prompt", " "], "no prompt given, or an empty one"),
        ([*common, "--photo", photo, "--identity", "x"], "give one of them"),
        ([*common, "--photo", photo, "adapter="], "no adapter given"),
        ([*common, "--photo", photo, "sede=3"], "Did you mean seed?"),
        ([*common, "--photo", photo, "scheduler=Euler"], "EulerDiscreteScheduler"),
        (["--config", tmp_path / "none.yaml"], "no configuration at"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr, (arguments, result.stderr)
        assert not result.stdout, "error messages belong on stderr"
        assert not (tmp_path / "out").exists(), arguments


def test_help_shows_examples_and_loads_no_model_library() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "--photo" in result.output and "num_images_per_prompt=4" in result.output
    code = (
        "import sys, infer.cli; print({'torch', 'diffusers', 'transformers', 'cv2'} & "
        "set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "set()"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_open_with_their_command(path: Path) -> None:
    settings = load(InferConfig, path)
    assert settings.scheduler in known_schedulers()
    assert (settings.scheduler == "LCMScheduler") == bool(settings.lora)  # of few steps
    assert f"--config {path}" in path.read_text().split("\n\n")[0]


def test_presets_are_there() -> None:
    assert {path.stem for path in PRESETS} >= {"demo", "fast", "sd15"}


def test_the_sheet_shows_photograph_and_portraits(
    pipe: ConsistentIDPipeline, adapter: Path, person: Identity
) -> None:
    settings = small(adapter, prompts=("a", "a much longer prompt " * 12))
    portraits = list(generate(pipe, person, settings))
    sheet = np.asarray(contact_sheet(person, portraits))
    with Image.open(io.BytesIO(person.record.image)) as file:
        photograph = np.asarray(file.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS))
    tile = np.asarray(portraits[0].image.resize((256, 256), Image.Resampling.BICUBIC))
    assert _contains(sheet, photograph)
    assert _contains(sheet, tile)
    assert not _contains(sheet, tile[::-1])
    with pytest.raises(ValueError, match="at least one portrait"):
        contact_sheet(person, [])


def _contains(sheet: np.ndarray, tile: np.ndarray) -> bool:
    height, width = tile.shape[:2]
    corners = np.argwhere((sheet == tile[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], tile) for y, x in corners)


def test_portraits_equal_those_of_the_pipeline(
    preset: Path, pipe: ConsistentIDPipeline, photo: Path, tmp_path: Path
) -> None:
    result = run("--config", preset, "--photo", photo, "--prompt", "a", "--prompt", "b")
    assert result.exit_code == 0, result.output
    for number, prompt in enumerate("ab"):
        seed = portrait_seed(5, number, 0)
        [expected] = pipe(
            prompt,
            negative_prompt="blurry",
            input_id_images=photo,
            num_inference_steps=4,
            start_merge_step=2,
            guidance_scale=2.0,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(seed),
        ).images
        with Image.open(tmp_path / f"out/portrait-{number:02d}-00.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected)), prompt

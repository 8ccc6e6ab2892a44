"""`make doctor`: what runs where, with and without packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from configs.errors import ConfigError
from pipelines import doctor
from stages.backends import runtime

ROOT = Path(__file__).parents[2]
ON_TORCH = {"parse", "caption (llava)", "training", "portraits"}


def run(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the doctor in another process; the arguments are Python's."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=env, timeout=100
    )


def environment(folder: Path, nvidia_smi: str) -> dict[str, str]:
    """This environment, with a program `nvidia-smi` in `folder`."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    tool.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


def by_name(sections: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What → row."""
    return {row["what"]: row for rows in sections.values() for row in rows}


def package(folder: Path, name: str, text: str) -> None:
    """Writes a package that consists of `text`."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


def test_every_section_is_printed_and_an_unused_gpu_is_named(tmp_path: Path) -> None:
    """nvidia-smi lists a GPU, and CUDA_VISIBLE_DEVICES hides all GPUs from torch."""
    env = environment(tmp_path, "echo 'NVIDIA Test, 1024 MiB, 1.0'")
    done = run("-m", "pipelines.doctor", "--json", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(done.stdout)
    assert [*sections] == [title for title, _ in doctor.SECTIONS]
    steps = {row["what"] for row in sections["where models run, with device: auto"]}
    assert steps == {"detect, embed", *ON_TORCH}
    rows = by_name(sections)
    assert rows["NVIDIA GPUs"]["state"] == "NVIDIA Test, 1024 MiB, 1.0"
    for step in steps:
        assert rows[step]["state"].startswith("cpu: ")
        assert rows[step]["advice"]


def test_without_packages_it_says_what_to_type(tmp_path: Path) -> None:
    """-S: without site-packages. One package has no metadata, as after an interrupted removal."""
    package(tmp_path, "ray", "")
    done = run("-S", "-m", "pipelines.doctor", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert "torch                  missing (models)  → make install" in done.stdout
    assert "ray                    fails: PackageNotFoundError: No package metadata" in done.stdout
    assert done.stdout.endswith("Type: make install\n")


def test_errors_of_torch_and_the_driver_are_shown_in_their_rows(tmp_path: Path) -> None:
    package(tmp_path, "torch", "print('a line')\nraise OSError('libc10.so: cannot open')\n")
    env = environment(tmp_path, "echo 'no driver is running'; exit 9")
    done = run("-m", "pipelines.doctor", "--json", env={**env, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    rows = by_name(json.loads(done.stdout))
    for step in ON_TORCH:
        assert rows[step]["state"] == "fails: OSError: libc10.so: cannot open"
        assert rows[step]["advice"].endswith("make install")
    assert rows["NVIDIA GPUs"]["state"] == "nvidia-smi fails with 9: no driver is running"
    assert "driver" in rows["NVIDIA GPUs"]["advice"]
    assert not rows["weights of demo"]["required"], "it needs no torch"


def test_cuda_is_used_or_refused() -> None:
    if runtime.CUDA in onnxruntime.get_available_providers():
        assert runtime.onnx_device("cuda") == "cuda"
        return
    with pytest.raises(ConfigError, match=r"built without CUDA\. `make install GPU=1` installs"):
        runtime.onnx_device("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device gpu: expected auto, cpu or cuda"):
        runtime.onnx_device("gpu")

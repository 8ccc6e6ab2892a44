"""`make doctor`: what runs where, with and without packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from configs.errors import ConfigError
from pipelines import doctor
from stages.backends import runtime


def test_it_prints_every_section_and_succeeds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.doctor", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    sections = json.loads(done.stdout)
    assert [*sections] == [title for title, _ in doctor.SECTIONS]
    steps = {row["what"]: row["state"] for row in sections["where models run, with device: auto"]}
    assert {*steps} == {"detect, embed", "parse", "caption (llava)", "training", "portraits"}


def test_without_packages_it_says_what_to_type(tmp_path: Path) -> None:
    """-S: without site-packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-m", "pipelines.doctor"],
        capture_output=True,
        text=True,
        check=False,
        env={},
    )
    assert done.returncode == 1, done.stderr
    assert "torch                  missing (models)  → make install" in done.stdout
    assert done.stdout.endswith("Type: make install\n")


def test_an_unused_gpu_is_named(tmp_path: Path) -> None:
    """The driver lists a GPU, and torch is told to use none."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Test, 1024 MiB, 1.0'\n")
    tool.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.doctor", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""},
    )
    rows = {row["what"]: row for section in json.loads(done.stdout).values() for row in section}
    assert rows["NVIDIA GPUs"]["state"] == "NVIDIA Test, 1024 MiB, 1.0"
    for step in ("detect, embed", "training"):
        assert rows[step]["state"].startswith("cpu: ")
        assert rows[step]["advice"]


def test_cuda_is_used_or_refused() -> None:
    if runtime.CUDA in onnxruntime.get_available_providers():
        assert runtime.onnx_device("cuda") == "cuda"
        return
    with pytest.raises(ConfigError, match=r"built without CUDA\. `make install GPU=1` installs"):
        runtime.onnx_device("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device gpu: expected auto, cpu or cuda"):
        runtime.onnx_device("gpu")

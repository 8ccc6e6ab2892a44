"""The Python code in the README and in docs/portraits.md runs as printed, on the tiny base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BASE = "SG161222/Realistic_Vision_V6.0_B1_noVAE"


@pytest.mark.parametrize("page", ["README.md", "docs/portraits.md"])
def test_the_code_runs(
    page: str, adapter: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = adapter.parent
    code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(trained)
    (tmp_path / "JackAILab").mkdir()
    (tmp_path / "JackAILab/ConsistentID").symlink_to(trained)
    (tmp_path / "ada.jpg").symlink_to(photo)
    monkeypatch.chdir(tmp_path)
    assert BASE in code
    code = code.replace(BASE, str(trained / "base")).replace("ConsistentID-v1.bin", "final")
    if "num_inference_steps" in code:
        code = code.replace("num_inference_steps=50, start_merge_step=30", "num_inference_steps=4")
    variables: dict[str, Any] = {}
    exec(compile(code, page, "exec"), variables)
    assert [image.size for image in variables["images"]] == [(64, 64)] * 2
    for saved in re.findall(r'save\("(.*)"\)', code):
        with Image.open(tmp_path / saved) as image:
            assert image.size == (64, 64)

"""The check passes on the reference's answers, and fails on changed ones."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden.check import main

HERE = Path(__file__).parent


def copy_golden(folder: Path) -> Path:
    for name in ("fill.py", "golden.json", "golden.safetensors", "texts.json"):
        shutil.copy(HERE / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_model_gives_every_answer_of_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(HERE)]) == 0
    assert "e2e.final_latents" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kind_of_answer_can_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_golden(tmp_path)
    answers = load_file(folder / "golden.safetensors")
    changed = (
        "image_proj.out",
        "facial.out",
        "unet.out",
        "loss.two_layers",
        "e2e.id_uncond",
        "e2e.final_latents",
    )
    for name in changed:
        answers[name] = answers[name] * 1.01 + 1e-3
    answers["mask.0.Nose"][0, 0] = 255
    answers["e2e.token_mask"][0, 3] = True
    save_file(answers, folder / "golden.safetensors")
    config = json.loads((folder / "golden.json").read_text())
    config["regions"][1]["regions_in_order"].reverse()
    config["adapter_keys"]["0.to_q_lora.down.weight"] = [1, 1]
    config["e2e"].update(steps=3, start_merge_step=1)
    (folder / "golden.json").write_text(json.dumps(config))
    texts = json.loads((folder / "texts.json").read_text())
    texts[0]["marked"] += " "
    (folder / "texts.json").write_text(json.dumps(texts))
    assert main([str(folder)]) == 1
    failed = {
        line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")
    }
    assert failed == {
        *changed,
        "mask.0.Nose",
        "e2e.token_mask",
        "regions.1",
        "keys.adapter_modules",
        "texts.0.marked",
    }

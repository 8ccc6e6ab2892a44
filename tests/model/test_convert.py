"""Forms of an adapter: round trips, training states, diffusers' own IP-Adapter loader, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import save
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from configs.base_model import DenoiserConfig
from configs.errors import ConfigError
from model.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_adapter,
    read_adapter,
    save_adapter,
)
from model.consistentid import BaseModels, ConsistentID, predict_noise
from model.convert import Form, Precision, app, convert
from model.forms import expected_state, read_any, write_published
from model.spec import PUBLISHED_EMBEDDER, SPECS, ModelSpec
from train.base_model.denoiser import make_denoiser

TINY = SPECS["tiny"]
# the sizes that diffusers' class for the projector fixes
FACEID = replace(TINY, projector_depth=4, identity_hidden=1024, dim_head=64)
GOLDEN = Path(__file__).parents[1] / "golden"


def new_adapter(unet: Any, folder: Path, spec: ModelSpec, config: dict[str, Any]) -> ConsistentID:
    """Writes an adapter in which nothing is zero."""
    torch.manual_seed(5)
    model = ConsistentID(spec, unet, "legacy")
    for name, value in model.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(value, std=0.05)
    save_adapter(model, folder, config)
    return model


@pytest.fixture(scope="module")
def adapter(loaded_base: BaseModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "adapter"
    config = {"step": 7, "embedder": asdict(PUBLISHED_EMBEDDER)}
    new_adapter(deepcopy(loaded_base.unet), folder, TINY, config)
    return folder


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "small", "tiny"])
def test_the_expected_keys_are_those_of_an_adapter_on_the_models_unet(
    name: str, loaded_base: BaseModels
) -> None:
    spec = SPECS[name]
    with torch.device("meta"):
        unet = (
            make_denoiser(DenoiserConfig(), spec, 16)
            if name == "small"
            else UNet2DConditionModel(**UNETS.get(name, loaded_base.unet.config))
        )
        model = ConsistentID(spec, unet, "legacy").state_dict()
    expected = expected_state(spec)
    assert [*expected] == [*model]
    assert all(expected[key].shape == model[key].shape for key in model)


UNETS = {
    "sd15": {"cross_attention_dim": 768},
    "sdxl": {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
    },
}


def test_the_keys_and_shapes_are_those_of_the_reference() -> None:
    recorded = json.loads((GOLDEN / "golden.json").read_text())
    shapes = {key: [*value.shape] for key, value in expected_state(SPECS["sd15"]).items()}
    for prefix, name in (("image_proj_model", "image_proj"), ("FacialEncoder", "facial_encoder")):
        own = {
            key.removeprefix(f"{prefix}."): shape
            for key, shape in shapes.items()
            if key.startswith(f"{prefix}.")
        }
        assert own == recorded[f"{name}_keys"]
    assert {key for key in recorded["adapter_keys"] if int(key.partition(".")[0]) < 2} == {
        key.partition(".")[2]
        for key in shapes
        if key.startswith(("adapter_modules.0.", "adapter_modules.1."))
    }


@pytest.mark.parametrize(("name", "key"), [("sd15", "image_proj"), ("sdxl", "image_proj_model")])
def test_a_published_file_has_the_references_names_and_plain_tensors(
    adapter: Path, tmp_path: Path, name: str, key: str
) -> None:
    target = tmp_path / "published.bin"
    write_published(replace(read_adapter(adapter), spec=SPECS[name]), target)
    content = torch.load(target, weights_only=True)
    assert [*content] == ["FacialEncoder", key, "adapter_modules"]
    for part in content.values():
        assert type(part) is dict and {type(value) for value in part.values()} == {Tensor}
    assert read_adapter(target).state.keys() == read_adapter(adapter).state.keys()


def test_round_trips_keep_every_bit_and_equal_input_gives_equal_bytes(
    adapter: Path, tmp_path: Path
) -> None:
    weights = load_file(adapter / WEIGHTS_FILE)
    for turn in ("one", "two"):
        assert invoke(adapter, tmp_path / f"{turn}.bin")[0] == 0
        assert invoke(tmp_path / f"{turn}.bin", tmp_path / turn)[0] == 0
        assert same(load_file(tmp_path / turn / WEIGHTS_FILE), weights)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    assert (tmp_path / "one" / WEIGHTS_FILE).read_bytes() == (adapter / WEIGHTS_FILE).read_bytes()
    read = read_adapter(tmp_path / "one")
    assert (read.mode, read.spec, read.embedder) == ("legacy", TINY, PUBLISHED_EMBEDDER)
    assert read.config["published"] == "one.bin"
    # an adapter keeps what is beside it, and its metadata
    trained = shutil.copytree(adapter, tmp_path / "trained")
    (trained / "dataset.yaml").write_text("threads: 1\n")
    (trained / "state.pt").write_text("")
    code, output = invoke(trained, tmp_path / "one", "--overwrite", "--dtype", "bfloat16")
    assert code == 0 and "model tiny, mode legacy, 181 tensors" in output
    assert (tmp_path / "one/dataset.yaml").read_text() == "threads: 1\n"
    assert read_adapter(tmp_path / "one").config["step"] == 7
    halved = {key: value.bfloat16() for key, value in weights.items()}
    assert same(load_file(tmp_path / "one" / WEIGHTS_FILE), halved)
    written = ["adapter.json", "adapter.safetensors", "dataset.yaml"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == written
    written = ["one", "one.bin", "trained", "two", "two.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_tensors_that_share_memory_are_written_apart(adapter: Path, tmp_path: Path) -> None:
    state = load_file(adapter / WEIGHTS_FILE)
    norm = torch.arange(1_000.0)
    state["image_proj_model.norm.weight"], state["image_proj_model.norm.bias"] = (
        norm[:128],
        norm[64:192],
    )
    torch.save(state, tmp_path / "shared.bin")
    assert invoke(tmp_path / "shared.bin", tmp_path / "mine")[0] == 0
    assert same(read_adapter(tmp_path / "mine").state, state)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_training_state_becomes_its_adapter(
    base: BaseModels, adapter: Path, tmp_path: Path, name: str
) -> None:
    built = build_adapter(read_adapter(adapter), base.unet, torch.float32, "cpu")
    whole = torch.nn.Module()
    whole.unet = base.unet  # first, as in the trainer whose states these are
    whole.image_proj_model, whole.FacialEncoder = built.image_proj_model, built.FacialEncoder
    whole.adapter_modules = built.adapter_modules
    (tmp_path / "state").mkdir()
    # accelerate removes the second name of tensors that have two
    save(whole.state_dict(), tmp_path / "state" / name, safe_serialization="safe" in name)
    for source in (tmp_path / "state", tmp_path / "state" / name):
        code, output = invoke(source, tmp_path / "mine", "--overwrite")
        assert code == 0, output
        assert same(load_file(tmp_path / "mine" / WEIGHTS_FILE), built.state_dict())
    assert read_adapter(tmp_path / "mine").config["training_state"] == name


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_diffusers_loads_the_ip_adapter_form_and_predicts_the_same(
    base: BaseModels, tmp_path: Path, suffix: str
) -> None:
    new_adapter(deepcopy(base.unet), tmp_path / "mine", FACEID, {})
    target, plain = tmp_path / f"faceid{suffix}", deepcopy(base.unet)
    written = convert(tmp_path / "mine", target, Form.IP_ADAPTER).state
    assert not any(key.startswith("FacialEncoder") for key in written)
    state = load_file(target) if "safe" in suffix else torch.load(target, weights_only=True)
    if "safe" in suffix:  # as diffusers' load_ip_adapter reads it
        heads = ("image_proj", "ip_adapter")
        state = {
            head: {k.removeprefix(f"{head}."): v for k, v in state.items() if k.startswith(head)}
            for head in heads
        }
    plain._load_ip_adapter_weights([state])
    lora = plain._load_ip_adapter_loras([state])[0]
    for key in lora:  # diffusers leaves this to peft
        path, _, rest = key.removeprefix("unet.").partition(".processor.")
        if rest.endswith("down.weight"):
            linear = plain.get_submodule(path).get_submodule(
                rest.removesuffix("_lora.down.weight").replace("to_out", "to_out.0")
            )
            with torch.no_grad():
                linear.weight += lora[key.replace("down.weight", "up.weight")] @ lora[key]
    model = build_adapter(read_adapter(tmp_path / "mine"), base.unet, torch.float32, "cpu")
    identity, hidden = torch.randn(2, 512), torch.randn(2, 50, 96)
    latents, times = torch.randn(2, 4, 16, 16), torch.tensor([7, 501])
    text = torch.randn(2, 77, 128)
    projection = plain.encoder_hid_proj.image_projection_layers[0]
    projection.clip_embeds, projection.shortcut = hidden[:, None], TINY.shortcut
    with torch.no_grad():
        tokens = model.encode_identity(identity, hidden)
        assert torch.allclose(projection(identity[:, None]), tokens, atol=1e-5)
        own, _ = predict_noise(base.unet, latents, times, torch.cat((text, tokens), dim=1))
        theirs = plain(
            latents,
            times,
            encoder_hidden_states=text,
            added_cond_kwargs={"image_embeds": [identity[:, None, None]]},
        ).sample
    assert torch.allclose(theirs, own, atol=1e-4) and own.std() > 0.1


def mixed_ranks(state: dict[str, Tensor]) -> None:
    state["adapter_modules.10.to_q_lora.down.weight"] = torch.zeros(4, 96)
    state["adapter_modules.2.to_q_lora.down.weight"] = torch.zeros(8, 96)


def without_last_block(state: dict[str, Tensor]) -> None:
    for key in [key for key in state if key.startswith(("adapter_modules.13.", "unet."))]:
        del state[key]


def too_large(state: dict[str, Tensor]) -> None:
    state["FacialEncoder.fuse_module.mlp1.fc1.bias"][3] = 7e4


@pytest.mark.parametrize(
    ("change", "options", "fault"),
    [
        (
            mixed_ranks,
            (),
            "first wrong key is adapter_modules.2.to_q_lora.down.weight: given (8, 96), expected "
            "(16, 96) (of 181 keys, 2 mis-shaped)",
        ),
        (
            without_last_block,
            (),
            "adapter_modules.13.to_k_ip.weight: not given, expected (96, 128) (of 181 keys, 10 m",
        ),
        (
            lambda state: state.update({"FacialEncoder.pos_emb.weight": torch.zeros(257, 96)}),
            (),
            "FacialEncoder.pos_emb.weight: given (257, 96), expected no such key",
        ),
        (too_large, ("--dtype", "float16"), "not finite in torch.float16"),
        (
            lambda state: None,
            ("--to", "ip-adapter"),
            "given identity_hidden 256, expected 1024; projector_depth 1, expected 4;",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    adapter: Path, tmp_path: Path, change: Any, options: tuple[str, ...], fault: str
) -> None:
    state = load_file(adapter / WEIGHTS_FILE)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    code, output = invoke(tmp_path / "changed.safetensors", tmp_path / "out.bin", *options)
    assert code == 2 and fault in " ".join(output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["changed.safetensors"]
    assert "Traceback" not in output


def test_a_target_is_replaced_only_if_asked_and_only_by_its_kind(
    adapter: Path, tmp_path: Path
) -> None:
    file, folder, foreign = tmp_path / "a.bin", tmp_path / "out", tmp_path / "photos"
    file.write_text("mine")
    shutil.copytree(adapter, folder)
    foreign.mkdir()
    (foreign / "ada.jpg").write_text("mine")
    for arguments, fault in (
        ((file,), "exists; name another TARGET, or pass --overwrite"),
        ((folder,), "exists; name another TARGET, or pass --overwrite"),
        ((foreign, "--overwrite"), "holds ada.jpg, which are no part of an adapter"),
        ((foreign, "--to", "published"), "a file in .bin; name such a file"),
        ((tmp_path / "x.safetensors",), "looks like a file, but form adapter is a folder"),
        ((tmp_path / "x.pt", "--to", "ip-adapter"), "a file in .bin or .safetensors"),
    ):
        code, output = invoke(adapter, *arguments)
        assert code == 2 and fault in " ".join(output.split()), output
    code, output = invoke(tmp_path / "nothing", file, "--overwrite")
    assert code == 2 and "no adapter there" in output and file.read_text() == "mine"
    assert [path.name for path in foreign.iterdir()] == ["ada.jpg"]
    assert invoke(adapter, file, "--overwrite")[0] == 0
    assert same(read_any(file).state, read_any(adapter).state)
    with pytest.raises(ConfigError, match="is a folder, expected a file"):
        convert(adapter, folder, Form.PUBLISHED, Precision.SAME, overwrite=True)


def test_help_shows_examples_and_loads_no_model_library() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "model.convert", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "mine.bin --dtype float16" in process.stdout
    assert "typer" in process.stderr and "torch" not in process.stderr


def test_what_a_form_leaves_out_is_said(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "mine")
    path = tmp_path / "mine" / CONFIG_FILE
    config = json.loads(path.read_text())
    config |= {"mode": "corrected", "embedder": {"name": "w600k_mbf", "sha256": "9c" * 32}}
    path.write_text(json.dumps(config))
    code, output = invoke(tmp_path / "mine", tmp_path / "mine.bin")
    assert code == 0
    for note in ("the mode, corrected;", "embedder, w600k_mbf;"):
        assert note in " ".join(output.split())

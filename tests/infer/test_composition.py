"""An adapter beside what diffusers does with a pipeline: offloading, compiling, other attention."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import ConfigError, PipelineError, WeightsError
from infer.identity import Identity
from infer.pipelines import (
    ConsistentIDControlNetPipeline,
    ConsistentIDImg2ImgPipeline,
    ConsistentIDPipeline,
)
from tests.infer import helpers
from tests.infer.helpers import close, seeded, write_lora

pytestmark = pytest.mark.thorough
CPU = torch.device("cpu")
CALL = helpers.CALL | {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def plain(loaded: ConsistentIDPipeline) -> Tensor:
    """What diffusers' own pipeline makes."""
    return without(loaded)


@pytest.fixture(scope="module")
def expected(pipe: ConsistentIDPipeline, person: Identity) -> Tensor:
    return run(pipe, person)


def run(pipe: Any, person: Identity, **changes: Any) -> Tensor:
    return helpers.run(pipe, person, **(CALL | changes))


def without(pipe: Any) -> Tensor:
    """Runs a pipeline without a person."""
    latents: Tensor = pipe("a man", generator=seeded(), **CALL).images
    return latents


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layers(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does; it refuses to run on a CPU."""
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            accelerate.cpu_offload(model, CPU, offload_buffers=bool(model._parameters))


def offload_groups(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [offload_models, offload_layers, offload_groups])
@pytest.mark.parametrize("first", [True, False])
def test_offloading_before_and_after_the_adapter_is_loaded(
    bare: ConsistentIDPipeline,
    adapter: Path,
    photo: Path,
    person: Identity,
    expected: Tensor,
    plain: Tensor,
    offload: Any,
    first: bool,
) -> None:
    if first:
        offload(bare)
    bare.load_consistentid_adapter(adapter)
    if not first:
        offload(bare)
    assert torch.equal(run(bare, person), expected)
    assert torch.equal(bare.encode_identity(photo).clip_hidden, person.clip_hidden)
    bare.fuse_consistentid()
    assert close(run(bare, person), expected)
    bare.unfuse_consistentid()
    assert torch.equal(run(bare, person), expected)
    bare.unload_consistentid_adapter()
    bare.remove_all_hooks()
    assert torch.equal(without(bare), plain)


def slice_attention(pipe: Any) -> None:
    pipe.enable_attention_slicing()


def replace_one(pipe: Any) -> None:
    processors = dict(pipe.unet.attn_processors)
    processors[list(processors)[3]] = AttnProcessor2_0()
    pipe.unet.set_attn_processor(processors)


@pytest.mark.parametrize("replace", [slice_attention, replace_one])
def test_replaced_attention_processors_are_an_error_and_not_a_wrong_picture(
    bare: ConsistentIDPipeline,
    adapter: Path,
    person: Identity,
    expected: Tensor,
    plain: Tensor,
    replace: Any,
) -> None:
    bare.load_consistentid_adapter(adapter)
    bare.fuse_consistentid()
    replace(bare)
    with pytest.raises(ConfigError, match="attention processors were replaced"):
        run(bare, person)
    bare.unload_consistentid_adapter()
    assert close(without(bare), plain), "the merged weights are restored too"
    bare.load_consistentid_adapter(adapter)
    assert torch.equal(run(bare, person), expected)


def test_an_ip_adapter_or_fused_projections_beside_the_adapter_are_an_error(
    bare: ConsistentIDPipeline, adapter: Path
) -> None:
    bare.load_consistentid_adapter(adapter)
    with pytest.raises(ConfigError, match="an IP-Adapter can't be used beside"):
        bare.load_ip_adapter("folder", subfolder="", weight_name="weights.bin")
    with pytest.raises(ConfigError, match="fuse_qkv_projections of the UNet can't be used beside"):
        bare.fuse_qkv_projections()
    bare.fuse_qkv_projections(unet=False)
    bare.unload_consistentid_adapter()
    bare.unet.encoder_hid_proj = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="call unload_ip_adapter first"):
        bare.load_consistentid_adapter(adapter)


def test_a_compiled_unet_takes_the_adapter(
    bare: ConsistentIDPipeline,
    adapter: Path,
    person: Identity,
    expected: Tensor,
    plain: Tensor,
) -> None:
    bare.unet = torch.compile(bare.unet)
    # the wrapper without its compiler, which takes a minute
    with torch.compiler.set_stance("force_eager"):
        bare.load_consistentid_adapter(adapter)
        assert torch.equal(run(bare, person), expected)
        bare.fuse_consistentid()
        assert close(run(bare, person), expected)
        bare.unload_consistentid_adapter()
        assert torch.equal(without(bare), plain)


def test_pipelines_that_share_a_unet_share_the_adapter(
    bare: ConsistentIDPipeline,
    adapter: Path,
    legacy_adapter: Path,
    person: Identity,
    expected: Tensor,
    plain: Tensor,
) -> None:
    other = ConsistentIDImg2ImgPipeline.from_pipe(bare)
    again = ConsistentIDPipeline.from_pipe(diffusers.StableDiffusionPipeline.from_pipe(other))
    again.set_progress_bar_config(disable=True)
    bare.load_consistentid_adapter(legacy_adapter)
    other.load_consistentid_adapter(adapter)
    assert torch.equal(run(bare, person), expected) and torch.equal(run(again, person), expected)
    with pytest.raises(PipelineError):
        bare.load_consistentid_adapter(adapter / "nothing")
    assert torch.equal(run(bare, person), expected), "the adapter that was there stays"
    other.unload_consistentid_adapter()
    assert bare.consistentid is None and torch.equal(without(bare), plain)


def test_a_pipeline_from_another_leaves_the_types_of_its_models(
    bare: ConsistentIDPipeline,
) -> None:
    bare.unet.to(torch.bfloat16)
    types = {name: bare.components[name].dtype for name in ("unet", "vae", "text_encoder")}
    other = ConsistentIDImg2ImgPipeline.from_pipe(bare)
    assert {name: other.components[name].dtype for name in types} == types
    assert len(set(types.values())) == 2
    ConsistentIDImg2ImgPipeline.from_pipe(bare, dtype="bfloat16")
    assert bare.vae.dtype == torch.bfloat16, "the weights are shared"


def test_tokens_of_textual_inversion_are_read_with_the_adapter(
    bare: ConsistentIDPipeline, adapter: Path, person: Identity
) -> None:
    """They come behind the vocabulary, where the adapter has its marks."""
    vectors = torch.randn(2, 128, generator=seeded())
    bare.load_consistentid_adapter(adapter)
    prompt = "a <ada> man"
    word = run(bare, person, prompt=prompt, negative_prompt="<ada>")
    bare.load_textual_inversion(vectors, token="<ada>")
    first = bare.tokenizer.convert_tokens_to_ids("<ada>")
    ids = bare.prompt_text(person, prompt)[0].input_ids.tolist()
    assert ids[2:4] == [first, first + 1]
    inverted = run(bare, person, prompt=prompt, negative_prompt="<ada>")
    assert not close(inverted, word)
    bare.unload_textual_inversion()
    assert torch.equal(run(bare, person, prompt=prompt, negative_prompt="<ada>"), word)


def test_a_single_file_is_loaded_and_an_incomplete_one_refused(
    trained: Path,
    bare: ConsistentIDPipeline,
    adapter: Path,
    expected: Tensor,
    person: Identity,
    tmp_path: Path,
) -> None:
    prefix = "cond_stage_model.transformer.text_model."
    weights = {
        f"{prefix}{name}": value.contiguous()
        for name, value in bare.text_encoder.state_dict().items()
    }
    rest = {name: bare.components[name] for name in ("unet", "vae", "image_encoder")}
    options = {"config": str(trained / "base"), "local_files_only": True, "dtype": "auto", **rest}
    save_file(weights, tmp_path / "base.safetensors")
    pipe = ConsistentIDPipeline.from_single_file(tmp_path / "base.safetensors", **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_consistentid_adapter(adapter)
    assert torch.equal(run(pipe, person), expected)
    del weights[f"{prefix}encoder.layers.0.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"lacks 1 weights of its text_encoder, .*q_proj"):
        ConsistentIDPipeline.from_single_file(tmp_path / "part.safetensors", **options)


def test_two_weighted_loras_and_their_fusion(
    bare: ConsistentIDPipeline, adapter: Path, person: Identity, expected: Tensor, tmp_path: Path
) -> None:
    """Fusing LoRA and adapter works in both nestings, and is an error if they cross."""
    write_lora(copy.deepcopy(bare), tmp_path)
    bare.load_consistentid_adapter(adapter)
    for name in ("one", "two"):
        bare.load_lora_weights(tmp_path, adapter_name=name)
    bare.set_adapters(["one", "two"], [0.7, 0.4])
    both = run(bare, person)
    assert not close(both, expected)
    pairs = [
        (bare.fuse_lora, bare.unfuse_lora),
        (bare.fuse_consistentid, bare.unfuse_consistentid),
    ]
    for (fuse_first, undo_last), (fuse_second, undo_first) in (pairs, pairs[::-1]):
        fuse_first()
        fuse_second()
        assert close(run(bare, person), both)
        undo_first()
        undo_last()
    assert close(run(bare, person), both)
    bare.fuse_consistentid()
    bare.fuse_lora()
    with pytest.raises(WeightsError, match="for example by fuse_lora; undo that first"):
        bare.unfuse_consistentid()


def test_a_saved_pipeline_with_two_controlnets_is_loaded(
    bare: ConsistentIDPipeline, tmp_path: Path
) -> None:
    net = diffusers.ControlNetModel.from_unet(
        bare.unet, conditioning_embedding_out_channels=(16, 32, 96)
    )
    pipe = ConsistentIDControlNetPipeline.from_pipe(bare, controlnet=[net, net])
    pipe.save_pretrained(tmp_path)
    again = ConsistentIDControlNetPipeline.from_pretrained(tmp_path)
    assert len(again.controlnet.nets) == 2


def test_clip_skip_leaves_out_the_last_layers(
    bare: ConsistentIDPipeline, adapter: Path, person: Identity
) -> None:
    """diffusers' own pipelines can't with transformers 5. They encode the negative prompt whole."""
    bare.load_consistentid_adapter(adapter)
    skipped = run(bare, person, clip_skip=1, guidance_scale=1.0)
    assert torch.equal(
        run(bare, person, guidance_scale=1.0), run(bare, person, clip_skip=0, guidance_scale=1.0)
    )
    del bare.text_encoder.encoder.layers[-1]
    assert torch.equal(run(bare, person, guidance_scale=1.0), skipped)


def test_copies_and_pickles(
    bare: ConsistentIDPipeline, adapter: Path, person: Identity, photo: Path, plain: Tensor
) -> None:
    bare.load_consistentid_adapter(adapter)
    unet = pickle.loads(pickle.dumps(bare.unet))
    first = run(bare, person)
    bare.encode_identity(photo)  # loads the stages that read photographs
    for other in (ConsistentIDPipeline.from_pipe(bare, unet=unet), copy.deepcopy(bare)):
        other.set_progress_bar_config(disable=True)
        assert torch.equal(run(other, person), first)
        other.unload_consistentid_adapter()
        assert torch.equal(without(other), plain)
    assert torch.equal(run(bare, person), first)


def test_an_error_in_the_middle_of_a_call_leaves_nothing_behind(
    bare: ConsistentIDPipeline, adapter: Path, person: Identity, expected: Tensor
) -> None:
    bare.load_consistentid_adapter(adapter)
    with bare.adapter.removed():
        net = diffusers.ControlNetModel.from_unet(
            bare.unet, conditioning_embedding_out_channels=(16, 32, 96)
        )
    pipe = ConsistentIDControlNetPipeline.from_pipe(bare, controlnet=net)
    pipe.set_progress_bar_config(disable=True)

    def stop(*_: Any) -> dict[str, Any]:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(pipe, person, image=Image.new("RGB", (32, 32)), callback_on_step_end=stop)
    assert not net._forward_pre_hooks
    assert torch.equal(run(bare, person), expected)

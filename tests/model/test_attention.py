from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from configs.errors import WeightsError
from model.attention import (
    IdentityCrossAttention,
    RegionScores,
    merge_lora,
    token_probabilities,
    unmerge_lora,
)
from model.consistentid import BaseModels, ConsistentID, predict_noise
from model.losses import localisation_loss
from model.spec import SPECS

TINY = SPECS["tiny"]


@pytest.fixture
def states() -> Tensor:
    return torch.randn(2, 81, TINY.cross_attention_dim, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))


TOKEN_IDX = torch.tensor([[3, 5, 9, 0, 0], [11, 12, 13, 14, 76]])
STEPS = torch.tensor([7, 501])


def trained(base: BaseModels, mode: Any = "corrected") -> ConsistentID:
    """Returns a model whose LoRA isn't zero."""
    torch.manual_seed(0)
    model = ConsistentID(TINY, base.unet, mode)
    for name, parameter in model.adapter_modules.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_new_adapter_without_id_attention_leaves_the_prediction_unchanged(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    before = base.unet(latents, STEPS, states[:, :77]).sample
    model = ConsistentID(TINY, base.unet, "corrected")
    model.set_scale(0.0)
    assert torch.allclose(predict_noise(base.unet, latents, STEPS, states)[0], before, atol=1e-5)
    model.set_scale(1.0)
    assert not torch.allclose(
        predict_noise(base.unet, latents, STEPS, states)[0], before, atol=1e-3
    )


def test_token_probabilities_are_columns_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 8, generator=generator) for n in (20, 77))
    softmax = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    probabilities = token_probabilities(query, key, TOKEN_IDX)
    for sample in range(2):
        expected = softmax[sample][:, :, TOKEN_IDX[sample]]
        assert torch.allclose(probabilities[sample], expected, atol=1e-6)


def test_index_beyond_the_keys_has_no_attention() -> None:
    query, key = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 64, 8)
    probabilities = token_probabilities(query, key, TOKEN_IDX)
    assert not probabilities[1, :, :, 4].any() and probabilities[1, :, :, :4].all()


def test_scores_come_from_hooked_layers_only_and_leave_the_prediction_unchanged(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    model = trained(base)
    without, no_scores = predict_noise(base.unet, latents, STEPS, states)
    prediction, scores = predict_noise(base.unet, latents, STEPS, states, token_idx=TOKEN_IDX)
    assert torch.equal(without, prediction) and no_scores == []
    hooked = [processor.hook for processor in model.adapter_modules if processor.hook]
    assert len(scores) == len(hooked) > 0
    assert all(name.startswith(TINY.hooked) and name.endswith("attn2") for name in hooked)
    assert all(layer.shape[0] == 2 and layer.shape[-1] == 5 for layer in scores)


def test_legacy_hooks_self_attention_as_the_reference_does(base: BaseModels) -> None:
    hooked = [
        processor.hook for processor in trained(base, "legacy").adapter_modules if processor.hook
    ]
    assert hooked and all(name.endswith("attn1") for name in hooked)


def test_localisation_gradients_reach_the_hooked_cross_attention(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    model = trained(base)
    _, scores = predict_noise(base.unet, latents, STEPS, states, token_idx=TOKEN_IDX)
    masks = torch.zeros(2, 5, 64, 64)
    masks[..., 16:48, 16:48] = 1
    localisation_loss(scores, masks, torch.ones(2, 5, dtype=torch.bool)).backward()
    for processor in model.adapter_modules:
        if processor.hook:
            for lora in (processor.to_q_lora, processor.to_k_lora):
                assert lora.up.weight.grad is not None and lora.up.weight.grad.abs().sum() > 0, (
                    processor.hook
                )


def test_scores_are_the_same_under_gradient_checkpointing(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    model = trained(base)
    masks = (torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    valid = torch.ones(2, 5, dtype=torch.bool)

    def gradients() -> tuple[float, list[Tensor]]:
        model.zero_grad()
        prediction, scores = predict_noise(
            base.unet.train(), latents, STEPS, states, token_idx=TOKEN_IDX
        )
        loss = prediction.square().mean() + localisation_loss(scores, masks, valid)
        loss.backward()
        return loss.item(), [
            p.grad.clone() for p in model.adapter_modules.parameters() if p.grad is not None
        ]

    plain_loss, plain = gradients()
    base.unet.enable_gradient_checkpointing()
    loss, checkpointed = gradients()
    assert loss == pytest.approx(plain_loss, abs=1e-5)
    assert len(plain) == len(checkpointed) > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, checkpointed, strict=True))


def test_merged_lora_gives_the_same_prediction(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    trained(base)
    before = predict_noise(base.unet, latents, STEPS, states)[0]
    merge_lora(base.unet)
    merge_lora(base.unet)  # a second time must not add it again
    assert torch.allclose(predict_noise(base.unet, latents, STEPS, states)[0], before, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_restores_every_bit(base: BaseModels, dtype: torch.dtype) -> None:
    trained(base)
    base.unet.to(dtype)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    merge_lora(base.unet)
    changed = [
        n for n, value in base.unet.state_dict().items() if not torch.equal(value, before[n])
    ]
    assert len(changed) == 4 * len(base.unet.attn_processors)
    unmerge_lora(base.unet)
    assert all(torch.equal(value, before[n]) for n, value in base.unet.state_dict().items())


def test_a_merge_in_half_precision_is_rounded_once(base: BaseModels) -> None:
    model = trained(base)
    base.unet.to(torch.bfloat16)
    attn = base.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    lora = attn.processor.to_q_lora
    exact = attn.to_q.weight.float() + lora.up.weight.float() @ lora.down.weight.float()
    merge_lora(base.unet)
    assert torch.equal(attn.to_q.weight, exact.to(torch.bfloat16)) and model.dtype == torch.float32


def test_an_adapter_on_weights_with_another_one_merged_is_refused(base: BaseModels) -> None:
    trained(base)
    merge_lora(base.unet)
    with pytest.raises(WeightsError, match="another adapter is merged"):
        ConsistentID(TINY, base.unet, "corrected")
    unmerge_lora(base.unet)
    ConsistentID(TINY, base.unet, "corrected")


def test_weights_that_changed_after_the_merge_are_not_overwritten(base: BaseModels) -> None:
    trained(base)
    merge_lora(base.unet)
    attn = base.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    with torch.no_grad():
        attn.to_k.weight.add_(0.01)  # as diffusers' fuse_lora does
    with pytest.raises(WeightsError, match="changed after the adapter was merged"):
        unmerge_lora(base.unet)


def test_a_lora_of_peft_beside_the_adapter_is_independent_of_merging(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    trained(base)
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    base.unet.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    before = predict_noise(base.unet, latents, STEPS, states)[0]
    merge_lora(base.unet)
    assert torch.allclose(predict_noise(base.unet, latents, STEPS, states)[0], before, atol=1e-4)
    base.unet.disable_adapters()
    assert not torch.allclose(
        predict_noise(base.unet, latents, STEPS, states)[0], before, atol=1e-3
    )


def test_id_attention_starts_with_the_weights_of_the_text_attention(base: BaseModels) -> None:
    keys = {
        name: attn.to_k.weight.clone()
        for name, attn in base.unet.named_modules()
        if name.endswith("attn2")
    }
    ConsistentID(TINY, base.unet, "corrected")
    for name, processor in base.unet.attn_processors.items():
        if isinstance(processor, IdentityCrossAttention):
            assert torch.equal(processor.to_k_ip.weight, keys[name.removesuffix(".processor")])


def test_an_attention_mask_is_refused(base: BaseModels, states: Tensor, latents: Tensor) -> None:
    trained(base)
    with pytest.raises(ValueError, match="pass none"):
        base.unet(latents, STEPS, states, encoder_attention_mask=torch.ones(2, 81))


def test_a_hook_that_names_no_block_is_an_error(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    ConsistentID(replace(TINY, hooked=("down_blocks.7",)), base.unet, "corrected")
    _, scores = predict_noise(base.unet, latents, STEPS, states, token_idx=TOKEN_IDX)
    with pytest.raises(ValueError, match=r"spec\.hooked"):
        localisation_loss(scores, torch.ones(2, 5, 8, 8), torch.ones(2, 5, dtype=torch.bool))


def test_the_scores_of_a_layers_first_run_are_stored() -> None:
    region_scores = RegionScores(TOKEN_IDX)
    queries, keys = torch.randn(2, 2, 1, 4, 8), torch.randn(2, 2, 1, 77, 8)
    region_scores.add("layer", queries[0], keys[0])
    first = region_scores.scores[0].clone()
    region_scores.add("layer", queries[1], keys[1])
    assert len(region_scores.scores) == 1 and torch.equal(region_scores.scores[0], first)


def test_a_full_precision_adapter_trains_in_a_half_precision_base(
    base: BaseModels, states: Tensor, latents: Tensor
) -> None:
    base.unet.to(torch.bfloat16)
    model = trained(base)
    prediction, scores = predict_noise(base.unet, latents, STEPS, states, token_idx=TOKEN_IDX)
    assert prediction.dtype == torch.bfloat16 and scores[0].dtype == torch.float32
    prediction.float().square().mean().backward()
    gradients = [parameter.grad for parameter in model.adapter_modules.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)

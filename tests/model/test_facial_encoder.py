import pytest
import torch
from torch import Tensor

from model.facial_encoder import FacialEncoder
from model.projector import IdentityProjector
from model.spec import SPECS

TINY = SPECS["tiny"]


@pytest.fixture(scope="module")
def encoder() -> FacialEncoder:
    torch.manual_seed(0)
    return FacialEncoder(TINY).eval()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 77, TINY.cross_attention_dim, generator=generator)
    regions = torch.randn(batch, 5, 50, TINY.vision_dim, generator=generator)
    tokens, valid = (
        torch.zeros(batch, 77, dtype=torch.bool),
        torch.zeros(batch, 5, dtype=torch.bool),
    )
    tokens[0, [4, 9, 30]] = True
    valid[0, [0, 2, 3]] = True
    return text, regions, tokens, valid


@torch.no_grad()
def test_only_masked_tokens_change_and_the_argument_does_not(encoder: FacialEncoder) -> None:
    text, regions, tokens, valid = inputs()
    before = text.clone()
    fused = encoder(text, regions, tokens, valid)
    assert torch.equal(text, before)
    assert torch.equal(fused != text, tokens[..., None].expand_as(text))


@torch.no_grad()
def test_the_nth_valid_region_is_fused_into_the_nth_masked_token(encoder: FacialEncoder) -> None:
    text, regions, tokens, valid = inputs()
    fused = encoder(text, regions, tokens, valid)
    for region, position in ((0, 4), (2, 9), (3, 30)):
        token = encoder.visual_projection.project(regions[:1, region])[:, 0]
        expected = encoder.fuse_module(text[:1, position], token)
        assert torch.allclose(fused[:1, position], expected, atol=1e-5)


@torch.no_grad()
def test_invalid_regions_have_no_effect(encoder: FacialEncoder) -> None:
    text, regions, tokens, valid = inputs()
    fused = encoder(text, regions, tokens, valid)
    other = torch.where(valid[..., None, None], regions, torch.full_like(regions, 7.0))
    assert torch.equal(encoder(text, other, tokens, valid), fused)


@torch.no_grad()
def test_strength_interpolates_between_text_and_fused_token(encoder: FacialEncoder) -> None:
    text, regions, tokens, valid = inputs()
    fused = encoder(text, regions, tokens, valid)
    strength = torch.ones(2, 5)
    assert torch.equal(encoder(text, regions, tokens, valid, strength), fused)
    strength[0, 2] = 0.0  # the region at position 9
    partly_fused = encoder(text, regions, tokens, valid, strength)
    assert torch.equal(partly_fused[0, 9], text[0, 9])
    assert torch.equal(partly_fused[0, 30], fused[0, 30])


@torch.no_grad()
def test_shortcut_adds_the_resampler_to_the_tokens() -> None:
    torch.manual_seed(0)
    projector = IdentityProjector(TINY).eval()
    identity, clip = torch.randn(2, 512), torch.randn(2, 50, TINY.vision_dim)
    resampled = projector(identity, clip, shortcut=False)
    projected = projector(identity, clip, shortcut=True, scale=0.0)
    both = projector(identity, clip, shortcut=True)
    assert resampled.shape == (2, TINY.num_tokens, TINY.cross_attention_dim)
    assert torch.allclose(both, projected + resampled, atol=1e-6)

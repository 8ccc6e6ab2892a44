from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from infer.sampling import Guidance, decode, denoise, initial_latents
from model.consistentid import BaseModels, ConsistentID
from model.spec import SPECS
from tests.bases import base_copy

TINY = SPECS["tiny"]


@pytest.fixture(scope="module")
def base(tiny_base: Any) -> BaseModels:
    models = base_copy(TINY, tiny_base)
    torch.manual_seed(0)
    ConsistentID(TINY, models.unet, "corrected")
    return models


def guidance(rows: int) -> Guidance:
    """Returns random guidance whose row n is the same for any number of rows."""
    states = [
        torch.randn(3, 81, TINY.cross_attention_dim, generator=torch.Generator().manual_seed(n))
        for n in range(rows)
    ]
    early, late, negative = torch.stack(states).unbind(1)
    return Guidance(early=early, late=late, negative=negative)


def run(base: BaseModels, rows: Guidance, seeds: list[int], **changes: Any) -> Tensor:
    call: dict[str, Any] = {
        "steps": 4,
        "merge_step": 2,
        "guidance_scale": 3.0,
        "mode": "corrected",
        **changes,
    }
    scheduler = call.pop("scheduler", None) or EulerDiscreteScheduler.from_config(
        base.scheduler.config
    )
    return denoise(base.unet, scheduler, rows, initial_latents((4, 16, 16), seeds), **call)


def test_an_image_does_not_depend_on_its_batch(base: BaseModels) -> None:
    together = run(base, guidance(3), [5, 6, 7])
    row = {name: getattr(guidance(3), name)[1:2] for name in ("early", "late", "negative")}
    alone = run(base, Guidance(**row), [6])
    assert torch.allclose(together[1:2], alone, atol=1e-3 * float(alone.abs().mean()))


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_schedulers_with_and_without_noise_repeat_with_the_seed(
    base: BaseModels, kind: Any
) -> None:
    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return run(
            base,
            guidance(1),
            [5],
            scheduler=kind.from_config(base.scheduler.config),
            generator=generator,
        )

    first = sample()
    assert first.isfinite().all() and torch.equal(first, sample())


def phases_of_steps(base: BaseModels, mode: str, merge_step: int) -> list[str]:
    rows, phases = guidance(1), []

    def record_phase(_input: Tensor, _timestep: Tensor, states: Tensor) -> dict[str, Any]:
        phases.append("early" if torch.equal(states[1:], rows.early) else "late")
        return {}

    run(base, rows, [5], mode=mode, merge_step=merge_step, extra=record_phase)
    return phases


def test_merge_step_is_the_length_of_the_first_phase_and_legacy_adds_one(base: BaseModels) -> None:
    assert phases_of_steps(base, "corrected", 2) == ["early", "early", "late", "late"]
    assert phases_of_steps(base, "legacy", 2) == ["early", "early", "early", "late"]
    assert phases_of_steps(base, "corrected", 0) == ["late"] * 4


def test_a_guidance_scale_of_one_ignores_the_negative(base: BaseModels) -> None:
    rows = guidance(1)
    other = Guidance(early=rows.early, late=rows.late, negative=rows.negative + 5)
    assert torch.equal(
        run(base, rows, [5], guidance_scale=1.0), run(base, other, [5], guidance_scale=1.0)
    )
    assert not torch.equal(run(base, rows, [5]), run(base, other, [5]))


def test_repeat_puts_rows_of_a_prompt_next_to_each_other() -> None:
    rows = guidance(2)
    assert torch.equal(rows.repeat(2).late, rows.late[[0, 0, 1, 1]])
    assert rows.repeat(2).pooled_late is None


def test_latents_that_do_not_fit_are_refused(base: BaseModels) -> None:
    with pytest.raises(ValueError, match="2 latents for 1 prompts"):
        run(base, guidance(1), [1, 2])


def test_decoded_images_are_rgb_bytes(base: BaseModels) -> None:
    images = decode(base.vae, torch.randn(2, 4, 16, 24))
    assert images.shape == (2, 64, 96, 3) and images.dtype == "uint8"

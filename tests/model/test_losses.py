import pytest
import torch

from model.losses import localisation_loss, noise_loss


def test_noise_loss_counts_masked_out_elements_in_the_mean() -> None:
    prediction, target = torch.full((2, 4, 8, 8), 3.0), torch.ones(2, 4, 8, 8)
    assert noise_loss(prediction, target).item() == pytest.approx(4.0)
    mask = torch.zeros(2, 16, 16)
    mask[:, :, :8] = 1  # half of every image; resizing to 8 × 8 gives no soft edge
    assert noise_loss(prediction, target, mask).item() == pytest.approx(2.0)
    assert noise_loss(prediction, target, weights=torch.tensor([1.0, 0.0])).item() == pytest.approx(
        2.0
    )


def attention(*pixels: float) -> torch.Tensor:
    """Returns one head's attention to one token in an image of 2 × 2 pixels, (1, 1, 4, 1)."""
    return torch.tensor(pixels).view(1, 1, 4, 1)


MASK = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2)
VALID = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (attention(0.5, 0.0, 0.0, 0.0), -1.0),  # all inside the mask
        (attention(0.0, 0.5, 0.5, 0.5), 1.0),  # all outside
        (attention(0.2, 0.2, 0.2, 0.2), 0.0),  # uniform
        (attention(0.4, 0.2, 0.0, 0.1), (0.5 + 0.25) / 3 - 1.0),
    ],
)
def test_localisation_by_hand(scores: torch.Tensor, expected: float) -> None:
    assert localisation_loss([scores], MASK, VALID).item() == pytest.approx(expected, abs=1e-3)


def test_localisation_is_the_mean_over_layers_and_skips_invalid_slots() -> None:
    good, bad = attention(0.5, 0, 0, 0), attention(0, 0.5, 0.5, 0.5)
    assert localisation_loss([good, bad], MASK, VALID).item() == pytest.approx(0.0, abs=1e-3)
    slots = torch.cat((good, bad), dim=-1)
    valid = torch.tensor([[True, False]])
    assert localisation_loss([slots], MASK.expand(-1, 2, -1, -1), valid).item() == pytest.approx(
        -1.0, abs=1e-3
    )
    assert localisation_loss(
        [slots], MASK.expand(-1, 2, -1, -1), ~valid | valid
    ).item() == pytest.approx(0, abs=1e-3)
    assert localisation_loss([good], MASK, ~VALID).item() == 0.0


def test_localisation_in_an_image_that_is_not_square() -> None:
    mask = torch.zeros(1, 1, 24, 16)
    mask[..., 12:, :] = 1
    scores = torch.zeros(1, 1, 6, 4)
    scores[..., 3:, :] = 1
    assert localisation_loss([scores.view(1, 1, 24, 1)], mask, VALID).item() < -0.8


def test_pixels_that_form_no_image_are_refused() -> None:
    with pytest.raises(ValueError, match="5 pixels"):
        localisation_loss([torch.rand(1, 1, 5, 1)], MASK, VALID)

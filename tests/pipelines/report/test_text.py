"""Numbers as the page shows them."""

from __future__ import annotations

import pytest

from pipelines.report.text import number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (1234, "1,234"),
        (-0.04163, "−0.042"),
        (12.345, "12.3"),
        (3.456, "3.46"),
    ],
)
def test_numbers_as_text(value: float | None, shown: str) -> None:
    assert number(value) == shown

"""How state machines run: a few fixed sequences, or many random ones with the environment variable
STATE_MACHINE_EXAMPLES.
"""

from __future__ import annotations

import os
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SEARCHED: Final = int(os.environ.get("STATE_MACHINE_EXAMPLES", "0"))


def numbers(count: int) -> list[Any]:
    """Returns the numbers of the searches, for `search`: one if it is random, else `count`, of
    which two thirds are thorough.
    """
    if SEARCHED:
        return [0]
    rest = [pytest.param(n, marks=pytest.mark.thorough) for n in range(count // 3, count)]
    return [*range(count // 3), *rest]


def search(machine: type[RuleBasedStateMachine], number: int) -> None:
    """Runs sequences of a machine.

    A search begins with the simplest example, and its later ones resemble each other. So there is a
    search of two examples for each number, which is its seed.
    """
    run_state_machine_as_test(
        machine if SEARCHED else seed(number)(machine),
        settings=settings(
            max_examples=SEARCHED or 2,
            stateful_step_count=12,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, *([Phase.shrink] if SEARCHED else [])],
            suppress_health_check=list(HealthCheck),
        ),
    )

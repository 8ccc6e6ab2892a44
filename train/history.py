"""What a run did, on disk: losses.jsonl has a line for every step, summary.json the figures to
quote.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.step import LOSSES


class History:
    """The loss of every step, in OUT/losses.jsonl. After a resume what the lost steps had written
    is taken out.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        self.lines = [line for line in read_history(path) if line["step"] <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def add(
        self, first_step: int, values: Sequence[Sequence[float]], rates: Sequence[float]
    ) -> None:
        """Steps from `first_step` on: their LOSSES and learning rates."""
        new = [
            {
                "step": first_step + index,
                **{k: round(v, 6) for k, v in zip(LOSSES, row, strict=True)},
                "lr": rate,
            }
            for index, (row, rate) in enumerate(zip(values, rates, strict=True))
        ]
        self.lines.extend(new)
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in new)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a losses.jsonl, without one that a kill cut short; none if there is no such
    file.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def summarise(history: History, *, samples: int, seconds: float, finished: bool) -> dict[str, Any]:
    """The run's figures; the start and end of a loss are its means over the first and the last
    tenth of the steps.
    """
    lines = history.lines
    part = max(1, len(lines) // 10)

    def mean(some: Sequence[dict[str, Any]], name: str) -> float:
        return round(float(sum(line[name] for line in some)) / max(1, len(some)), 6)

    return {
        "finished": finished,
        "steps": lines[-1]["step"] if lines else 0,
        "samples": samples,
        "seconds": round(seconds, 1),
        "samples_per_second": round(samples / seconds, 2) if seconds else 0.0,
        "steps_per_second": round(len(lines) / seconds, 2) if seconds else 0.0,
        **{
            name: {"start": mean(lines[:part], name), "end": mean(lines[-part:], name)}
            for name in LOSSES
        },
    }

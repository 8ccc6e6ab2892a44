"""The loss history of a run, OUT/losses.jsonl with a line for each step, and its summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.step import LOSSES


class History:
    """Writes the losses of every step to OUT/losses.jsonl.

    step: the step that the run resumes from, 0 for a new run. Lines of later steps, which will be
    trained again, are removed from the file.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        self.lines = [line for line in read_history(path) if line["step"] <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def add(
        self, first_step: int, values: Sequence[Sequence[float]], rates: Sequence[float]
    ) -> None:
        """Appends steps from `first_step` on: for each its LOSSES and its learning rate."""
        lines = [
            {
                "step": first_step + index,
                **{k: round(v, 6) for k, v in zip(LOSSES, row, strict=True)},
                "lr": rate,
            }
            for index, (row, rate) in enumerate(zip(values, rates, strict=True))
        ]
        self.lines.extend(lines)
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a losses.jsonl, up to one that is incomplete; none if there is no file."""
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
    """Returns the contents of summary.json.

    samples, seconds: consumed by the run, including the runs that it resumed. The start and the
    end of a loss are its means over the first and the last tenth of the steps.
    """
    lines = history.lines
    tenth = max(1, len(lines) // 10)

    def mean(part: Sequence[dict[str, Any]], name: str) -> float:
        return round(float(sum(line[name] for line in part)) / max(1, len(part)), 6)

    return {
        "finished": finished,
        "steps": lines[-1]["step"] if lines else 0,
        "samples": samples,
        "seconds": round(seconds, 1),
        "samples_per_second": round(samples / seconds, 2) if seconds else 0.0,
        "steps_per_second": round(len(lines) / seconds, 2) if seconds else 0.0,
        **{
            name: {"start": mean(lines[:tenth], name), "end": mean(lines[-tenth:], name)}
            for name in LOSSES
        },
    }

"""Writes docs/reasons.md from stages/reasons.py: `python -m tests.docs`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from stages.reasons import ANY_STAGE, REASONS, Reason

PAGE: Final = Path("docs/reasons.md")

_HEAD: Final = """\
# Reasons

Every input ends as *written*, *dropped* (a rule excludes it) or *failed* (it can't be processed).
A dropped or failed record has a reason, the stage that gave it, and a detail with the numbers.
`python -m pipelines.cli status OUT` counts the reasons, the report shows examples,
`inspect OUT KEY` shows one record, and `retry OUT --reason REASON` processes only those inputs
again.

Records dropped by the quality filter or the global pass are *quarantined*: their samples stay in
`fgid-000012.quarantine.tar`, and a changed rule restores them without a model call. After a change
of a `resize.*` setting, all shards are processed again from the source.

This page is generated from `stages/reasons.py` by `python -m tests.docs`.
"""
_TABLE: Final = "| reason | status | meaning | what to do |\n| --- | --- | --- | --- |\n"


def reasons_page() -> str:
    """Returns the text of docs/reasons.md: a table for each stage, in the order of the chain."""
    stages: dict[str, list[str]] = {}
    for name, reason in REASONS.items():
        stages.setdefault(reason.stages[0], []).append(_row(name, reason))
    parts = [f"## {_title(stage)}\n\n{_TABLE}{''.join(rows)}" for stage, rows in stages.items()]
    return "\n".join([_HEAD, *parts])


def _title(stage: str) -> str:
    return "Any stage" if stage == ANY_STAGE else f"`{stage}`"


def _row(name: str, reason: Reason) -> str:
    others = ", ".join(f"`{stage}`" for stage in reason.stages[1:])
    meaning = reason.meaning + (f" Also in {others}." if others else "")
    return f"| `{name}` | {reason.status} | {meaning} | {reason.action} |\n"


if __name__ == "__main__":
    PAGE.write_text(reasons_page(), encoding="utf-8")

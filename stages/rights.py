"""Rights: pictures whose licence or consent isn't among those allowed go no further, and nothing of
them is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from configs.quality import RightsConfig
from stages.base import Dropped, RecordStage, reject
from stages.record import Record


class RightsStage(RecordStage):
    """Compares what the source states with the patterns allowed; none allowed means that anything
    is.
    """

    name = "rights"
    version = 1
    requires = ("license", "consent")
    config: RightsConfig

    def process_one(self, record: Record) -> Record:
        if not allowed(record.license, self.config.license_allow):
            verdict = Dropped(
                "license_not_allowed", _said("licence", record.license, self.config.license_allow)
            )
        elif not allowed(record.consent, self.config.consent_allow):
            verdict = Dropped(
                "consent_missing", _said("consent", record.consent, self.config.consent_allow)
            )
        else:
            return record
        stated = {
            name: getattr(record, name)
            for name in ("key", "source", "sha256", "license", "author", "consent")
        }
        # an earlier run may have made more of it: that goes too
        return reject(Record(**stated), verdict, self.name)


def allowed(stated: str, patterns: Sequence[str]) -> bool:
    """True if `stated` matches a pattern (* and ? stand for anything), whatever the case; or there
    is no pattern.
    """
    text = stated.strip().casefold()
    return not patterns or any(
        fnmatchcase(text, pattern.strip().casefold()) for pattern in patterns
    )


def _said(what: str, stated: str, patterns: Sequence[str]) -> str:
    return (
        f"{what} {stated!r}, allowed: {', '.join(patterns)}" if stated else f"no {what} is stated"
    )

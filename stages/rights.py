"""Rights: drops records whose license or consent isn't allowed, with everything computed from their
images.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from configs.quality import RightsConfig
from stages.base import Dropped, RecordStage, reject
from stages.record import PROVENANCE, Record


class RightsStage(RecordStage):
    """Compares a record's license and consent with the allowed patterns; no patterns allow any."""

    name = "rights"
    version = 1
    requires = ("license", "consent")
    config: RightsConfig

    def process_one(self, record: Record) -> Record:
        if not is_allowed(record.license, self.config.license_allow):
            detail = _detail("licence", record.license, self.config.license_allow)
            rejection = Dropped("license_not_allowed", detail)
        elif not is_allowed(record.consent, self.config.consent_allow):
            detail = _detail("consent", record.consent, self.config.consent_allow)
            rejection = Dropped("consent_missing", detail)
        else:
            return record
        # All other fields are removed: an earlier run may have computed some.
        names = ("key", "source", "sha256", *PROVENANCE)
        stated = Record(**{name: getattr(record, name) for name in names})
        return reject(stated, rejection, self.name)


def is_allowed(value: str, patterns: Sequence[str]) -> bool:
    """True if `value` matches one of `patterns`, or there are none. Case is ignored; * and ? are
    wildcards.
    """
    text = value.strip().casefold()
    return not patterns or any(
        fnmatchcase(text, pattern.strip().casefold()) for pattern in patterns
    )


def _detail(name: str, value: str, patterns: Sequence[str]) -> str:
    return f"{name} {value!r}, allowed: {', '.join(patterns)}" if value else f"no {name} is stated"

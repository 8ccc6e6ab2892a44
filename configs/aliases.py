"""Renamed configuration keys. Old keys are read until version 0.3.0, with a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from configs.common import subsection
from configs.errors import ConfigError
from configs.schema import DatasetConfig

_LOG = logging.getLogger(__name__)
_UNTIL: Final = "0.3.0"

# Configuration class → old key → new keys. Version 0.1 had one set of caption settings for all
# backends: an old key sets every backend that has the setting, whichever backend is chosen. Its
# `max_new_tokens` was that of both captions.
RENAMED_KEYS: Final[Mapping[type[Any], Mapping[str, tuple[str, ...]]]] = {
    DatasetConfig: {
        "neighbours": ("global_pass",),
        **{
            f"caption.{name}": tuple(f"caption.{backend}.{name}" for backend in backends)
            for backends, names in (
                (("llava", "openai"), ("model", "prompt", "face_prompt")),
                (("llava",), ("dtype", "quantize", "device")),
                (("openai",), ("base_url", "api_key_env", "concurrency", "tries", "timeout")),
            )
            for name in names
        },
        "caption.max_new_tokens": tuple(
            f"caption.{backend}.{name}"
            for backend in ("llava", "openai")
            for name in ("max_new_tokens", "face_max_new_tokens")
        ),
    }
}


def rename_keys(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Moves the values of old keys to the new keys, in place, and returns `values`.

    values: a nested mapping for the configuration class `kind`. Logs a warning for each old key,
    once in a process. Raises ConfigError if a setting is given under both names; the message never
    shows the value, which may be secret.
    """
    for old, renamed in RENAMED_KEYS.get(kind, {}).items():
        *parents, name = old.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            continue
        value = section.pop(name)
        for new in renamed:
            *parents, name = new.split(".")
            section = values
            for parent in parents:
                section = subsection(section, parent, new)
            if name in section:
                raise ConfigError(
                    f"{old} and {new} are both given, and {old} is the old name of {new}. "
                    f"Give {new} only."
                )
            section[name] = value
        _warn(old, renamed)
    return values


@cache
def _warn(old: str, renamed: tuple[str, ...]) -> None:
    _LOG.warning(
        "The setting %s is now %s. The old name is read until version %s.",
        old,
        " and ".join(renamed),
        _UNTIL,
    )

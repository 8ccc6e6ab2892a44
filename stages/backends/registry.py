"""The table of backends: name → class. A backend's module is imported when it is first used.

A backend is built as `Backend(config, weights)`. config: the stage's section of the configuration;
for a caption backend, the section of CaptionConfig with the backend's name. weights: see
weights.py. To add a backend, write a module in this folder and add a line here.
"""

from __future__ import annotations

import importlib
from typing import Any

from configs.errors import ConfigError

BACKENDS: dict[str, dict[str, str]] = {
    "detect": {"scrfd": "stages.backends.scrfd:Scrfd"},
    "parse": {"bisenet": "stages.backends.bisenet:BiSeNetParser"},
    "embed": {"arcface": "stages.backends.arcface:ArcFace"},
    "caption": {
        "attributes": "stages.backends.attributes:Attributes",
        "llava": "stages.backends.llava:Llava",
        "openai": "stages.backends.openai:OpenAICaptioner",
    },
}


def check_backend(job: str, name: str) -> None:
    """Raises ConfigError if the stage named `job` has no backend `name`."""
    if name not in BACKENDS[job]:
        names = ", ".join(sorted(BACKENDS[job]))
        raise ConfigError(f"{job}.backend={name!r}: no such backend. Known: {names}.")


def backend_class(job: str, name: str) -> type[Any]:
    """Returns the class of backend `name` for the stage named `job`. Raises ConfigError for an
    unknown backend.
    """
    check_backend(job, name)
    module, _, attribute = BACKENDS[job][name].partition(":")
    backend: type[Any] = getattr(importlib.import_module(module), attribute)
    return backend

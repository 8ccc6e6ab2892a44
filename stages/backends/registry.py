"""Name → class of each backend, loaded only when it is asked for. To add one: a file beside this, a
line here.

It is built with its section of the configuration and a `Weights` (weights.py):
`Backend(config, weights)`. The section is its stage's; a caption backend has one of its own, of its
name in CaptionConfig.
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


def backend_class(job: str, name: str) -> type[Any]:
    """Returns the class of backend `name` for a stage (`job`: the stage's name).

    Raises ConfigError for an unknown name.
    """
    backends = BACKENDS[job]
    if name not in backends:
        raise ConfigError(
            f"{job}.backend={name!r}: no such backend. Known: {', '.join(sorted(backends))}."
        )
    module, _, attribute = backends[name].partition(":")
    backend: type[Any] = getattr(importlib.import_module(module), attribute)
    return backend

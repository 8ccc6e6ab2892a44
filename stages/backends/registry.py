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
    """The class of backend `name` for `job`. Raises ConfigError, naming the known ones."""
    known = BACKENDS[job]
    if name not in known:
        raise ConfigError(
            f"{job}.backend={name!r}: no such backend. Known: {', '.join(sorted(known))}."
        )
    module, _, attribute = known[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found

"""What servers state of the model, in /v1/models.

The root is what the server loaded the model from, such as a folder or a Hugging Face id. It tells
checkpoints apart that are served under one name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.captions import OpenAIConfig
from configs.errors import ServerError
from stages.backends.openai import messages
from stages.backends.openai.client import Model


def served(config: OpenAIConfig, models: Sequence[Model]) -> Model:
    """Returns the configured model as the server lists it. `transformers serve` doesn't list a
    model in a folder; then nothing is stated of it.
    """
    return next((m for m in models if m.id == config.model), Model(config.model, "", 0))


def common_root(config: OpenAIConfig, lists: Mapping[str, Sequence[Model]]) -> str:
    """Returns the root that all servers state, or the model's name if none states one. lists: by
    URL.

    Raises ServerError if servers state different roots, or another one than
    `caption.openai.root`.
    """
    stated = {url: served(config, models).root for url, models in lists.items()}
    if config.root:
        others = {url: root for url, root in stated.items() if root not in ("", config.root)}
        if others:
            raise ServerError(
                f"{messages.settings(config)}, caption.openai.root={config.root}: other servers "
                f"than expected: /v1/models states as root: {_listed(others)}. Serve the "
                "checkpoint that caption.openai.root names, or change it: then captions are made "
                "again."
            )
        return config.root
    roots = {url: root or config.model for url, root in stated.items()}
    if len({*roots.values()}) > 1:
        raise ServerError(
            f"{messages.settings(config)}: the servers have different checkpoints: /v1/models "
            f"states as root: {_listed(roots)}. Captions must not depend on which server answers: "
            "serve the same checkpoint, under the same path, on all of them."
        )
    return next(iter(roots.values()))


def _listed(roots: Mapping[str, str]) -> str:
    return ", ".join(f"{root!r} at {url}" for url, root in roots.items())

"""The messages of ServerError."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from configs.captions import OpenAIConfig
from configs.errors import ConfigError
from stages.backends.openai.client import Fault

RESUME: Final = "Committed shards are kept; the same command continues from there."


def check(config: OpenAIConfig) -> None:
    """Raises ConfigError if a setting without a default is empty."""
    for name, example in (
        ("base_url", "http://127.0.0.1:8000/v1"),
        ("model", "llava-hf/llava-1.5-7b-hf"),
    ):
        if not getattr(config, name):
            raise ConfigError(
                f"caption.openai.{name} is empty, and caption.backend=openai needs one, such as "
                f"{example}."
            )


def settings(config: OpenAIConfig) -> str:
    return f"caption.openai.base_url={config.base_url}, caption.openai.model={config.model}"


def no_answer(config: OpenAIConfig, faults: Mapping[str, Fault]) -> str:
    """Returns the message after all servers have failed with a plain test image. faults: by URL."""
    fault = next(iter(faults.values()))
    problem = key_refused(config, fault) or (
        f"a request with a plain test image failed too: {listed(faults)} {_advice(config, fault)}"
    )
    return f"{settings(config)}: {problem} {RESUME}"


def no_list(config: OpenAIConfig, faults: Mapping[str, Fault]) -> str:
    """Returns the message if no server lists its models. faults: by URL."""
    problem = key_refused(config, next(iter(faults.values()))) or listed(faults)
    problem = problem.rstrip(".")
    return (
        f"{settings(config)}: no list of models from /v1/models: {problem}. The captions' "
        "signature needs to know which checkpoint the server has loaded. Start the server; or, to "
        "plan without it, set caption.openai.root to the root that its /v1/models states, or to "
        f"{config.model} if it states none."
    )


def key_refused(config: OpenAIConfig, fault: Fault) -> str:
    """Returns the message if the server refuses the key, else "". The server's text is left out: it
    may contain parts of the key.
    """
    if fault.status not in (401, 403):
        return ""
    name = config.api_key_env
    problem = "contains one that the server refuses" if os.environ.get(name) else "is empty"
    return (
        f"the server refuses the key (status {fault.status}). The environment variable {name} "
        f"{problem}. Set it for every process and node."
    )


def listed(faults: Mapping[str, Fault]) -> str:
    """Returns the faults as a text, with the URLs if there are several."""
    texts = {
        url: "the key is refused" if fault.status in (401, 403) else fault.text
        for url, fault in faults.items()
    }
    if len(texts) == 1:
        return next(iter(texts.values()))
    return " ".join(f"{url}: {text}." for url, text in texts.items())


def _advice(config: OpenAIConfig, fault: Fault) -> str:
    if fault.status == 0:
        return (
            "Expected a server that can be reached from this machine: is it running, and is this "
            "its address, with /v1?"
        )
    if fault.status == 429:
        return (
            f"Lower caption.openai.concurrency={config.concurrency}, or raise "
            f"caption.openai.tries={config.tries}."
        )
    if fault.status == 200:
        return "Expected OpenAI's chat completions: is this the address of such a server, with /v1?"
    return (
        "Expected a model that accepts images, under the name that the server uses, with room for "
        "the largest image of the run; see the server's log."
    )

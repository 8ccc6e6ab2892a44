"""The check before a run: do the servers have the model, and does the largest picture fit?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from configs.captions import OpenAIConfig
from configs.errors import ServerError
from stages.backends.openai import messages
from stages.backends.openai.client import Client, Completion, Fault, Model
from stages.backends.openai.loop import LoopThread
from stages.backends.openai.models import common_root, served
from stages.backends.openai.questions import Question, largest_questions, size_sent
from stages.backends.openai.servers import Servers

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@cache
def stated_root(config: OpenAIConfig) -> str:
    """Returns the model's root as the servers state it, or the model's name if none states one.
    They are asked once in a process. Servers that don't answer are passed over if another does.

    Raises ServerError if none answers or if they state different roots.
    """
    lists = _run(config, (1, 1), Servers.lists)
    answered = {url: models for url, models in lists.items() if not isinstance(models, Fault)}
    if not answered:
        faults = {url: fault for url, fault in lists.items() if isinstance(fault, Fault)}
        raise ServerError(messages.no_list(config, faults))
    return common_root(config, answered)


def check(config: OpenAIConfig, largest: tuple[int, int]) -> None:
    """Asks each server all questions of a run, with a plain picture of the largest size. Servers
    that can't be reached are passed over if another one can.

    Raises ServerError if none can be reached, or if one has another checkpoint than the run was
    planned with, too short a context, or doesn't process the picture.
    """
    root = config.root or stated_root(config)
    checked = _run(config, largest, _check)
    if problems := [each.problem for each in checked if each.problem]:
        raise ServerError(f"{messages.settings(config)}: {' '.join(problems)}")
    faults = {each.client.url: each.fault for each in checked if each.fault}
    if len(faults) == len(checked):
        raise ServerError(messages.no_answer(config, faults))
    lists = {each.client.url: each.models for each in checked if each.models}
    if lists and (now := common_root(config, lists)) != root:
        raise ServerError(
            f"{messages.settings(config)}: the root that /v1/models states was {root!r} when the "
            f"run was planned, and is {now!r} now. Run the same command again."
        )
    for url, fault in faults.items():
        logger.warning("the run starts without caption server %s: %s", url, fault.text)


@dataclass(slots=True)
class _Checked:
    """What was seen of a server. models: none if it doesn't list any. fault: why it can't be
    reached. problem: why it doesn't fit, for people.
    """

    client: Client
    models: tuple[Model, ...] = ()
    fault: Fault | None = None
    problem: str = ""


async def _check(servers: Servers) -> list[_Checked]:
    slots = asyncio.Semaphore(servers.config.concurrency)
    return await asyncio.gather(*(_check_one(servers, each, slots) for each in servers.clients))


async def _check_one(servers: Servers, client: Client, slots: asyncio.Semaphore) -> _Checked:
    """Asks for one token first, which tells the number of tokens of the prompts, also where there
    is no room for the answer.
    """

    async def ask(asked: Question) -> Completion | Fault:
        async with slots:
            return await client.complete(asked)

    checked = _Checked(client)
    models = await client.models()
    if not isinstance(models, Fault):
        checked.models = models
    elif models.status == 0:
        checked.fault = models
        return checked
    questions = largest_questions(servers.config, servers.largest)
    replies = await asyncio.gather(*(ask(each._replace(tokens=1)) for each in questions))
    needed, longest = 0, questions[0]
    for reply, asked in zip(replies, questions, strict=True):
        if isinstance(reply, Fault):
            return _failed(checked, servers, asked._replace(tokens=1), reply)
        if reply.prompt_tokens + asked.tokens > needed:
            needed, longest = reply.prompt_tokens + asked.tokens, asked
    context = served(servers.config, checked.models).context
    if context and needed > context:
        checked.problem = (
            f"{client.url}: {_picture(servers)} and the prompt {longest.prompt!r} are "
            f"{needed - longest.tokens:,} tokens, and the answer may have {longest.tokens:,}: "
            f"{needed:,} in all. The server's context has {context:,} (max_model_len). "
            f"{_how_to_fit(needed)}"
        )
        return checked
    reply = await ask(longest)
    return _failed(checked, servers, longest, reply) if isinstance(reply, Fault) else checked


def _failed(checked: _Checked, servers: Servers, asked: Question, fault: Fault) -> _Checked:
    """Returns what was seen of a server that gave no answer."""
    config, url = servers.config, checked.client.url
    if fault.is_servers:
        checked.fault = fault
    elif refused := messages.key_refused(config, fault):
        checked.problem = refused
    elif checked.models and all(model.id != config.model for model in checked.models):
        names = ", ".join(sorted(model.id for model in checked.models))
        checked.problem = (
            f"{url} has no such model ({fault.text}). Set caption.openai.model to one of those "
            f"that it has: {names}."
        )
    else:
        context = served(config, checked.models).context
        checked.problem = (
            f"{url}: {_picture(servers)} and the prompt {asked.prompt!r}, with room for an answer "
            f"of {asked.tokens:,} token{'s' if asked.tokens > 1 else ''}, get no answer: "
            f"{fault.text} "
            f"{f'Its context has {context:,} tokens (max_model_len). ' if context else ''}"
            f"Expected a model that accepts such pictures. {_how_to_fit(0)}"
        )
    return checked


def _picture(servers: Servers) -> str:
    width, height = size_sent(servers.config, servers.largest)
    return f"a picture of {width} × {height} pixels, the run's largest size,"


def _how_to_fit(needed: int) -> str:
    start = f"--max-model-len {needed} or more" if needed else "a larger --max-model-len"
    return (
        f"Start it with {start} (SGLang: --context-length), set caption.openai.pad_to_square=false "
        "if the model sees the whole picture anyway, or lower resize.size, resize.max_aspect or "
        "caption.openai.max_new_tokens and face_max_new_tokens."
    )


def _run(
    config: OpenAIConfig,
    largest: tuple[int, int],
    ask: Callable[[Servers], Coroutine[Any, Any, _T]],
) -> _T:
    """Returns what `ask` returns of the servers."""
    servers = Servers(config, largest)
    loop = LoopThread(servers.close)
    try:
        return loop.run(ask(servers))
    finally:
        loop.stop()

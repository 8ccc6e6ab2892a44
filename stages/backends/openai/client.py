"""Requests to one server."""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from configs.captions import OpenAIConfig
from stages.backends.openai.questions import Question
from stages.backends.protocols import Answer, Finish

_T = TypeVar("_T")
_CONNECT: Final = 10.0  # seconds, at most
_LIST: Final = 10.0  # seconds for the list of models, at most
_TEXT: Final = 400  # characters of a server's message that are recorded: some send a page of HTML
# Names of the limit of tokens. OpenAI's newer models refuse the first; some servers know no other.
_LIMITS: Final = ("max_tokens", "max_completion_tokens")
_WITHOUT_LIST: Final = (200, 404, 405, 500, 501)  # status where there is no list of models
_INVALID: Final = (400, 422)  # status of a request whose content is refused


class Completion(NamedTuple):
    """An answer. prompt_tokens: of picture and prompt; 0 if the server doesn't state it."""

    answer: Answer
    prompt_tokens: int


class Model(NamedTuple):
    """A model as a server lists it. root: what it was loaded from; "" if that isn't stated.
    context: the most tokens of prompt and answer together; 0 if that isn't stated.
    """

    id: str
    root: str
    context: int


class Fault(NamedTuple):
    """Why a request failed. status: HTTP status; 200: the response was none that the interface
    has; 0: there was no response. text: the error, for people.
    """

    status: int
    text: str

    @property
    def is_servers(self) -> bool:
        """Whether the server can't be reached or failed itself, by what it responded."""
        return self.status == 0 or self.status >= 500

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later, or on another server."""
        return self.is_servers or self.status in (408, 409, 429)


class Client:
    """Connections to the server at `url`. The key is read from the environment variable
    `config.api_key_env`. counts: tokens are added to it. share: of the requests, in proportion to
    those of other servers. open, asked: numbers of open and of all questions.
    """

    def __init__(
        self, url: str, config: OpenAIConfig, counts: Counter[str], share: int = 1
    ) -> None:
        from openai import AsyncOpenAI, Timeout

        self.url, self.share, self.open, self.asked = url, share, 0, 0
        self._config, self._counts, self._limit = config, counts, _LIMITS[0]
        self._key = os.environ.get(config.api_key_env, "")
        self._patient = AsyncOpenAI(
            base_url=url,
            # the package requires a key, even if the server needs none
            api_key=self._key or "none",
            max_retries=config.tries - 1,
            timeout=Timeout(config.timeout, connect=min(_CONNECT, config.timeout)),
        )
        self._once = self._patient.with_options(max_retries=0)

    async def complete(self, question: Question, *, patient: bool = True) -> Completion | Fault:
        """Returns the answer, or why all attempts failed. patient: whether failures that may be
        temporary are tried again (`config.tries`).
        """
        self.open += 1
        self.asked += 1
        try:
            limit = self._limit
            reply = await self._create(question, limit, patient)
            if isinstance(reply, Fault) and reply.status in _INVALID and limit in reply.text:
                # the text may also name the limit because it is too large
                [other] = {*_LIMITS} - {limit}
                again = await self._create(question, other, patient)
                if not isinstance(again, Fault):
                    self._limit = other
                return reply if isinstance(again, Fault) and other in again.text else again
            return reply
        finally:
            self.open -= 1

    async def models(self) -> tuple[Model, ...] | Fault:
        """Returns the models that the server lists, none if it has no list, or why there is no
        answer. `transformers serve` responds with 500 if its cache of models doesn't exist.
        """

        async def read() -> tuple[Model, ...]:
            timeout = min(_LIST, self._config.timeout)
            response = await self._patient.models.with_raw_response.list(timeout=timeout)
            return tuple(map(_model, json.loads(response.text)["data"]))

        models = await self._attempt(read, "no list of models")
        has_none = isinstance(models, Fault) and models.status in _WITHOUT_LIST
        return () if has_none else models

    async def close(self) -> None:
        await self._patient.close()

    async def _create(self, question: Question, limit: str, patient: bool) -> Completion | Fault:
        encoded = [base64.b64encode(jpeg).decode() for jpeg in question.jpegs]
        urls = [f"data:image/jpeg;base64,{text}" for text in encoded]
        content: list[dict[str, Any]] = [
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            {"type": "text", "text": question.prompt},
        ]
        messages: Any = [{"role": "user", "content": content}]
        tokens: Any = {limit: question.tokens}

        async def create() -> Completion:
            client = self._patient if patient else self._once
            response = await client.chat.completions.create(
                model=self._config.model,
                messages=messages,
                temperature=0,
                # `transformers serve` would use the checkpoint's setting without it
                frequency_penalty=0,
                **tokens,
            )
            choice = response.choices[0]
            answer = Answer((choice.message.content or "").strip(), _finish(choice.finish_reason))
            usage = response.usage
            if usage is None:
                return Completion(answer, 0)
            self._counts["prompt_tokens"] += usage.prompt_tokens
            self._counts["completion_tokens"] += usage.completion_tokens
            return Completion(answer, usage.prompt_tokens)

        return await self._attempt(create, "no chat completion")

    async def _attempt(self, call: Callable[[], Awaitable[_T]], otherwise: str) -> _T | Fault:
        """Returns what `call` returns, or its failure. otherwise: what a response of a wrong form
        is.
        """
        from openai import APIStatusError, OpenAIError

        try:
            return await call()
        except APIStatusError as error:
            text = f"status {error.status_code}: {error.response.text}"
            return Fault(error.status_code, self._clean(text))
        except OpenAIError as error:
            return Fault(0, self._clean(f"{type(error).__name__}: {error.__cause__ or error}"))
        # the package doesn't check the types in a response
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            text = f"the answer is {otherwise} ({type(error).__name__}: {error})"
            return Fault(200, self._clean(text))

    def _clean(self, text: str) -> str:
        """Returns the text as one short line without the key, which some servers repeat."""
        return " ".join((text.replace(self._key, "…") if self._key else text).split())[:_TEXT]


def _model(entry: Mapping[str, Any]) -> Model:
    """Returns an entry of the list of models. Raises TypeError or LookupError for another value."""
    name, root, context = entry["id"], entry.get("root"), entry.get("max_model_len")
    if not isinstance(name, str):
        raise TypeError(f"a model's id is {name!r}")
    return Model(
        name, root if isinstance(root, str) else "", context if isinstance(context, int) else 0
    )


def _finish(reason: object) -> Finish:
    """Returns a response's `finish_reason`, "" for one that says nothing about the length."""
    if reason == "stop":
        return "stop"
    return "length" if reason == "length" else ""

"""Gets captions from a server with OpenAI's chat completions: vLLM, SGLang, `transformers serve`.

For each image there are two requests with greedy decoding, `caption.openai.concurrency` requests at
a time. The openai package retries failures that may be temporary (no connection, timeout, status
408, 409, 429 or 5xx), after growing pauses or after that of Retry-After. When all attempts have
failed, a request with a plain test image is sent. If it succeeds, the fault is the record's, and
only the record fails. If not, the fault is the server's or the configuration's, and the run ends
with ServerError.

The signature contains the model's name on the server. It doesn't change if the server loads another
checkpoint under the same name.
"""

from __future__ import annotations

import asyncio
import base64
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from configs.captions import OpenAIConfig
from configs.errors import ConfigError, ServerError
from stages.backends.protocols import Answer, Finish, Kind
from stages.base import Failed
from stages.codec import encode_jpeg
from stages.record import Record

if TYPE_CHECKING:
    from stages.backends.weights import Weights

_CONNECT: Final = 10.0  # seconds, at most
_TEXT: Final = 400  # characters of a server's message that are recorded: some send a page of HTML


class Fault(NamedTuple):
    """Why a request failed. status: HTTP status; 200: the response was not a chat completion; 0:
    there was no response. text: the error, for people.
    """

    status: int
    text: str


class _Question(NamedTuple):
    """An image, a prompt, and the most tokens of the answer."""

    jpeg: bytes
    prompt: str
    most: int


class OpenAICaptioner:
    """A captioner that asks `config.model` on the server at `config.base_url`. The key is read from
    the environment variable `config.api_key_env`.
    """

    def __init__(self, config: OpenAIConfig, weights: Weights | None = None) -> None:
        from openai import AsyncOpenAI, Timeout

        _check(config)
        self.config = config
        self.counts: Counter[str] = Counter()
        self._key = os.environ.get(config.api_key_env, "")
        self._client = AsyncOpenAI(
            base_url=config.base_url,
            # the package requires a key, even if the server needs none
            api_key=self._key or "none",
            max_retries=config.tries - 1,
            timeout=Timeout(config.timeout, connect=min(_CONNECT, config.timeout)),
        )
        # An event loop in a thread: connections stay open between calls, and the caller's thread
        # may already run a loop, as in a notebook.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="openai", daemon=True).start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    @staticmethod
    def digests(config: OpenAIConfig) -> Mapping[str, str]:
        """Returns {}: the server doesn't state which checkpoint it has loaded. Raises ConfigError
        if the base URL or the model is empty.
        """
        _check(config)
        return {}

    @staticmethod
    def window(config: OpenAIConfig, batch_size: int) -> int:
        """Returns enough images to keep `concurrency` requests open most of the time."""
        return max(batch_size, config.concurrency)

    def caption(
        self, records: Sequence[Record], batch_size: int = 1
    ) -> list[tuple[Answer, Answer] | Failed]:
        """Returns the answers to both prompts for each record, or Failed("caption_failed"). Raises
        ServerError if the server doesn't process a plain test image either.
        """
        prompts = (self.config.prompt, self.config.face_prompt)
        answers = self._run(
            [
                _Question(record.image, prompt, count)
                for record in records
                for prompt, count in zip(prompts, self._most, strict=True)
            ]
        )
        return [_pair(*pair) for pair in zip(answers[::2], answers[1::2], strict=True)]

    def retry(
        self, records: Sequence[Record], kinds: Sequence[Kind], batch_size: int = 1
    ) -> list[Answer | Failed]:
        """Returns the answer to the second try of that kind for each record; the rest is as in
        `caption`.
        """
        prompts = (self.config.retry_prompt, self.config.face_retry_prompt)
        questions = [
            _Question(record.image, prompts[kind], self._most[kind])
            for record, kind in zip(records, kinds, strict=True)
        ]
        answers = self._run(questions)
        return [_failed(a) if isinstance(a, Fault) else a for a in answers]

    @property
    def _most(self) -> tuple[int, int]:
        """The most tokens of both captions."""
        return (self.config.max_new_tokens, self.config.face_max_new_tokens)

    def _run(self, questions: Sequence[_Question]) -> list[Answer | Fault]:
        """Returns the answers, in order."""
        return asyncio.run_coroutine_threadsafe(self._answers(questions), self._loop).result()

    async def _answers(self, questions: Sequence[_Question]) -> list[Answer | Fault]:
        slots = asyncio.Semaphore(self.config.concurrency)
        tasks = [asyncio.create_task(self._ask(question, slots)) for question in questions]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # after a ServerError, the other requests are pointless

    async def _ask(self, question: _Question, slots: asyncio.Semaphore) -> Answer | Fault:
        """Returns the answer, or why this request failed. Raises ServerError if the request fails
        with a plain test image too.
        """
        async with slots:
            answer = await self._request(question)
            if isinstance(answer, Fault):
                test = await self._request(question._replace(jpeg=_test_image()))
                if isinstance(test, Fault):
                    raise ServerError(self._error_message(test))
            return answer

    async def _request(self, question: _Question) -> Answer | Fault:
        """Sends one request, with retries. Returns the answer, or why all attempts failed."""
        from openai import APIStatusError, OpenAIError

        url = "data:image/jpeg;base64," + base64.b64encode(question.jpeg).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question.prompt},
        ]
        messages: Any = [{"role": "user", "content": content}]
        try:
            response = await self._client.chat.completions.create(
                model=self.config.model,
                messages=messages,
                max_tokens=question.most,
                temperature=0,
                # `transformers serve` would use the checkpoint's setting without it
                frequency_penalty=0,
            )
            choice = response.choices[0]
            answer = Answer((choice.message.content or "").strip(), _finish(choice.finish_reason))
            if response.usage is not None:
                self.counts["prompt_tokens"] += response.usage.prompt_tokens
                self.counts["completion_tokens"] += response.usage.completion_tokens
        except APIStatusError as error:
            return Fault(
                error.status_code, self._clean(f"status {error.status_code}: {error.response.text}")
            )
        except OpenAIError as error:
            return Fault(0, self._clean(f"{type(error).__name__}: {error.__cause__ or error}"))
        # the package doesn't check the types in a response
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            return Fault(
                200,
                self._clean(f"the answer is no chat completion ({type(error).__name__}: {error})"),
            )
        return answer

    def _clean(self, text: str) -> str:
        """Returns the text as one short line without the key, which some servers repeat."""
        return " ".join((text.replace(self._key, "…") if self._key else text).split())[:_TEXT]

    def _error_message(self, fault: Fault) -> str:
        config = self.config
        server = f"caption.openai.base_url={config.base_url}, caption.openai.model={config.model}"
        resume = "Committed shards are kept; the same command continues from there."
        # the server's text is left out here: it may contain parts of the key
        if fault.status in (401, 403):
            problem = "contains one that the server refuses" if self._key else "is empty"
            return (
                f"{server}: the server refuses the key (status {fault.status}). The environment "
                f"variable {config.api_key_env} {problem}. Set it for every process and node. "
                f"{resume}"
            )
        if fault.status == 0:
            advice = (
                "Expected a server that can be reached from this machine: is it running, and is "
                "this its address, with /v1?"
            )
        elif fault.status == 429:
            advice = (
                f"Lower caption.openai.concurrency={config.concurrency}, or raise "
                f"caption.openai.tries={config.tries}."
            )
        elif fault.status == 200:
            advice = (
                "Expected OpenAI's chat completions: is this the address of such a server, with "
                "/v1?"
            )
        else:
            advice = (
                "Expected a model that accepts images, under the name that the server uses; see "
                "the server's log."
            )
        return (
            f"{server}: a request with a plain test image failed too: {fault.text} {advice} "
            f"{resume}"
        )


def _pair(coarse: Answer | Fault, fine: Answer | Fault) -> tuple[Answer, Answer] | Failed:
    if isinstance(coarse, Fault):
        return _failed(coarse)
    return _failed(fine) if isinstance(fine, Fault) else (coarse, fine)


def _failed(fault: Fault) -> Failed:
    return Failed("caption_failed", fault.text)


def _finish(reason: object) -> Finish:
    """Returns a response's `finish_reason`, "" for one that says nothing about the length."""
    if reason == "stop":
        return "stop"
    return "length" if reason == "length" else ""


@cache
def _test_image() -> bytes:
    """Returns a grey JPEG of 256 × 256 pixels, which any server should accept."""
    return encode_jpeg(np.full((256, 256, 3), 127, np.uint8), 95)


def _check(config: OpenAIConfig) -> None:
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

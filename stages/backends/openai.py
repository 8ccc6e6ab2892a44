"""Captions by a server that speaks OpenAI's chat completions: vLLM, SGLang, `transformers serve`.

Two requests a picture, greedy, `caption.openai.concurrency` of them at a time. The openai package
tries again what may pass (no connection, no answer in time, 408, 409, 429, 5xx), after growing
pauses or those that Retry-After asks for. Once a request has failed for good, a picture of our own
is asked about: where that is answered, the fault was the record's, and it alone fails; where it
isn't, it is the server's or the configuration's, and the run ends with ServerError.

The signature names the model as the server does. It can't see another checkpoint that goes by the
same name.
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
from stages.base import Failed
from stages.codec import encode_jpeg
from stages.record import Record

if TYPE_CHECKING:
    from stages.backends.weights import Weights

_CONNECT: Final = 10.0  # seconds, at most
_TEXT: Final = 400  # characters of a server's words that are kept: some answer with a page of HTML


class Fault(NamedTuple):
    """Why a request has no answer. status: of HTTP; 200 where the answer is none, 0 where nothing
    came back.
    """

    status: int
    text: str


class OpenAICaptioner:
    """Asks `config.model` on the server at `config.base_url`, with the key that the environment
    holds.
    """

    def __init__(self, config: OpenAIConfig, weights: Weights | None = None) -> None:
        from openai import AsyncOpenAI, Timeout

        _check(config)
        self.config = config
        self.counts: Counter[str] = Counter()
        self._key = os.environ.get(config.api_key_env, "")
        self._client = AsyncOpenAI(
            base_url=config.base_url,
            # most servers of one's own ask for no key, the package always does
            api_key=self._key or "none",
            max_retries=config.tries - 1,
            timeout=Timeout(config.timeout, connect=min(_CONNECT, config.timeout)),
        )
        # A loop of its own: connections stay open from call to call, and the caller may have a loop
        # (a notebook has).
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="openai", daemon=True).start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    @staticmethod
    def digests(config: OpenAIConfig) -> Mapping[str, str]:
        """None: what the server has loaded can't be seen from here."""
        _check(config)
        return {}

    @staticmethod
    def window(config: OpenAIConfig, batch_size: int) -> int:
        """Two requests a picture: enough to keep `concurrency` of them open most of the time."""
        return max(batch_size, config.concurrency)

    def caption(
        self, records: Sequence[Record], batch_size: int = 1
    ) -> list[tuple[str, str] | Failed]:
        """(coarse, fine) description of each record's image, or Failed(`caption_failed`). Raises
        ServerError.
        """
        return asyncio.run_coroutine_threadsafe(self._captions(records), self._loop).result()

    async def _captions(self, records: Sequence[Record]) -> list[tuple[str, str] | Failed]:
        slots = asyncio.Semaphore(self.config.concurrency)
        prompts = (self.config.prompt, self.config.face_prompt)
        asked = [
            asyncio.create_task(self._ask(r.image, prompt, slots))
            for r in records
            for prompt in prompts
        ]
        try:
            texts = await asyncio.gather(*asked)
        finally:
            for task in asked:
                # where the server is at fault, the others need not find out for themselves
                task.cancel()
        return [_pair(coarse, fine) for coarse, fine in zip(texts[::2], texts[1::2], strict=True)]

    async def _ask(self, jpeg: bytes, prompt: str, slots: asyncio.Semaphore) -> str | Fault:
        """The server's answer, or what was wrong with this request. Raises ServerError."""
        async with slots:
            answer = await self._request(jpeg, prompt)
            if isinstance(answer, Fault):
                trial = await self._request(_own_picture(), prompt)
                if isinstance(trial, Fault):
                    raise ServerError(self._complaint(trial))
            return answer

    async def _request(self, jpeg: bytes, prompt: str) -> str | Fault:
        from openai import APIStatusError, OpenAIError

        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": prompt},
        ]
        messages: Any = [{"role": "user", "content": content}]
        try:
            answer = await self._client.chat.completions.create(
                model=self.config.model,
                messages=messages,
                max_tokens=self.config.max_new_tokens,
                temperature=0,
                # said, since `transformers serve` else takes the checkpoint's own habit
                frequency_penalty=0,
            )
            text = (answer.choices[0].message.content or "").strip()
            if answer.usage is not None:
                self.counts["prompt_tokens"] += answer.usage.prompt_tokens
                self.counts["completion_tokens"] += answer.usage.completion_tokens
        except APIStatusError as error:
            return Fault(
                error.status_code, self._clean(f"status {error.status_code}: {error.response.text}")
            )
        except OpenAIError as error:
            return Fault(0, self._clean(f"{type(error).__name__}: {error.__cause__ or error}"))
        # the package doesn't check answers
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            return Fault(
                200,
                self._clean(f"the answer is no chat completion ({type(error).__name__}: {error})"),
            )
        return text

    def _clean(self, text: str) -> str:
        """In one line, cut, and without the key: some servers repeat it."""
        return " ".join((text.replace(self._key, "…") if self._key else text).split())[:_TEXT]

    def _complaint(self, fault: Fault) -> str:
        config = self.config
        given = f"caption.openai.base_url={config.base_url}, caption.openai.model={config.model}"
        then = "What was committed stays; the same command goes on from there."
        # in no words of the server's: they may hold parts of the key
        if fault.status in (401, 403):
            held = "holds one that it doesn't take" if self._key else "is empty"
            return (
                f"{given}: the server refuses the key (status {fault.status}). The environment "
                "variable "
                f"{config.api_key_env} {held}. Set it for every process and node. {then}"
            )
        if fault.status == 0:
            advice = (
                "Expected a server that answers from here: is it running, and is this its "
                "address, /v1 included?"
            )
        elif fault.status == 429:
            advice = (
                f"Lower caption.openai.concurrency={config.concurrency}, or raise "
                f"caption.openai.tries={config.tries}."
            )
        elif fault.status == 200:
            advice = (
                "Expected OpenAI's chat completions: is this the address of such a server, "
                "/v1 included?"
            )
        else:
            advice = (
                "Expected a model that takes pictures, under the name it is served by; see "
                "the server's log."
            )
        return (
            f"{given}: the server doesn't answer even a plain picture of our own: "
            f"{fault.text} {advice} {then}"
        )


def _pair(coarse: str | Fault, fine: str | Fault) -> tuple[str, str] | Failed:
    if isinstance(coarse, Fault):
        return Failed("caption_failed", coarse.text)
    if isinstance(fine, Fault):
        return Failed("caption_failed", fine.text)
    return coarse, fine


@cache
def _own_picture() -> bytes:
    """Grey, 256²: nothing that a server could dislike about it."""
    return encode_jpeg(np.full((256, 256, 3), 127, np.uint8), 95)


def _check(config: OpenAIConfig) -> None:
    for name, example in (
        ("base_url", "http://127.0.0.1:8000/v1"),
        ("model", "llava-hf/llava-1.5-7b-hf"),
    ):
        if not getattr(config, name):
            raise ConfigError(
                f"caption.openai.{name} is empty, and caption.backend=openai needs one, such as "
                f"{example}."
            )

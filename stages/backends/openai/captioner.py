"""The captioner: two questions for each image, and the second tries."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from configs.captions import OpenAIConfig
from configs.schema import ResizeConfig
from stages.backends import views
from stages.backends.openai import messages, preflight
from stages.backends.openai.client import Completion, Fault
from stages.backends.openai.loop import LoopThread
from stages.backends.openai.questions import KINDS, question
from stages.backends.openai.servers import Servers
from stages.backends.protocols import Answer, Kind
from stages.base import Failed
from stages.record import Record

if TYPE_CHECKING:
    from stages.backends.weights import Weights

# Images of a call for each request that may be open. At the end of a call slots are empty; with
# two requests an image, and a spread of 0.5 to 1.5 around the mean latency, 95 to 97 % are busy.
_IMAGES: Final = 8


class OpenAICaptioner:
    """A captioner that asks `config.model` on the servers at `config.base_url`."""

    independent = True

    def __init__(self, config: OpenAIConfig, weights: Weights | None = None) -> None:
        messages.check(config)
        self.config = config
        self._servers = Servers(config, ResizeConfig().largest)
        self._loop = LoopThread(self._servers.close)
        weakref.finalize(self, self._loop.stop).atexit = False  # LoopThread does that
        self._is_useless: Callable[[Answer], bool] = lambda answer: False
        self._second_tries: dict[tuple[str, Kind], Answer | Fault] = {}

    @property
    def counts(self) -> Counter[str]:
        """Tokens of prompts and answers."""
        return self._servers.counts

    @staticmethod
    def digests(config: OpenAIConfig) -> Mapping[str, str]:
        """Returns the model's root if it isn't the model's name: `config.root`, else what the
        servers state. Raises ConfigError if the base URL or the model is empty, ServerError if no
        server answers or they state different roots.
        """
        messages.check(config)
        root = config.root or preflight.stated_root(config)
        return {} if root == config.model else {"root": root}

    @staticmethod
    def window(config: OpenAIConfig, batch_size: int) -> int:
        """Returns enough images to keep `concurrency` requests open most of the time."""
        return max(batch_size, _IMAGES * config.concurrency)

    @staticmethod
    def preflight(config: OpenAIConfig, largest: tuple[int, int]) -> None:
        """Raises ServerError if the servers don't fit. largest: short and long side of the run's
        largest image, pixels.
        """
        messages.check(config)
        preflight.check(config, largest)

    def prepare(
        self, largest: tuple[int, int], is_useless: Callable[[Answer], bool] | None
    ) -> None:
        """Sets what the captioner knows of the run. largest: sides of its largest image, pixels.
        is_useless: which answers need a second try; `caption` then asks for these while other
        requests are open, and `retry` returns them.
        """
        self._servers.largest = largest
        if is_useless is not None:
            self._is_useless = is_useless

    def caption(
        self, records: Sequence[Record], batch_size: int = 1
    ) -> list[tuple[Answer, Answer] | Failed]:
        """Returns the answers to both prompts for each record, or Failed("caption_failed"). Raises
        ServerError if no server processes a plain picture either.
        """
        asked = [(record, kind) for record in records for kind in KINDS]
        self._second_tries.clear()
        answers = self._loop.run(self._answers(asked, second=False))
        return [_pair(*pair) for pair in zip(answers[::2], answers[1::2], strict=True)]

    def retry(
        self, records: Sequence[Record], kinds: Sequence[Kind], batch_size: int = 1
    ) -> list[Answer | Failed]:
        """Returns the answer to the second try of that kind for each record; the rest is as in
        `caption`.
        """
        asked = list(zip(records, kinds, strict=True))
        tries = self._second_tries
        missing = [each for each in asked if _id(*each) not in tries]
        answers = self._loop.run(self._answers(missing, second=True))
        tries |= {_id(*each): answer for each, answer in zip(missing, answers, strict=True)}
        results = [tries[_id(*each)] for each in asked]
        return [_failed(a) if isinstance(a, Fault) else a for a in results]

    async def _answers(
        self, asked: Sequence[tuple[Record, Kind]], *, second: bool
    ) -> list[Answer | Fault]:
        """Returns the answers in order. second: to the second tries."""
        slots = asyncio.Semaphore(self.config.concurrency)

        async def answer(record: Record, kind: Kind, *, second: bool) -> Answer | Fault:
            async with slots:
                shown = await asyncio.to_thread(_shown, self.config, record, kind)
                asked = question(self.config, shown, kind, second=second)
                reply = await self._servers.ask(asked)
            return reply.answer if isinstance(reply, Completion) else reply

        async def first_and_second(record: Record, kind: Kind) -> Answer | Fault:
            first = await answer(record, kind, second=second)
            if not second and isinstance(first, Answer) and self._is_useless(first):
                again = await answer(record, kind, second=True)
                self._second_tries[_id(record, kind)] = again
            return first

        tasks = [asyncio.create_task(first_and_second(*each)) for each in asked]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # after a ServerError, the other requests are pointless


def _shown(config: OpenAIConfig, record: Record, kind: Kind) -> tuple[bytes, ...]:
    """Returns the JPEGs that are sent for the caption of this kind: one or two."""
    return views.jpegs(record, kind, config.pad_to_square, config.face_view_below)


def _id(record: Record, kind: Kind) -> tuple[str, Kind]:
    return record.key, kind


def _pair(coarse: Answer | Fault, fine: Answer | Fault) -> tuple[Answer, Answer] | Failed:
    if isinstance(coarse, Fault):
        return _failed(coarse)
    return _failed(fine) if isinstance(fine, Fault) else (coarse, fine)


def _failed(fault: Fault) -> Failed:
    return Failed("caption_failed", fault.text)

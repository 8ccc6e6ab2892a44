"""Which server is asked.

A request goes to the server with the fewest open ones in proportion to its share. If a server
can't answer it and another one can, the first is left out. It is asked about a plain picture after
growing pauses, and comes back when it answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

from configs.captions import OpenAIConfig
from configs.errors import ServerError
from stages.backends.openai import messages
from stages.backends.openai.client import Client, Completion, Fault, Model
from stages.backends.openai.models import common_root
from stages.backends.openai.questions import Question, plain_pictures, question
from stages.backends.protocols import Kind

logger = logging.getLogger(__name__)

# seconds before a server that was left out is asked again; doubled each time
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0


class Servers:
    """The servers of `config.base_url`. One that is given several times gets that many shares of
    the requests. Its coroutines must run in one event loop.

    counts: of tokens. largest: short and long side of the run's largest image, pixels.
    """

    def __init__(self, config: OpenAIConfig, largest: tuple[int, int]) -> None:
        self.config, self.largest = config, largest
        self.counts: Counter[str] = Counter()
        shares = Counter(config.base_urls)
        self.clients = [Client(url, config, self.counts, n) for url, n in shares.items()]
        self._out: dict[Client, asyncio.Task[None]] = {}
        self._pauses: dict[Client, float] = {}

    async def ask(self, question: Question) -> Completion | Fault:
        """Returns the answer, or the fault if it is the question's: the same server answers one
        with a plain picture. Raises ServerError if no server does.
        """
        faults: dict[Client, Fault] = {}
        guilty: dict[Client, Fault] = {}
        while client := self._least_busy(faults):
            reply = await client.complete(question, patient=self._is_last(client, faults))
            if not isinstance(reply, Fault):
                self._return(client)
                self._pauses.pop(client, None)
                failed = {c: fault for c, fault in faults.items() if fault.is_servers}
                self._leave(failed | guilty)
                return reply
            faults[client] = reply
            if reply.is_temporary and self._least_busy(faults):
                continue
            for tested in [c for c in reversed(faults) if c not in guilty]:
                test = await tested.complete(self.plain(question))
                if not isinstance(test, Fault):
                    self._return(tested)
                    self._leave(guilty)
                    return reply
                guilty[tested] = test
        raise ServerError(
            messages.no_answer(self.config, {c.url: fault for c, fault in guilty.items()})
        )

    def plain(self, question: Question) -> Question:
        """Returns the question with as many plain pictures of the run's largest size."""
        kind: Kind = 1 if len(question.jpegs) > 1 else 0  # only a face caption has two
        return question._replace(jpegs=plain_pictures(self.config, self.largest, kind))

    async def lists(self) -> dict[str, tuple[Model, ...] | Fault]:
        """Returns the models that each server lists, by URL."""
        return await _lists(self.clients)

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self.clients))

    def _in_rotation(self, without: Collection[Client] = ()) -> list[Client]:
        return [c for c in self.clients if c not in self._out and c not in without]

    def _least_busy(self, without: Collection[Client]) -> Client | None:
        """Returns the server to ask next, one that was left out only if there is no other."""
        rest = [client for client in self.clients if client not in without]
        candidates = self._in_rotation(without) or rest
        return min(candidates, key=lambda c: (c.open / c.share, c.asked / c.share), default=None)

    def _is_last(self, client: Client, failed: Collection[Client]) -> bool:
        """Returns whether no other server should be asked before this one is asked again."""
        tried = {*failed, client}
        if client in self._out:
            return tried.issuperset(self.clients)
        return not self._in_rotation(tried)

    def _leave(self, faults: Mapping[Client, Fault]) -> None:
        """Leaves servers out, since another one gave an answer."""
        for client, fault in faults.items():
            if client not in self._out:
                logger.warning("caption server %s is left out: %s", client.url, fault.text)
                self._out[client] = asyncio.create_task(self._wait_for(client))

    def _return(self, client: Client) -> None:
        """Takes a server that was left out into the rotation again."""
        task = self._out.pop(client, None)
        if task is not None:
            logger.warning("caption server %s answers again", client.url)
            if task is not asyncio.current_task():
                task.cancel()

    async def _wait_for(self, client: Client) -> None:
        """Asks a server after growing pauses until it answers. The pauses go on growing if it is
        left out again before it has answered another question.
        """
        while client in self._out:
            pause = self._pauses.get(client, FIRST_PAUSE)
            self._pauses[client] = min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause)
            if await self._fits(client):
                self._return(client)

    async def _fits(self, client: Client) -> bool:
        """Returns whether a server answers, and has the same checkpoint as the others."""
        config = self.config
        plain = question(config, plain_pictures(config, self.largest, 0), 0)
        if isinstance(await client.complete(plain, patient=False), Fault):
            return False
        lists = await _lists([client, *self._in_rotation()])
        try:
            common_root(config, {url: m for url, m in lists.items() if not isinstance(m, Fault)})
        except ServerError as error:
            logger.warning("caption server %s stays left out: %s", client.url, error)
            return False
        return True


async def _lists(clients: Collection[Client]) -> dict[str, tuple[Model, ...] | Fault]:
    lists = await asyncio.gather(*(client.models() for client in clients))
    return {client.url: models for client, models in zip(clients, lists, strict=True)}

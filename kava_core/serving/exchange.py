"""A request and its answers, from the engine's thread to the client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kava_core.serving.bodies import Refusal, too_late
from kava_core.serving.engine import Engine, Job, Piece
from kava_core.serving.replies import Reply

GONE = 499  # the status, among the meters, of a client that went away; nobody reads it
_STALLED = 5.0  # seconds, beyond its time, that a client gets to read the end of its stream


class Exchange:
    """The jobs of one request, and their pieces as they come.

    began: when it arrived, by the monotonic clock; seconds: how long it may take.
    """

    def __init__(self, engine: Engine, reply: Reply, began: float, seconds: float) -> None:
        self.engine, self.reply = engine, reply
        self.began, self.seconds = began, seconds
        self.jobs: list[Job] = []
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def add(self, **about: Any) -> None:
        """One more job; about: the fields of `Job`, but who is told."""
        index = len(self.jobs)

        def tell(piece: Piece) -> None:
            with suppress(RuntimeError):  # of a loop that was closed by force
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        self.jobs.append(Job(tell=tell, **about))

    @property
    def left(self) -> float:
        """Seconds that it may still take."""
        return self.began + self.seconds - time.monotonic()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Which choice, and its piece, until all have ended; Refusal where one does not."""
        running = len(self.jobs)
        while running:
            try:
                async with asyncio.timeout(self.left):
                    index, piece = await self._pieces.get()
            except TimeoutError:
                raise too_late(self.seconds) from None
            if piece.finish == "error":
                raise Refusal(
                    "the model failed, and the server's log says why.",
                    status=500,
                    kind="server_error",
                )
            running -= piece.finish is not None
            yield index, piece

    async def collected(self) -> list[tuple[str, Piece]]:
        """The text of each choice, and its last piece."""
        texts, last = [""] * len(self.jobs), [Piece("")] * len(self.jobs)
        async for index, piece in self.pieces():
            texts[index] += piece.text
            last[index] = piece
        return list(zip(texts, last, strict=True))

    def close(self) -> None:
        """Free the places of those that have not ended."""
        self.engine.cancel(self.jobs)


class Stream(StreamingResponse):
    """Server-sent events; whatever ends them frees the places of the jobs.

    usage: whether a last chunk tells it; done: told the status, once.
    """

    def __init__(self, exchange: Exchange, usage: bool, done: Callable[[int], None]) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)
        self.exchange, self.usage, self.done = exchange, usage, done
        self._status = GONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(TimeoutError):  # of a client that does not read
                async with asyncio.timeout(self.exchange.left + _STALLED):
                    await super().__call__(scope, receive, send)
        finally:
            self.exchange.close()
            self.done(self._status)

    async def _events(self) -> AsyncIterator[str]:
        reply = self.exchange.reply
        last: list[Piece] = []
        try:
            for index in range(len(self.exchange.jobs)):
                begun = reply.begin(index)
                if begun is not None:
                    yield _event(begun)
            async for index, piece in self.exchange.pieces():
                yield _event(reply.chunk(index, piece))
                if piece.finish is not None:
                    last.append(piece)
        except Refusal as refusal:
            self._status = refusal.status
            yield _event(refusal.object)
        else:
            if self.usage:
                yield _event(reply.end(last))
            self._status = 200
        yield "data: [DONE]\n\n"


def _event(found: Mapping[str, object]) -> str:
    return f"data: {json.dumps(found, ensure_ascii=False, separators=(',', ':'))}\n\n"

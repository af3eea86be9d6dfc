"""Bytes of an object at an http(s) address: those that are asked for, whatever a server sends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import ClientResponse

CHUNK = 1 << 18
OK, PARTIAL, BEYOND_ITS_END = 200, 206, 416


class Body:
    """The object at `address`, read from its beginning on. A server that knows no ranges sends all
    of it: that answer is then read on, piece by piece. filesystem: fsspec's for http."""

    def __init__(self, filesystem: Any, address: str) -> None:
        self._filesystem = filesystem
        self._address = address
        self._whole: tuple[ClientResponse, int] | None = None  # and how far it was read

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), or as many of them as come."""
        from fsspec.asyn import sync

        return bytes(sync(self._filesystem.loop, self._read, start, stop))

    def close(self) -> None:
        """Hear no more of an answer that was not read to its end."""
        if self._whole is not None:
            self._filesystem.loop.call_soon_threadsafe(self._whole[0].release)

    async def _read(self, start: int, stop: int) -> bytearray:
        answer, at = self._whole or await self._asked(start, stop)
        self._whole, content = None, bytearray()
        try:
            while at < stop:
                chunk = await answer.content.read(min(CHUNK, stop - at))
                if not chunk:
                    break
                content += chunk[max(0, start - at) :]
                at += len(chunk)
            if at == stop and answer.status == OK:
                self._whole = answer, at
            return content
        finally:
            if self._whole is None:
                answer.release()

    async def _asked(self, start: int, stop: int) -> tuple[ClientResponse, int]:
        """The answer, and where it begins."""
        options = {**self._filesystem.kwargs}
        options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
        session = await self._filesystem.set_session()
        address = self._filesystem.encode_url(self._address)
        answer: ClientResponse = await session.get(address, **options)
        if answer.status == BEYOND_ITS_END:
            return answer, stop
        answer.raise_for_status()
        return answer, start if answer.status == PARTIAL else 0

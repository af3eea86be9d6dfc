"""The server: OpenAI's endpoints before an engine.

Every refusal is OpenAI's error object, and names the field that it is about. Nothing is read of a
request that is larger than allowed, and nothing of one is kept after it: a client that goes away,
or whose time is over, leaves the queue and the batch.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kava_core.errors import KavaError
from kava_core.serving.bodies import STOPPED, Chat, Completion, Refusal, read_body, too_late
from kava_core.serving.engine import Engine, Full
from kava_core.serving.exchange import GONE, Exchange, Stream
from kava_core.serving.meters import Meters
from kava_core.serving.replies import Reply
from kava_core.serving.served import Served
from kava_core.serving.text import Text


@dataclass(frozen=True)
class Limits:
    """max_batch: answers that are written together; queue: those that wait until one of these has
    ended; max_tokens: of an answer; timeout: seconds of a request; max_body: bytes of one."""

    max_batch: int = 32
    queue: int = 128
    max_tokens: int = 256
    timeout: float = 60.0
    max_body: int = 256_000


def build(
    served: Served,
    limits: Limits,
    token: str | None = None,
    hosts: Sequence[str] | None = None,
) -> Starlette:
    """The application that serves one model.

    token: what requests have to bear, None for nothing; hosts: the names under which it may be
    asked for, so that a page in a browser cannot reach it by a name that it made up; None: any.
    """
    return _Server(served, limits, token).app(hosts)


class _Server:
    def __init__(self, served: Served, limits: Limits, token: str | None) -> None:
        self.served, self.limits = served, limits
        self.token = None if token is None else token.encode()
        self.meters = Meters()
        self.engine = Engine(served, self.meters, max_batch=limits.max_batch, queue=limits.queue)
        self.created = int(time.time())

    def app(self, hosts: Sequence[str] | None) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completion, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            middleware=[] if hosts is None else [Middleware(_Hosts, hosts)],
            exception_handlers={HTTPException: _unknown},
            lifespan=self._life,
        )

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            self.engine.stop()

    # --- endpoints ------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def models(self, request: Request) -> Response:
        return self._allowed(request) or JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        refused = self._allowed(request)
        if refused is not None:
            return refused
        try:
            self._named(request.path_params["name"])
        except Refusal as refusal:
            return _refused(refusal)
        return JSONResponse(self._about())

    async def health(self, _: Request) -> Response:
        alive = self.engine.alive
        about = {
            "status": "ok" if alive else "failed",
            "model": self.served.name,
            "running": self.engine.running,
            "waiting": self.engine.waiting,
        }
        return JSONResponse(about, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        return self._allowed(request) or Response(
            generate_latest(self.meters.registry), media_type=CONTENT_TYPE_LATEST
        )

    def _about(self) -> dict[str, object]:
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kava",
            "kind": self.served.kind,
            "latents": self.served.system.config.latents,
            "max_tokens": self.limits.max_tokens,
        }

    # --- a question, from its body to its answer ------------------------------------------------

    async def _answer(self, request: Request, kind: type[Chat] | type[Completion]) -> Response:
        """Refused, whole, or a stream; counted."""
        began, endpoint = time.monotonic(), request.url.path

        def done(status: int) -> None:
            self.meters.requests.labels(endpoint, status).inc()
            self.meters.seconds.labels(endpoint).observe(time.monotonic() - began)

        try:
            refused = self._allowed(request)
            if refused is not None:
                response = refused
            else:
                async with asyncio.timeout(self.limits.timeout):
                    body = await self._body(request)
                    asked = read_body(kind, body)
                    exchange = self._exchange(asked, began)
                    if asked.stream:
                        return Stream(exchange, asked.usage_asked, done)
                    response = await self._whole(request, exchange)
        except Refusal as refusal:
            response = _refused(refusal)
        except TimeoutError:
            response = _refused(too_late(self.limits.timeout))
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except asyncio.CancelledError:  # the server is stopped at once
            response = _refused(STOPPED)
        done(response.status_code)
        return response

    def _allowed(self, request: Request) -> Response | None:
        """The answer to who may not ask."""
        given = request.headers.get("authorization", "")
        scheme, _, secret = given.partition(" ")
        if self.token is None or (
            scheme.lower() == "bearer" and hmac.compare_digest(secret.strip().encode(), self.token)
        ):
            return None
        return _refused(
            Refusal(
                "expected the server's token as `Authorization: Bearer TOKEN`, found "
                + ("another." if given else "none."),
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        )

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also what a page elsewhere cannot send unasked
            raise Refusal(
                f"expected a body of type application/json, found {kind or 'none'!r}.", status=415
            )
        most = self.limits.max_body
        too_large = Refusal(f"expected a body of at most {most} bytes, found more.", status=413)
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
        return bytes(body)

    def _exchange(self, asked: Chat | Completion, began: float) -> Exchange:
        """The request's jobs, queued."""
        self._named(asked.model, "model")
        ids = self._ids(asked)
        limits = [self._limit(asked, row) for row in ids]
        copies = asked.n or 1
        places = self.limits.max_batch + self.limits.queue
        if len(ids) * copies > places:
            raise Refusal(
                f"{'prompt' if len(ids) > 1 else 'n'}: expected at most {places} "
                f"answers to a request, found {len(ids) * copies}. Ask in several requests.",
                param="prompt" if len(ids) > 1 else "n",
            )
        reply = Reply(
            isinstance(asked, Chat),
            self.served.name,
            self.served.system.config.latents,
            sum(map(len, ids)),
        )
        exchange = Exchange(self.engine, reply, began, self.limits.timeout)
        for row, most in zip(ids, limits, strict=True):
            for copy in range(copies):
                exchange.add(
                    ids=row,
                    max_tokens=most,
                    text=Text(self.served.encoder.tokenizer, asked.stop),
                    temperature=asked.temperature or 0.0,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    seed=None if asked.seed is None else asked.seed + copy,
                    stream=bool(asked.stream),
                )
        try:
            self.engine.submit(exchange.jobs)
        except Full:
            raise Refusal(
                f"expected {len(exchange.jobs)} free places of {places}, found fewer: others' "
                "answers are being written or wait. Try again in a second.",
                status=429,
                code="queue_full",
                kind="rate_limit_error",
                headers={"Retry-After": "1"},
            ) from None
        return exchange

    def _named(self, name: str, param: str | None = None) -> None:
        if name != self.served.name:
            raise Refusal(
                f"model: expected {self.served.name!r}, found {name[:60]!r}.",
                status=404,
                param=param,
                code="model_not_found",
            )

    def _ids(self, asked: Chat | Completion) -> list[list[int]]:
        """The token ids of each question, as `kava ask` puts it."""
        field = "messages[0].content" if isinstance(asked, Chat) else "prompt"
        size = self.served.system.decoder.config.get_text_config().vocab_size
        found = []
        for question in asked.questions:
            if isinstance(question, list):
                if not all(0 <= i < size for i in question):
                    raise Refusal(
                        f"{field}: expected token ids below {size}, found another.", param=field
                    )
                found.append(question)
                continue
            if not question.strip():
                raise Refusal(f"{field}: expected a question, found nothing.", param=field)
            try:
                found += self.served.encoder.encode_questions([question])
            except KavaError as error:
                raise Refusal(f"{field}: {error}", param=field) from None
        return found

    def _limit(self, asked: Chat | Completion, ids: list[int]) -> int:
        """Most tokens of an answer; Refusal where the model's context is too short."""
        field, wanted = asked.longest
        most, room = self.limits.max_tokens, self.served.room
        if wanted is not None and wanted > most:
            raise Refusal(f"{field}: expected at most {most}, found {wanted}.", param=field)
        if room is None:
            return wanted or most
        left = room - len(ids)
        if left < 1 or (wanted is not None and wanted > left):
            question = "messages" if isinstance(asked, Chat) else "prompt"
            param = question if left < 1 else field
            raise Refusal(
                f"{param}: the question has {len(ids)} tokens"
                + (f" and the answer may have {wanted}" if wanted is not None else "")
                + f", expected at most {room} together with the answer: the model's context, less "
                "its latents and answer prompt.",
                param=param,
                code="context_length_exceeded",
            )
        return min(wanted or most, left)

    async def _whole(self, request: Request, exchange: Exchange) -> Response:
        """The answer at once, unless the client goes away before."""
        collecting = asyncio.ensure_future(exchange.collected())
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=GONE)
            return JSONResponse(exchange.reply.whole(collecting.result()))
        finally:
            collecting.cancel()
            leaving.cancel()
            exchange.close()


class _Hosts:
    """Lets in those who ask for the server by one of its names, with a port or without."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app, self.names = app, list(dict.fromkeys(names))
        named = "|".join(map(re.escape, self.names))
        self.known = re.compile(rf"({named})(:\d+)?", re.IGNORECASE | re.ASCII)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = Headers(scope=scope).get("host", "") if scope["type"] == "http" else None
        if found is None or self.known.fullmatch(found):
            await self.app(scope, receive, send)
            return
        message = f"expected {', '.join(self.names)} as Host, found {found[:60]!r}."
        await _refused(Refusal(message, code="unknown_host"))(scope, receive, send)


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.object, refusal.status, refusal.headers)


async def _gone(request: Request) -> None:
    """Returns when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unknown(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    return _refused(Refusal(message, status=error.status_code, headers=dict(error.headers or {})))

"""Bind, load, serve, and stop in good order."""

from __future__ import annotations

import ipaddress
import logging
import socket
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from kava_core.console import say
from kava_core.errors import KavaError
from kava_core.serving.app import Limits, build
from kava_core.serving.batch import Batch
from kava_core.serving.engine import Job
from kava_core.serving.served import Served, open_served
from kava_core.serving.text import Text


def serve(
    folder: Path, *, base: str | None, host: str, port: int, limits: Limits, token: str | None
) -> None:
    """Serve the student or teacher in `folder` until SIGTERM or SIGINT.

    Then nothing new is accepted, what was accepted is answered, and it returns; a second SIGINT
    does not wait for answers, and what it raises says how many requests got none. base: as
    `open_served` takes it. port: 0 for any that is free. KavaError if the place is taken, or the
    folder holds no such model.
    """
    with _bound(host, port) as place:
        served = open_served(folder, base)
        _warm_up(served)
        _listen(place, host, port)
        at, port, *_ = place.getsockname()
        local = ipaddress.ip_address(at).is_loopback
        shown = f"[{host}]" if ":" in host else host
        server = _Server(
            uvicorn.Config(
                build(
                    served,
                    limits,
                    token,
                    hosts=("localhost", "127.0.0.1", "[::1]", shown) if local else None,
                ),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                # No request takes longer, but for what a slow client has still to read.
                timeout_graceful_shutdown=round(limits.timeout) + 10,
            )
        )
        if not local and token is None:
            say(f"anyone who reaches {shown} may ask: KAVA_SERVE_TOKEN is not set")
        say(f"serving {served.name}, {served.about}, at http://{shown}:{port}/v1")
        try:
            server.run(sockets=[place])
        except (SystemExit, KeyboardInterrupt):
            if not server.should_exit:
                raise
        if server.force_exit:  # whether or not the second SIGINT came out of the event loop
            interrupted = KeyboardInterrupt()
            interrupted.add_note(f"requests that got no answer: {server.lost}")
            raise interrupted
        say("stopped; what was asked before was answered")


class _Server(uvicorn.Server):
    """lost: how many requests were being answered when a second SIGINT came."""

    lost = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:
            self.lost = max(self.lost, len(self.server_state.tasks))
            # It would print a traceback for each request, and one for itself.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def _bound(host: str, port: int) -> socket.socket:
    """A socket of that address, which nobody can reach yet."""
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise KavaError(
            f"expected a name or an address of this machine as --host, found {host!r} "
            f"({error.strerror}). Leave it out for 127.0.0.1."
        ) from None
    place = socket.socket(family, kind)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
    except OSError as error:
        place.close()
        raise _taken(host, port, error) from None
    return place


def _listen(place: socket.socket, host: str, port: int) -> None:
    try:
        place.listen(2048)
    except OSError as error:
        raise _taken(host, port, error) from None


def _taken(host: str, port: int, error: OSError) -> KavaError:
    return KavaError(
        f"port {port} of {host} cannot be served from ({error.strerror}). Choose another with "
        "--port, or 0 for any that is free."
    )


def _warm_up(served: Served) -> None:
    """A model's first calls, and a tokenizer's, are slow."""
    (ids,) = served.encoder.encode_questions(["How many?"])
    text = Text(served.encoder.tokenizer)
    batch = Batch(served.system)
    batch.admit([Job(ids, 2, text, tell=lambda _: None)])
    for token in batch.step():
        text.add(token)
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""A web server for the files of a folder, as slow and as faulty as object storage can be.

    python benchmarks/object_server.py FOLDER --rate 200 --latency 20

serves FOLDER on a free port of this machine, which it prints, at 200 MB/s for all connections
together and 20 ms before each answer, until its standard input ends. `benchmarks/remote_read.py`
measures with it, and the tests put faults into it.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

CHUNK = 1 << 18
RANGE = re.compile(r"bytes=(\d+)-(\d*)")

# What may go wrong with an answer: given the file's name and how often it was asked for, one of
# `500`, `403` (or any other status), `silent` (no answer for a while), `short` (fewer bytes than
# asked for, in good order), `cut` (the connection ends in the middle), `whole` (ranges are not
# known), `flip` (a wrong byte); None for nothing.
Fault = Callable[[str, int], str | None]


class ObjectServer(ThreadingHTTPServer):
    """rate: bytes per second over all connections, None for no limit. latency: seconds before an
    answer begins. asked: how often each file was asked for; paths: every address, as it came."""

    daemon_threads = True

    def __init__(
        self,
        folder: Path,
        *,
        rate: float | None = None,
        latency: float = 0.0,
        fault: Fault = lambda _, __: None,
        silence: float = 2.0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder.resolve()
        self.rate, self.latency, self.fault, self.silence = rate, latency, fault, silence
        self.asked: Counter[str] = Counter()
        self.paths: list[str] = []
        self._lock = threading.Lock()
        self._free_at = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        """How often a file was asked for, with this time."""
        with self._lock:
            self.asked[name] += 1
            return self.asked[name]

    def wait_for_line(self, length: int) -> None:
        """Until so many more bytes have gone through the line that all connections share."""
        if self.rate is None:
            return
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + length / self.rate
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))

    @contextmanager
    def running(self) -> Iterator[ObjectServer]:
        """Serve in a thread while in this context."""
        thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that end early are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ObjectServer

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        server, path = self.server, urlsplit(self.path).path
        server.paths.append(self.path)
        file = (server.folder / path.lstrip("/")).resolve()
        fault = server.fault(file.name, server.count(file.name)) if body else None
        time.sleep(server.latency)
        if fault == "silent":
            time.sleep(server.silence)
            self.close_connection = True
            return None
        if fault is not None and fault.isdigit():
            return self._status(int(fault))
        if not file.is_relative_to(server.folder) or not file.is_file():
            return self._status(404)
        size = file.stat().st_size
        start, stop, asked = self._range(size)
        if fault == "whole":
            start, stop, asked = 0, size, False
        promised = (stop - start) // 2 if fault == "short" else stop - start
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(promised))
        if fault != "whole":
            self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if not body:
            return None
        sent = promised // 2 if fault == "cut" else promised
        self._send(file, start, sent, flip=fault == "flip")
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return None

    def _range(self, size: int) -> tuple[int, int, bool]:
        match = RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None:
            return 0, size, False
        start = int(match[1])
        stop = int(match[2]) + 1 if match[2] else size
        return start, min(stop, size), True

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: Path, start: int, length: int, *, flip: bool) -> None:
        with file.open("rb") as opened:
            opened.seek(start)
            while length:
                chunk = opened.read(min(CHUNK, length))
                length -= len(chunk)
                if flip:
                    chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
                self.server.wait_for_line(len(chunk))
                self.wfile.write(chunk)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, default=None, help="MB/s of all connections")
    parser.add_argument("--latency", type=float, default=0.0, help="ms before each answer")
    arguments = parser.parse_args()
    rate = None if arguments.rate is None else arguments.rate * 1e6
    server = ObjectServer(arguments.folder, rate=rate, latency=arguments.latency / 1e3)
    with server.running():
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

"""An S3 service on this machine (moto's), with faults put into its answers."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

# Method, key and how often it was asked for → `500`, `503`, `403`, `silent`, `short`, `cut`, or an
# S3 error code; None for nothing.
Fault = Callable[[str, str, int], str | None]
SILENCE = 2.0
# Those that S3 sends with the code.
STATUS = {
    "XMinioStorageFull": "507",
    "RequestTimeout": "400",
    "IncompleteBody": "400",
    "BadDigest": "400",
    "NoSuchUpload": "404",
}


class S3:
    """asked: (method, key) → how often. unchecked: keys that came without a checksum."""

    def __init__(self) -> None:
        self.backend = DomainDispatcherApplication(create_backend_app)
        self.fault: Fault = lambda _method, _key, _n: None
        self.asked: Counter[tuple[str, str]] = Counter()
        self.unchecked: list[str] = []
        self.port = 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].rpartition("/")[2]
        self.asked[method, key] += 1
        if method == "PUT" and "HTTP_X_AMZ_CHECKSUM_CRC32" not in environ:
            self.unchecked.append(key)
        fault = self.fault(method, key, self.asked[method, key])
        if fault is None:
            return self.backend(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault == "silent":
            time.sleep(SILENCE)
        if fault in ("short", "cut"):
            return self._damaged(environ, start, fault)
        status = fault if fault.isdigit() else STATUS.get(fault, "500")
        body = f"<Error><Code>{fault}</Code><Message>me:hunter2</Message></Error>".encode()
        start(f"{status} Fault", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def _damaged(
        self, environ: dict[str, Any], start: Callable[..., Any], fault: str
    ) -> Iterable[bytes]:
        kept: list[Any] = []
        body = b"".join(self.backend(environ, lambda *answer: kept.append(answer)))
        status, headers, *_ = kept[0]
        half = body[: len(body) // 2]
        if fault == "short":
            headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
            headers.append(("Content-Length", str(len(half))))
        start(status, headers)
        return [half]

    @contextmanager
    def running(self) -> Iterator[S3]:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = make_server("127.0.0.1", 0, self, threaded=True)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

"""What gcsfs asks of Google Cloud Storage, on this machine, with faults put into its answers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Method, key and how often it was asked for → a status, or None for nothing.
Fault = Callable[[str, str, int], int | None]


class GCS(ThreadingHTTPServer):
    """One bucket, called `bucket`. asked: (method, key) → how often."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.generations: Counter[str] = Counter()
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.fault: Fault = lambda _method, _key, _n: None
        self.asked: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def running(self) -> Iterator[GCS]:
        thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()

    def put(self, key: str, content: bytes) -> dict[str, Any]:
        self.objects[key] = content
        self.generations[key] += 1
        return self.about(key)

    def about(self, key: str) -> dict[str, Any]:
        digest = base64.b64encode(hashlib.md5(self.objects[key]).digest()).decode()
        generation = str(self.generations[key])
        size = str(len(self.objects[key]))
        return {"name": key, "size": size, "md5Hash": digest, "generation": generation}


class _Handler(BaseHTTPRequestHandler):
    server: GCS
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """A test that fails says more."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path.startswith("/upload/"):
            self._upload(body, query)
            return
        key = unquote(parts.path.partition("/o/")[2])
        if self._failed(method, key):
            return
        if not key:
            self._list(query)
        elif key not in self.server.objects:
            self._reply(404, {})
        elif method == "DELETE":
            del self.server.objects[key]
            self._reply(204, None)
        elif "/download/" in parts.path or query.get("alt") == "media":
            self._content(self.server.objects[key])
        else:
            self._reply(200, self.server.about(key))

    def _list(self, query: dict[str, str]) -> None:
        prefix = query.get("prefix", "")
        below = [key for key in sorted(self.server.objects) if key.startswith(prefix)]
        items = [key for key in below if "/" not in key.removeprefix(prefix)]
        folders = {prefix + key.removeprefix(prefix).split("/")[0] + "/" for key in below}
        found = {"items": [self.server.about(key) for key in items]}
        inner = sorted(folders - {f"{key}/" for key in items})
        self._reply(200, {**found, "prefixes": inner})

    def _upload(self, body: bytes, query: dict[str, str]) -> None:
        if query["uploadType"] == "multipart":
            _, about, content = body.split(b"--==0==", 2)
            key = json.loads(about.partition(b"\n\n")[2])["name"]
            if not self._failed("PUT", key):
                content = content.partition(b"\n\n")[2].removesuffix(b"\n--==0==--")
                self._reply(200, self.server.put(key, content))
        elif "upload_id" not in query:
            name = str(len(self.server.uploads))
            self.server.uploads[name] = json.loads(body)["name"], b""
            place = f"http://{self.headers['Host']}/upload/x?uploadType=resumable&upload_id={name}"
            self._reply(200, {}, Location=place)
        else:
            key, before = self.server.uploads[query["upload_id"]]
            if self._failed("PUT", key):
                return
            whole = before + body
            self.server.uploads[query["upload_id"]] = key, whole
            if len(whole) == int(self.headers["Content-Range"].rpartition("/")[2]):
                self._reply(200, self.server.put(key, whole))
            else:
                self._reply(308, None, Range=f"bytes=0-{len(whole) - 1}")

    def _failed(self, method: str, key: str) -> bool:
        name = key.rpartition("/")[2]
        self.server.asked[method, name] += 1
        status = self.server.fault(method, name, self.server.asked[method, name])
        if status is not None:
            self._reply(status, {"error": {"code": status, "message": "me:hunter2"}})
        return status is not None

    def _content(self, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            content = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _reply(self, status: int, answer: Any, **headers: str) -> None:
        content = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

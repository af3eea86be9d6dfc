"""As much of the Hub's interface as publishing and reading a store need, on loopback; keeps what it
is sent."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class FakeHub(ThreadingHTTPServer):
    """files: path → content, of the last commit or to be read. made: bodies of the requests that
    made repositories. tokens: every Authorization that came. refuses: answer all with 403."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._take()
        path = urlsplit(self.path).path
        if "/resolve/" in path:
            self._send(path.partition("/resolve/main/")[2])
        elif "/tree/" in path:
            folder = path.partition("/tree/main/")[2]
            self._say([each for each in self._files() if each["path"].startswith(f"{folder}/")])
        else:
            self._say({"sha": "0" * 40, "siblings": [], "id": "somebody/something"})

    def do_POST(self) -> None:
        body = self._take()
        if self.server.refuses:
            self._say({"error": "You may not write here."}, 403)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._say({"url": f"{self.server.address}/somebody/something"})
        elif "/paths-info/" in self.path:
            asked = parse_qs(body.decode())["paths"]
            self._say([each for each in self._files() if each["path"] in asked])
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            self._say({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self._say({"commitUrl": f"{self.server.address}/commit/1", "commitOid": "1" * 40})
        else:
            self._say({})

    def _take(self) -> bytes:
        self.server.paths.append(self.path)
        self.server.tokens.add(self.headers.get("authorization"))
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _files(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "oid": "0" * 40, "path": path, "size": len(content)}
            for path, content in sorted(self.server.files.items())
        ]

    def _send(self, path: str) -> None:
        """A file, or the bytes of it that are asked for."""
        content, asked = self.server.files[path], self.headers["range"]
        if asked is not None:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        self.send_response(200 if asked is None else 206)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _say(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

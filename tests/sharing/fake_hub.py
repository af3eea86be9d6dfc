"""As much of the Hub's interface as publishing needs, on loopback; keeps what it is sent."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub(ThreadingHTTPServer):
    """files: path → content of the last commit. made: bodies of the requests that made
    repositories. tokens: every Authorization that came. refuses: answer all with 403."""

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
        self._say({"sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self._take()
        if self.server.refuses:
            self._say({"error": "You may not write here."}, 403)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._say({"url": f"{self.server.address}/somebody/something"})
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

    def _say(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

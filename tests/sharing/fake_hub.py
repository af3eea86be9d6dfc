"""As much of the Hub's interface as publishing and reading need, on loopback; keeps what it is
sent."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "0" * 40


class FakeHub(ThreadingHTTPServer):
    """files: path → content, of the last commit or to be read. private: whether the repository is;
    None: there is none yet. made: bodies of the requests that made repositories. tokens: every
    Authorization that came. refuses: answer all with 403."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.made: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._take()
        path = urlsplit(self.path).path
        if self.server.refuses:
            self._say({"error": "You may not read here."}, 403)
        elif "/resolve/" in path:
            self._send(path.partition("/resolve/")[2].partition("/")[2])
        elif "/tree/" in path:
            folder = path.partition("/tree/main")[2].strip("/")
            inside = f"{folder}/" if folder else ""
            self._say([each for each in self._files() if each["path"].startswith(inside)])
        else:
            siblings = [{"rfilename": path} for path in self.server.files]
            about = {"sha": COMMIT, "siblings": siblings, "private": bool(self.server.private)}
            self._say({"id": "somebody/something", **about})

    def do_POST(self) -> None:
        body = self._take()
        if self.server.refuses:
            self._say({"error": "You may not write here."}, 403)
        elif self.path == "/api/repos/create":
            asked, there = json.loads(body), self.server.private is not None
            if not there:
                self.server.made.append(asked)
                self.server.private = asked["visibility"] == "private"
            url = f"{self.server.address}/somebody/something"
            self._say({"url": url}, 409 if there else 200)
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
                elif entry["key"] == "deletedFile":
                    del self.server.files[entry["value"]["path"]]
            self._say(
                {
                    "commitUrl": f"{self.server.address}/somebody/something/commit/1",
                    "commitOid": "1" * 40,
                }
            )
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
        if path not in self.server.files:
            self.send_response(404)
            self.send_header("x-error-code", "EntryNotFound")
            self.send_header("x-repo-commit", COMMIT)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        content, asked = self.server.files[path], self.headers["range"]
        if asked is not None:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        self.send_response(200 if asked is None else 206)
        self.send_header("content-length", str(len(content)))
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("etag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _say(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

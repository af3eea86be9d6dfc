"""More than there is room for, clients that go away, time that runs out, and the end."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from kava_core.errors import KavaError
from kava_core.serving.app import Limits
from kava_core.serving.engine import Engine, Full, Job, Piece
from kava_core.serving.meters import Meters
from kava_core.serving.run import serve
from kava_core.serving.served import Served, open_served
from kava_core.serving.text import Text
from tests.serving.conftest import NAME, QUESTIONS, Running, Start
from tests.stages.project import ROOT

LONG: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": QUESTIONS[0]}],
    "max_tokens": 900,
}


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def state(server: Running) -> tuple[int, int]:
    found = server.get("/health").json()
    return found["running"], found["waiting"]


def sent(server: Running, body: dict[str, Any]) -> socket.socket:
    """The connection of a client that has asked and does not read yet."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw)
    )
    return connection


def closed(server: Running) -> bool:
    """Whether it takes no more connections."""
    try:
        server.get("/health")
    except httpx2.ConnectError:
        return True
    except httpx2.TransportError:  # cut off while it was closing
        pass
    return False


@pytest.fixture(scope="module")
def narrow(start: Start, folders: dict[str, Path]) -> Running:
    """Two answers at a time, one waiting; none ends before its last token."""
    return start(folders["endless"], "--max-batch", "2", "--queue", "1", "--max-tokens", "16000")


def test_a_client_that_goes_away_frees_its_place(narrow: Running) -> None:
    endless = {**LONG, "max_tokens": 16_000}
    first = narrow.client.chat.completions.create(**endless, stream=True)
    next(iter(first))

    leaving = sent(narrow, endless)
    wait_until(lambda: state(narrow) == (2, 0))
    waiting = narrow.client.chat.completions.create(**endless, stream=True)
    assert state(narrow) == (2, 1)
    waiting.close()
    wait_until(lambda: state(narrow)[1] == 0)
    leaving.close()
    wait_until(lambda: state(narrow) == (1, 0))
    first.close()
    wait_until(lambda: state(narrow) == (0, 0))
    name = 'kava_requests_total{endpoint="/v1/chat/completions",status="499"}'
    wait_until(lambda: narrow.meter(name) == 3)


def test_a_full_queue_is_said_at_once_and_nobody_else_suffers(narrow: Running) -> None:
    held = [narrow.client.chat.completions.create(**LONG, stream=True) for _ in range(2)]
    wait_until(lambda: state(narrow)[0] == 2)
    held.append(narrow.client.chat.completions.create(**LONG, stream=True))
    with pytest.raises(openai.RateLimitError) as refused:
        narrow.client.chat.completions.create(**LONG)
    assert refused.value.code == "queue_full"
    assert refused.value.response.headers["retry-after"] == "1"
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in one) for one in held]
    assert len(texts[0]) >= 900 and texts == texts[:1] * 3
    wait_until(lambda: state(narrow) == (0, 0))


def test_a_burst_fills_the_batch_before_the_queue(start: Start, folders: dict[str, Path]) -> None:
    server = start(folders["student"], "--max-batch", "16", "--queue", "2", "--max-tokens", "40")
    asked = {**LONG, "max_tokens": 40}
    with ThreadPoolExecutor(12) as clients:
        found = list(
            clients.map(lambda _: server.post("/v1/chat/completions", asked), range(18), timeout=60)
        )
    assert [one.status_code for one in found] == [200] * 18
    assert server.post("/v1/chat/completions", {**asked, "n": 16}).status_code == 200
    many = {"model": NAME, "prompt": ["a"] * 19, "max_tokens": 1}
    refused = server.post("/v1/completions", many)
    assert refused.status_code == 400
    assert "expected at most 18 answers" in refused.json()["error"]["message"]


def test_what_takes_too_long_is_given_up(start: Start, folders: dict[str, Path]) -> None:
    server = start(folders["endless"], "--timeout", "0.2", "--max-tokens", "900")
    found = server.post("/v1/chat/completions", LONG)
    assert found.status_code == 504
    assert found.json()["error"]["code"] == "timeout"
    with pytest.raises(openai.APIError, match=r"within 0\.2 seconds"):
        list(server.client.chat.completions.create(**LONG, stream=True))
    wait_until(lambda: state(server) == (0, 0))
    # A body that never comes.
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        assert b" 504 " in slow.recv(1000)


def test_sigterm_waits_for_answers_and_takes_no_more(
    start: Start, folders: dict[str, Path]
) -> None:
    server = start(folders["endless"], "--max-batch", "1", "--max-tokens", "500")
    asked = {**LONG, "max_tokens": 500}
    with ThreadPoolExecutor(2) as clients:
        whole = [clients.submit(server.post, "/v1/chat/completions", asked) for _ in range(2)]
        wait_until(lambda: state(server) == (1, 1))
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: closed(server))
        for answer in whole:
            assert answer.result().json()["usage"]["completion_tokens"] == 500
    assert server.process.wait(120) == 0
    wait_until(lambda: any("stopped" in line for line in server.lines))
    assert not any("Traceback" in line or "interrupted" in line for line in server.lines)


def test_a_second_interrupt_does_not_wait_and_says_what_is_lost(
    start: Start, folders: dict[str, Path]
) -> None:
    server = start(folders["endless"], "--max-batch", "1", "--max-tokens", "16000")
    asked = {**LONG, "max_tokens": 16_000}
    with ThreadPoolExecutor(2) as clients:
        whole = [clients.submit(server.post, "/v1/chat/completions", asked) for _ in range(2)]
        wait_until(lambda: state(server) == (1, 1))
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: closed(server))
        server.process.send_signal(signal.SIGINT)
        for answer in whole:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"]["code"] == "stopped"
    assert server.process.wait(120) == 130
    wait_until(
        lambda: any("interrupted; requests that got no answer: 2" in x for x in server.lines)
    )
    assert not any("Traceback" in line or "stopped" in line for line in server.lines)


# --- the engine alone -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Served:
    return open_served(folders["student"])


def job(served: Served, told: list[Piece], **options: Any) -> Job:
    (ids,) = served.encoder.encode_questions([QUESTIONS[0]])
    text = Text(served.encoder.tokenizer)
    return Job(ids=ids, max_tokens=5, text=text, tell=told.append, **options)


def test_a_model_that_fails_loses_its_answers_and_serves_the_next(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(served, Meters(), max_batch=4, queue=4)
    told: list[Piece] = []
    wrong = job(served, told)
    wrong.ids = [10**6]  # beyond the embeddings
    engine.start()
    with caplog.at_level(logging.ERROR):
        engine.submit([wrong])
        wait_until(lambda: told)
    assert [piece.finish for piece in told] == ["error"]
    assert "the model failed" in caplog.text
    told.clear()
    engine.submit([job(served, told)])
    wait_until(lambda: told)
    assert told[-1].tokens <= 5 and told[-1].finish in ("stop", "length")
    assert engine.alive and engine.running == 0
    engine.stop()
    assert not engine.alive


def test_jobs_are_queued_all_or_none_and_told_of_the_end(served: Served) -> None:
    engine = Engine(served, Meters(), max_batch=1, queue=2)
    told: list[Piece] = []
    jobs = [job(served, told) for _ in range(4)]
    with pytest.raises(Full):
        engine.submit(jobs)
    assert engine.waiting == 0
    engine.submit(jobs[:3])  # one to be written, two to wait
    with pytest.raises(Full):
        engine.submit(jobs[3:])
    engine.cancel(jobs[:1])
    engine.submit(jobs[3:])
    assert engine.waiting == 3
    engine._stopping = True
    engine.start()
    wait_until(lambda: not engine.alive)
    assert [piece.finish for piece in told] == ["error"] * 3
    with pytest.raises(Full):
        engine.submit(jobs[:1])


def test_while_many_wait_they_join_a_few_at_a_time(served: Served) -> None:
    engine = Engine(served, Meters(), max_batch=8, queue=32)
    told: list[Piece] = []
    engine.submit([job(served, told) for _ in range(20)])
    engine._jobs = engine._next()
    assert (engine.running, engine.waiting) == (8, 12)
    engine._jobs = engine._jobs[:7]
    assert engine._next() == []  # one place, and twelve who want it
    engine._jobs = engine._jobs[:6]
    assert len(engine._next()) == 2
    engine._waiting = deque([job(served, told)])
    engine._jobs = [*engine._jobs[:6], job(served, told)]
    assert len(engine._next()) == 1  # nobody else waits


def test_long_questions_are_read_a_few_at_a_time(served: Served) -> None:
    engine = Engine(served, Meters(), max_batch=8, queue=32)
    jobs = [job(served, []) for _ in range(5)]
    for one, length in zip(jobs, (10, 6_000, 6_000, 20_000, 10), strict=True):
        one.ids = [7] * length
    engine.submit(jobs)
    for size in (2, 1, 1, 1):  # the third would make it 3 × 6,000; the fourth is too long with any
        assert len(engine._next()) == size


# --- what cannot be served ------------------------------------------------------------------------


def refused(folder: Path, **place: Any) -> str:
    with pytest.raises(KavaError) as error:
        address = {"host": "127.0.0.1", "port": 0, **place}
        serve(folder, **address, limits=Limits(), token=None, base=None)
    return str(error.value)


def test_a_place_that_is_taken_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refused(tmp_path, port=port) == (
            f"port {port} of 127.0.0.1 cannot be served from (Address already in use). Choose "
            "another with --port, or 0 for any that is free."
        )
    assert "expected a name or an address of this machine" in refused(tmp_path, host="no such")


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    assert "is no folder" in refused(tmp_path / "nothing")
    assert "is neither a student nor a teacher" in refused(tmp_path)
    (tmp_path / "teacher.json").write_text("{}", encoding="utf-8")
    assert "could be loaded from" in refused(tmp_path)


@pytest.mark.parametrize("token", ["", " ", "sésame"])
def test_a_token_that_is_none_is_refused(tmp_path: Path, token: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages", "serve", str(tmp_path)],
        cwd=ROOT,
        env={"PATH": "", "KAVA_SERVE_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: expected a secret of ASCII characters in KAVA_SERVE_TOKEN"
    )


def test_what_is_not_installed_is_said() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['serve', 'nothing'];"
        "from stages.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: serving needs uvicorn, which is not installed. Run `pip install 'kava[serve]'`."
    )

"""A log is never silent: where there is no terminal, a line now and then says how far work is."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from kava_core import console
from kava_core.console import progress, readable_size, readable_time, reporting, say


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where words go: no terminal, and silence is short."""
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=file, highlight=False))
    monkeypatch.setattr(console, "SILENCE", 0.05)
    return file


def wait(log: io.StringIO, pattern: str) -> str:
    """The first line that matches."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in log.getvalue().splitlines():
            if re.search(pattern, line):
                return line
        time.sleep(0.01)
    raise AssertionError(f"no line like {pattern} in:\n{log.getvalue()}")


def test_a_line_says_what_is_done_of_how_much_how_fast_and_what_is_left(log: io.StringIO) -> None:
    with reporting("smoke, evaluate"), progress() as display:
        task = display.add_task("kava", total=64, note="svamp")
        wait(log, r"^smoke, evaluate: kava 0 of 64, since \d+ s, svamp$")
        display.advance(task, 16)
        wait(log, r"^smoke, evaluate: kava 16 of 64, [\d.]+/(s|min), \d+ s left, svamp$")
        display.advance(task, 48)
        wait(log, r"^smoke, evaluate: at work for \d+ s$")  # between tasks


def test_work_without_a_known_end_has_a_rate(log: io.StringIO) -> None:
    with reporting("smoke, generate"), progress() as display:
        display.advance(display.add_task("verify", total=None, note=""), 3)
        wait(log, r"^smoke, generate: verify 3, [\d.]+/(s|min)$")


def test_the_lines_end_with_the_work(log: io.StringIO) -> None:
    with reporting("smoke, report"):
        wait(log, "at work for")
    length = len(log.getvalue())
    time.sleep(0.2)
    assert len(log.getvalue()) == length


def test_a_terminal_has_bars_and_no_lines(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(file=log, highlight=False, force_terminal=True)
    monkeypatch.setattr(console, "console", terminal)
    with reporting("smoke, report"), progress() as display:
        display.add_task("kava", total=2, note="")
        time.sleep(0.2)
        say("something")
    assert "smoke, report" not in log.getvalue() and "something" in log.getvalue()


def test_a_log_is_never_silent_for_a_minute() -> None:
    assert console.SILENCE < 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (7100, "118 min"), (12000, "3 h 20 min"),
     (183_000, "2 d 2 h")],
)  # fmt: skip
def test_times_are_readable(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1500, "1.5 kB"), (2e9, "2.0 GB"), (3e13, "30.0 TB")]
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert readable_size(size) == text

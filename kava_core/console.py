"""What a command says: bars on a terminal, a line now and then in a pipe or a log, or JSON lines.

All of it goes to stderr; stdout is for results.
"""

from __future__ import annotations

import json
import re
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from kava_core.interrupt import check

console = Console(stderr=True, highlight=False)

SILENCE = 50.0  # seconds: a log is never silent for a minute
TALK = 10.0  # the same where more was asked for
# Control characters but for tabs and the ends of lines, and marks of the direction of writing.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Format = Literal["text", "json"]
Amount = Literal["quiet", "normal", "verbose"]
_displays: list[Progress] = []


@dataclass
class _Log:
    """How this process speaks; work: the pipeline and the stage at work."""

    format: Format = "text"
    amount: Amount = "normal"
    work: tuple[str, str] | None = None

    @property
    def bars(self) -> bool:
        return console.is_terminal and self.format == "text" and self.amount != "quiet"


_log = _Log()


def configure(log_format: Format = "text", amount: Amount = "normal") -> None:
    """Choose how all that is said afterwards is said.

    json: every line is an object with `time`, `level` (info, progress, warning, error), `pipeline`
    and `stage` where one is at work, and `message`; progress also has `task`, `done`, `total`,
    `per_second`, `seconds_left` and `note`. quiet: warnings and errors only. verbose: progress five
    times as often, and the traceback behind an error.
    """
    _log.format, _log.amount = log_format, amount


class _Display(Progress):
    """Whose work ends when the program is told to, though a library swallowed it."""

    def advance(self, *arguments: Any, **more: Any) -> None:
        check()
        super().advance(*arguments, **more)

    def update(self, *arguments: Any, **more: Any) -> None:
        check()
        super().update(*arguments, **more)


@contextmanager
def progress() -> Iterator[Progress]:
    """A rich progress display on stderr, hidden when stderr is not a terminal or a log was asked
    for: then `reporting` says how far its tasks are.

    Tasks may carry a free text shown at the end of their line: `progress.update(task, note="…")`;
    give every task `note=""` when adding it.
    """
    with _Display(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not _log.bars,
    ) as display:
        _displays.append(display)
        try:
            yield display
        finally:
            _displays.remove(display)


def printable(text: str) -> str:
    """The text with what steers a terminal, or turns a line round, as Python writes it."""
    return STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def say(message: str) -> None:
    """One line to the person running the command."""
    if _log.amount != "quiet":
        _write("info", message)


def warn(message: str) -> None:
    """One line that is said even where little was asked for."""
    _write("warning", message)


def tell(message: str, **figures: Any) -> None:
    """How far the work is, beside what `reporting` says; figures: what JSON lines have besides."""
    if _log.amount == "quiet" or _log.bars:
        return
    work = ", ".join(filter(None, at_work()))
    _write("progress", f"{work}: {message}" if work else message, **figures)


def at_work() -> tuple[str, str]:
    """The pipeline and the stage at work; empty where none is."""
    return _log.work or ("", "")


def pause() -> float:
    """Seconds between two words about progress."""
    return min(SILENCE, TALK) if _log.amount == "verbose" else SILENCE


def complain(message: str, error: BaseException | None = None) -> None:
    """What a command ended with; the traceback of `error` where much was asked for."""
    trace = "".join(traceback.format_exception(error)) if error and _log.amount == "verbose" else ""
    if _log.format == "json":
        _write("error", message, **({"traceback": trace} if trace else {}))
        return
    _write("error", f"{trace}{message}")


def _write(level: str, message: str, **more: Any) -> None:
    if _log.format == "text":
        # Brackets and colons are the message's own.
        console.print(printable(message), soft_wrap=True, markup=False, emoji=False)
        return
    names = dict(zip(("pipeline", "stage"), _log.work or (), strict=False))
    time_now = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = {"time": time_now, "level": level, **names, "message": message, **more}
    console.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    console.file.flush()


@contextmanager
def reporting(pipeline: str, stage: str) -> Iterator[None]:
    """Where there are no bars, say every 50 seconds how far the work of `stage` is.

    A line for each task at work of the `progress` displays that are open: what is done of how much,
    the rate, the time left. Without any, that the work goes on.
    """
    before, _log.work = _log.work, (pipeline, stage)
    try:
        if _log.bars or _log.amount == "quiet":
            yield
        else:
            with _lines(f"{pipeline}, {stage}"):
                yield
    finally:
        _log.work = before


@contextmanager
def _lines(work: str) -> Iterator[None]:
    over, began = threading.Event(), time.monotonic()

    def report() -> None:
        while not over.wait(pause()):
            tasks = [task for display in list(_displays) for task in display.tasks]
            unfinished = [task for task in tasks if not task.finished]
            for task in unfinished:
                _write("progress", f"{work}: {_line(task)}", **_figures(task))
            if not unfinished:
                seconds = readable_time(time.monotonic() - began)
                _write("progress", f"{work}: at work for {seconds}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _rate(task: Task) -> float | None:
    """Per second, from the start: the speed of the last seconds says nothing of work in pieces."""
    return task.completed / task.elapsed if task.completed and task.elapsed else None


def _figures(task: Task) -> dict[str, Any]:
    rate = _rate(task)
    left = None if rate is None or task.total is None else (task.total - task.completed) / rate
    return {
        "task": task.description,
        "done": task.completed,
        "total": task.total,
        "per_second": rate if rate is None else float(f"{rate:.4g}"),
        "seconds_left": left if left is None else round(left),
        "note": str(task.fields.get("note", "")),
    }


def _line(task: Task) -> str:
    done = f"{task.completed:g}" if task.total is None else f"{task.completed:g} of {task.total:g}"
    parts = [f"{task.description} {done}"]
    rate = _rate(task)
    if rate is not None:
        parts.append(f"{rate:.3g}/s" if rate >= 1 else f"{60 * rate:.3g}/min")
        if task.total is not None:
            parts.append(f"{readable_time((task.total - task.completed) / rate)} left")
    else:
        parts.append(f"since {readable_time(task.elapsed or 0.0)}")
    note = str(task.fields.get("note", ""))
    return ", ".join([*parts, note] if note else parts)


def readable_time(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 20 min`, `5 d 2 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def readable_size(size: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

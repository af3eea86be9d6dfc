"""Progress for people: bars on a terminal, a line now and then in a pipe or a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

console = Console(stderr=True, highlight=False)

SILENCE = 50.0  # seconds: a log is never silent for a minute
_displays: list[Progress] = []


@contextmanager
def progress() -> Iterator[Progress]:
    """A rich progress display on stderr, hidden when stderr is not a terminal: then `reporting`
    says how far its tasks are.

    Tasks may carry a free text shown at the end of their line: `progress.update(task, note="…")`;
    give every task `note=""` when adding it.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    ) as display:
        _displays.append(display)
        try:
            yield display
        finally:
            _displays.remove(display)


def say(message: str) -> None:
    """One line to the person running the command (stderr, so that stdout stays for results)."""
    console.print(message, soft_wrap=True)


@contextmanager
def reporting(work: str) -> Iterator[None]:
    """Where stderr is no terminal, say every 50 seconds how far `work` is.

    A line for each task at work of the `progress` displays that are open: what is done of how much,
    the rate, the time left. Without any, that the work goes on.
    """
    if console.is_terminal:
        yield
        return
    over, began = threading.Event(), time.monotonic()

    def report() -> None:
        while not over.wait(SILENCE):
            tasks = [task for display in list(_displays) for task in display.tasks]
            lines = [_line(task) for task in tasks if not task.finished]
            for line in lines or [f"at work for {readable_time(time.monotonic() - began)}"]:
                say(f"{work}: {line}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _line(task: Task) -> str:
    done = f"{task.completed:g}" if task.total is None else f"{task.completed:g} of {task.total:g}"
    elapsed = task.elapsed or 0.0
    parts = [f"{task.description} {done}"]
    # Not the speed of the last seconds, which says nothing of work in long pieces.
    if task.completed and elapsed:
        rate = task.completed / elapsed
        parts.append(f"{rate:.3g}/s" if rate >= 1 else f"{60 * rate:.3g}/min")
        if task.total is not None:
            parts.append(f"{readable_time((task.total - task.completed) / rate)} left")
    else:
        parts.append(f"since {readable_time(elapsed)}")
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

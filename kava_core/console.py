"""Progress for people: bars on a terminal, silence in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A rich progress display on stderr, hidden when stderr is not a terminal.

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
        yield display


def say(message: str) -> None:
    """One line to the person running the command (stderr, so that stdout stays for results)."""
    console.print(message, soft_wrap=True)

"""Several pieces of work at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def together(
    jobs: int, work: Callable[[T], None], items: Sequence[T], end: Callable[[], None]
) -> None:
    """Do so many at once; the first failure ends it when what runs is done.

    end: ends what runs, when this process is told to end (SIGTERM).
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(work, item) for item in items]
        try:
            for each in as_completed(running):
                each.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, SystemExit):
                end()
            raise


def end_children() -> None:
    """Tell the stages that this process has started to end, which they do in good order."""
    import psutil

    for stage in psutil.Process().children():
        with suppress(psutil.Error):
            stage.terminate()

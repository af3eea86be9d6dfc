"""Several pieces of work at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")


def together(jobs: int, work: Callable[[T], None], items: Sequence[T]) -> None:
    """Do so many at once; the first failure ends it when what runs is done."""
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(work, item) for item in items]
        try:
            for each in as_completed(running):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""What processes need that read batches ahead of a training."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from torch.utils.data import Dataset


class ReadAhead(Dataset[dict[str, Any]]):
    """A dataset for loader processes, which end when the process ends that they read for.

    torch has them look at the number of their parent, and that is the server that forks them: they
    would outlive a training that was killed.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = self.dataset.__getitems__(indices)
        return batch

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In such a process, as it starts."""
        self.__dict__.update(state)
        Thread(target=_end_with_the_reader, daemon=True).start()


def _end_with_the_reader() -> None:
    while (reader := multiprocessing.parent_process()) is None:  # it is not told yet
        time.sleep(0.05)
    wait([reader.sentinel])
    os._exit(1)

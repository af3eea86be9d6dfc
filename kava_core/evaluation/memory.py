"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Self

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Inside this context memory is watched; after it `peak` is what was in use beyond the start.

    On CUDA these are the bytes torch allocated, and what was queued before is finished on entry. On
    Linux it is the resident memory of the process, from which what was freed before is returned on
    entry. Elsewhere `peak` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        _return_freed()
        try:
            CLEAR_REFS.write_text("5", encoding="ascii")  # forgets the peak so far (proc(5))
        except OSError:
            return self
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is None:
            return
        after = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else _status("VmHWM")
        )
        self.peak = max(0, after - self._before)


def _return_freed() -> None:
    """Without it, work would disappear in memory that the allocator holds from work before it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])

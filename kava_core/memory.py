"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_tensor_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that `work` holds at its peak beyond those that were there before.

    On CUDA as torch's allocator counts them. Elsewhere every storage that an operation returns is
    counted until it is freed: the same number in every run, where the resident memory of the
    process mostly tells what the libraries and the allocator keep. `work` takes up to three times
    as long, so time it apart.
    """
    if device.type == "cuda":
        with PeakMemory(device) as memory:
            work()
        return memory.peak or 0
    with _Storages() as storages:
        work()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Follows the storages of tensors from the operation that returns them to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._follow(given.untyped_storage(), 0)  # was there before, or is known
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._follow(made.untyped_storage(), made.untyped_storage().nbytes())
        return result

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self._live -= size

        self._known[key] = weakref.ref(storage, freed)
        self._live += size
        self.peak = max(self.peak, self._live)


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

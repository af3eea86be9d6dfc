"""What a process of `tests.faults.stage` takes away from itself before it runs a stage."""

from __future__ import annotations

import os
import resource

from kava_core.memory import STATUS


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


def hardly_any_files() -> None:
    """One for the log, and one more."""
    free = os.open(os.devnull, os.O_RDONLY)  # the lowest there is
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, free + 2))


def little_memory() -> None:
    """As much address space as there is, and 24 MB."""
    (line,) = [x for x in STATUS.read_text().splitlines() if x.startswith("VmSize:")]
    most = int(line.split()[1]) * 1024 + (24 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

"""The machine in words, for the part of a report on which no result depends."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path


@cache
def hardware() -> Mapping[str, str]:
    """Processor, cores, memory, accelerator and system, as far as the machine tells."""
    import torch

    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": _memory(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(terse=True),
    }
    return {name: value for name, value in found.items() if value}


def together(machines: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Several machines in words: where they differ, each value once, in the order met."""
    found: dict[str, dict[str, None]] = {}
    for machine in machines:
        for name, value in machine.items():
            found.setdefault(name, {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return ""
    return f"{size / 2**30:.0f} GiB"

"""Stages as processes that can be killed at any moment, without the seconds that imports take."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

from tests.golden.inputs import NAME
from tests.stages.project import digest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.preloaded"])
PATIENCE = 300  # seconds; no stage takes as many

# stage → its command, and what it writes below data/<pipeline>/
STAGES: dict[str, tuple[list[str], list[str]]] = {
    "prepare": (["prepare"], ["problems", "test_sets"]),
    "teacher": (["teacher"], ["teacher", "curves/teacher"]),
    "generate": (["generate"], ["teacher_kv"]),
    "generate-targets": (["generate"], ["kv_targets", "eviction.json"]),
    "evict": (["evict"], ["kv_targets", "eviction.json"]),
    "fidelity": (["fidelity"], ["fidelity"]),
    "distill": (["distill", "kava"], ["students/kava", "curves/students/kava"]),
    "evaluate": (["evaluate"], ["evaluation"]),
    "report": (["report"], ["report"]),
}
# stage → a section of the settings, and what is another one there
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "generate-targets": ("generate", {"keep": "targets"})
}


Before = Callable[[], object]


def main(home: Path, arguments: list[str], log: Path, begun: Event, before: Before | None) -> None:
    """What the process does: `kava …` in `home`, its words in `log`, after what `before` does."""
    try:
        begun.set()
        if before is not None:
            before()
        _command(home, arguments, log)
    except KeyboardInterrupt:  # before the command line could take it
        sys.exit(128 + signal.SIGINT)


def _command(home: Path, arguments: list[str], log: Path) -> None:
    os.chdir(home)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from stages.cli import main as kava

    torch.set_num_threads(1)
    sys.argv = ["kava", *arguments]
    kava()


@dataclass(frozen=True)
class Stage:
    """One stage in one home (`tests.golden.inputs`)."""

    home: Path
    name: str

    @property
    def log(self) -> Path:
        return self.home / f"{self.name}.log"

    @property
    def work(self) -> Path:
        return self.home / "data" / ".work"

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.is_file() else ""

    @property
    def outputs(self) -> list[Path]:
        return [self.home / "data" / NAME / output for output in STAGES[self.name][1]]

    def digests(self) -> list[dict[str, str]]:
        """Of each output, file by file; empty where there is none."""
        return [digest(output) for output in self.outputs]

    def start(self, before: Before | None = None) -> ForkServerProcess:
        """before: what the process does to itself first; a function of a module."""
        begun = CONTEXT.Event()
        command = STAGES[self.name][0]
        process = CONTEXT.Process(target=main, args=(self.home, command, self.log, begun, before))
        process.start()
        assert begun.wait(PATIENCE), f"{self.name} does not start"
        return process

    def run(self, before: Before | None = None) -> tuple[int | None, float]:
        """To its end; exit code (−n: by signal n), and seconds. before: see `start`."""
        began = time.monotonic()
        process = self.start(before)
        process.join(PATIENCE)
        assert not process.is_alive(), f"{self.name} does not end:\n{self.said}"
        return process.exitcode, time.monotonic() - began

    def kill(self, after: float, number: int) -> int | None:
        """Send it a signal after some seconds; its exit code."""
        process = self.start()
        process.join(after)
        if process.is_alive():
            assert process.pid is not None
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, number)
        process.join(PATIENCE)
        assert not process.is_alive(), f"{self.name} does not end after a signal:\n{self.said}"
        return process.exitcode

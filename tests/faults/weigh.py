"""What a hostile thing costs who reads it: seconds and memory, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.memory import CLEAR_REFS, STATUS
from tests.faults.stage import CONTEXT

PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Cost:
    """message: of the KavaError, None if there was none. seconds: of the processor. megabytes: of
    resident memory at the peak beyond the start."""

    message: str | None
    seconds: float
    megabytes: float


def cost_of(work: Callable[[Path], object], path: Path) -> Cost:
    """Of `work(path)`, which must be a function of a module."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_weigh, args=(work, path, there))
    process.start()
    there.close()
    answered = here.poll(PATIENCE)
    try:
        assert answered, "it hangs"
        return here.recv()
    except EOFError:
        process.join(PATIENCE)
        raise AssertionError(f"the interpreter ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _weigh(work: Callable[[Path], object], path: Path, there: Connection) -> None:
    CLEAR_REFS.write_text("5", encoding="ascii")  # forgets the peak so far (proc(5))
    before, began = _megabytes("VmRSS"), time.process_time()
    message = None
    try:
        work(path)
    except KavaError as error:
        message = str(error)
    there.send(Cost(message, time.process_time() - began, _megabytes("VmHWM") - before))


def _megabytes(name: str) -> float:
    (line,) = [x for x in STATUS.read_text().splitlines() if x.startswith(f"{name}:")]
    return int(line.split()[1]) / 1000

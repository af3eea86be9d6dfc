"""What a process of `tests.faults.stage` does to itself before it runs a stage."""

from __future__ import annotations

import os
import random
import resource
import time
from typing import Any

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


def refusing(call: str, error: int, at: int) -> None:
    """From now on the `at`-th call (from 0) of a function of `os` fails, once."""
    original, left = getattr(os, call), at

    def once(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == -1:
            name = None if call == "fsync" else str(arguments[0])
            raise OSError(error, os.strerror(error), name)
        return original(*arguments, **options)

    setattr(os, call, once)


def as_nobody() -> None:
    """A user who owns nothing."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def small_files() -> None:
    """No file may be larger than 8 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def with_a_clock_that_jumps() -> None:
    """Each look at the time of day is up to a week off, either way; files are as old as it says."""
    chance, now, now_ns, age = random.Random(0), time.time, time.time_ns, os.path.getmtime
    week = 7 * 24 * 3600
    time.time = lambda: now() + chance.uniform(-week, week)
    time.time_ns = lambda: now_ns() + int(chance.uniform(-week, week) * 1e9)
    os.path.getmtime = lambda path: age(path) + chance.uniform(-week, week)


def one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# Names that tools give to what nobody else may read; the value is in nothing that is made.
SECRETS = {
    name: f"planted-{name.lower()}-5ec2e7"
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "OPENAI_API_KEY",
        "PGPASSWORD",
        "WANDB_API_KEY",
    )
}


def with_secrets() -> None:
    """Secrets in the environment, and files for nobody else's eyes."""
    os.environ.update(SECRETS)
    os.umask(0o077)

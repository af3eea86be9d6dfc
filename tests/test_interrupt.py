"""What is told to end does, though a library swallows the exception that is to end it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

FINALISER = """
class Held:
    def __del__(self):
        signal.raise_signal(signal.{name})

Held()
while True:
    time.sleep(0.01)
"""
LIBRARY = """
try:
    signal.raise_signal(signal.{name})
except BaseException:
    pass
with progress() as display:
    task = display.add_task("work", total=None, note="")
    while True:
        time.sleep(0.01)
        display.{step}
"""
CLEANING = """
class Held:
    def __del__(self):
        signal.raise_signal(signal.{name})

Held()
try:
    with progress() as display:
        task = display.add_task("work", total=None, note="")
        while True:
            time.sleep(0.001)
            display.advance(task)
finally:
    time.sleep(0.3)
    print("cleaned up")
"""
WORK = {
    "a finaliser": FINALISER,
    "a library, advance": LIBRARY.replace("{step}", "advance(task)"),
    "a finaliser, before clean-up": CLEANING,
    "a library, update": LIBRARY.replace("{step}", "update(task, completed=1)"),
}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_swallowed_it_is_raised_once_more(name: str, work: str) -> None:
    script = (
        "import signal, sys, time\n"
        "from kava_core.console import progress\n"
        "from kava_core.interrupt import receive_signals, settle\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored behind a shell's `&`
        "receive_signals()\n"
        "try:\n"
        + "".join(f"    {line}\n" for line in work.format(name=name).splitlines())
        + "except (KeyboardInterrupt, SystemExit):\n    sys.exit(128 + settle())\n"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, check=False, timeout=60, capture_output=True)
    assert ended.returncode == 128 + getattr(signal, name)
    assert ended.stderr == b""
    assert ended.stdout == (b"cleaned up\n" if work is CLEANING else b"")


def test_what_is_ignored_stays_ignored() -> None:
    script = (
        "import signal\n"
        "from kava_core.interrupt import receive_signals, settle\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "receive_signals()\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "assert settle() is None\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)

"""Help is there at once: no command waits for torch to say what it does."""

from __future__ import annotations

import subprocess
import sys

from kava_core import __version__
from stages.cli import COMMANDS
from tests.stages.project import ROOT

HEAVY = (
    *("torch", "transformers", "ray", "dvc", "datasets", "pyarrow", "matplotlib", "peft"),
    *("starlette", "uvicorn", "prometheus_client"),
)
SCRIPT = f"""
import sys
from stages.cli import COMMANDS, kava
for name in COMMANDS:
    try:
        kava.main([name, "--help"], standalone_mode=True)
    except SystemExit as end:
        assert end.code == 0, name
    loaded = [module for module in {HEAVY} if module in sys.modules]
    assert not loaded, (name, loaded)
"""


def test_the_help_of_every_command_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") >= len(COMMANDS)


def test_the_version_is_that_of_kava_however_it_is_called() -> None:
    command = [sys.executable, "-m", "stages", "--version"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"kava, version {__version__}\n"

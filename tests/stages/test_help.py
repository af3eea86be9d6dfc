"""`--help` does not wait for torch."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "ray", "pyarrow", "datasets", "dvclive")


def test_commands_that_train_and_ask_are_imported_without_heavy_libraries() -> None:
    program = (
        "import sys, stages.ask, stages.distill, stages.teacher\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

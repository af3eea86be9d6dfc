"""A plan reads what the Hub's cache has of a model, and neither runs nor trusts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.models.hub import repository_in

COMMIT = "d" * 40
PROGRAM = """
from kava_core.errors import KavaError
from kava_core.planning.architecture import model_architecture
try:
    model_architecture("team/odd", None, "teacher.model")
except KavaError as error:
    print(error)
"""


def planned(home: Path, config: str) -> str:
    """What is said of the shapes of team/odd, whoever types `y` to whatever is asked."""
    repository = repository_in(home, "odd")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text(config)
    (snapshot / "odd.py").write_text(f"open({str(home / 'ran')!r}, 'w').close()")
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, input="y\ny\n", check=True, text=True,
        stdout=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    return done.stdout


def test_a_configuration_of_another_shape_is_a_sentence(tmp_path: Path) -> None:
    said = planned(tmp_path, "[" * 200_000)
    assert "team/odd" in said and "nested too deep" in said and said.count("\n") == 1


def test_code_is_never_run_whatever_is_typed(tmp_path: Path) -> None:
    config = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    said = planned(tmp_path, json.dumps(config))
    assert "the shapes of team/odd are not known here" in said
    assert not (tmp_path / "ran").exists()

"""Commands compute on what `resources` say, on hosts that say they have GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from kava_core.errors import KavaError
from stages.evaluate import evaluate
from stages.fidelity import fidelity
from stages.run import Run, tool
from tests.stages.test_methods import PIPELINE, call, write

FIDELITY = {"policies": ["rkv"], "budgets": [2]}


@pytest.mark.parametrize(("resources", "seen"), [({}, "0,1"), ({"device": "cpu"}, "")])
def test_on_the_cpu_a_command_sees_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], seen: str
) -> None:
    found: list[str] = []

    @tool
    def look(_: Run) -> None:
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    write(tmp_path, {**PIPELINE, "resources": resources})
    call(look, tmp_path)
    assert found == [seen]


@pytest.mark.parametrize("command", [fidelity, evaluate])
def test_no_share_beside_a_gpu_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: click.Command
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    write(tmp_path, {**PIPELINE, "fidelity": FIDELITY, "resources": {"gpus_per_worker": 0}})
    with pytest.raises(KavaError, match=r"gpus_per_worker is 0 beside visible GPUs \(1\)"):
        call(command, tmp_path)

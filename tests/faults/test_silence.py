"""Without a terminal no stage is silent: a line says how far it is, with its pipeline and name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from kava_core import console
from stages.cli import kava
from tests.faults.conftest import Tell
from tests.faults.stage import STAGES, Stage
from tests.golden.inputs import NAME


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_how_far_it_is(
    make_stage: Callable[[str], Stage], name: str, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    stage, command = make_stage(name), STAGES[name][0]
    monkeypatch.setattr(console, "SILENCE", 0.001)
    monkeypatch.chdir(stage.home)
    result = CliRunner().invoke(kava, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    said = re.findall(rf"^{NAME}, {' '.join(command)}: (.+)$", result.output, re.M)
    assert said, result.output
    if name in ("evaluate", "fidelity", "distill", "teacher"):  # what takes long and has parts
        assert any(re.match(r"\S.* \d+ of \d+, .*(since|left)", line) for line in said), said
    tell("no terminal", f"the output of {name} in a file", "a line says how far it is")


def test_a_log_of_json_lines_names_pipeline_and_stage(
    make_stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    stage = make_stage("evaluate")
    monkeypatch.setattr(console, "SILENCE", 0.001)
    monkeypatch.chdir(stage.home)
    result = CliRunner().invoke(kava, ["--log-format", "json", "evaluate"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    assert {(entry["pipeline"], entry["stage"]) for entry in entries} == {(NAME, "evaluate")}
    assert any(entry["level"] == "progress" and entry.get("total") for entry in entries)
    assert entries[-1]["message"].startswith("evaluate: done in ")
    tell("no terminal", "the output of evaluate in a file, as JSON", "a line says how far it is")

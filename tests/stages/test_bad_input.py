"""What a person can get wrong is one clear sentence and exit status 1, before any long work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.stages.project import ROOT, Project


def refused(output: str) -> str:
    """The error line; no traceback may stand before it."""
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("evict.budgte", 4, "evict.budgte"),
        ("evict.budget", 0, "evict.budget"),
        ("evict.budget", "many", "evict.budget"),
        ("evict.policy", {"name": "rkv", "lambda": 1.5}, "evict.policy"),
        ("evict.policy", "psychic", "evict.policy"),
        ("prepare.source", "web", "prepare.source"),
        ("teacher.scratch.heads", 5, "teacher.scratch"),
        ("students.kava.reasoning", "telepathy", "students.kava.reasoning"),
        ("students.kava.training.steps", -1, "students.kava.training.steps"),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(
    tmp_path: Path, key: str, value: Any, said: str
) -> None:
    project = Project(tmp_path)
    shutil.copy2(ROOT / "pipelines.yaml", tmp_path)
    project.change(f"pipelines.smoke.{key}", value)
    output = project.run("kava", "prepare", "--pipeline", "smoke", expect=1)
    assert "Traceback" not in output
    assert f"pipelines.smoke.{said}" in output


@pytest.mark.parametrize(
    ("key", "value", "stage", "said"),
    [
        ("evict.layers", [0, 7], "evict", "layers"),
        ("students.kava.training.lora", {"targets": ["nothing"]}, "distill kava", "lora.targets"),
        ("students.kava.training.batch_size", 100000, "distill kava", "batch_size"),
        (
            "teacher",
            {"model": "nowhere/at/all", "training": {"steps": 2}},
            "teacher",
            "nowhere/at/all",
        ),
    ],
)
def test_an_impossible_setting_is_refused_by_its_stage(
    copy: Project, key: str, value: Any, stage: str, said: str
) -> None:
    copy.change(f"pipelines.smoke.{key}", value)
    copy.kava("sync")
    assert said in refused(copy.kava(*stage.split(), expect=1))


def test_a_pipeline_or_student_that_is_not_there(finished: Project) -> None:
    assert "smoke" in refused(finished.kava("prepare", "--pipeline", "nope", expect=1))
    assert "answer-only" in refused(finished.kava("distill", "nope", expect=1))


def test_a_missing_artefact_names_itself(copy: Project) -> None:
    shutil.rmtree(copy.path / "data/smoke/problems")
    assert "data/smoke/problems" in refused(copy.kava("generate", expect=1))
    shutil.rmtree(copy.path / "data/smoke/kv_targets")
    assert "data/smoke/kv_targets" in refused(copy.kava("distill", "kava", expect=1))


def test_targets_of_another_teacher_are_refused_with_both_names(copy: Project) -> None:
    copy.change("pipelines.smoke.teacher.training.steps", 2)
    copy.kava("teacher")
    line = refused(copy.kava("distill", "kava", expect=1))
    manifest = json.loads((copy.path / "data/smoke/kv_targets/manifest.json").read_text())
    assert manifest["fingerprints"]["teacher"][:12] in line


def test_gsm8k_that_is_not_there_or_malformed(copy: Project) -> None:
    folder = copy.path / "gsm8k"
    copy.change("pipelines.smoke.prepare.path", str(folder))
    copy.change("pipelines.smoke.prepare.source", "gsm8k")
    copy.kava("sync")
    assert str(folder) in refused(copy.kava("prepare", expect=1))
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "How many?", "answer": "#### 1"}\n{"quest')
    assert "train.jsonl:2" in refused(copy.kava("prepare", expect=1))


def test_help_is_there_for_every_stage(finished: Project) -> None:
    listed = finished.kava("--help")
    for stage in ("prepare", "teacher", "generate", "evict", "distill", "evaluate", "report"):
        assert stage in listed
        assert "--pipeline" in finished.kava(stage, "--help")

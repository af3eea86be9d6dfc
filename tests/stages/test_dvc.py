"""DVC reruns what a setting changes and no more: every case reads what real DVC says it ran."""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stages.project import ROOT, Project, digest, ran, small

LATENT = {"distill@kava", "distill@endpoint", "distill@answer-only"}
AFTER_EVICTION = {"evict", *LATENT, "evaluate", "report"}


def changed_lines(before: str, after: str) -> list[str]:
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]


# --- settings -------------------------------------------------------------------------------------


def test_the_headline_command_changes_one_line_and_runs_what_follows(copy: Project) -> None:
    shutil.copy2(ROOT / "pipelines.yaml", copy.path)
    copy.change_line("\npipeline: quickstart\n", "\npipeline: smoke\n")
    copy.run("git", "add", "-A")
    copy.run("git", "commit", "-q", "-m", "Finish")
    before, four = (copy.path / "pipelines.yaml").read_text(), manifest_of_targets(copy)
    said = copy.run("dvc", "exp", "run", "-S", "pipelines.yaml:pipelines.smoke.evict.budget=3")
    assert ran(said) == AFTER_EVICTION
    after = (copy.path / "pipelines.yaml").read_text()
    assert changed_lines(before, after) == ["-    evict: {budget: 4}", "+    evict: {budget: 3}"]
    three = manifest_of_targets(copy)
    assert (four["geometry"]["slots"], three["geometry"]["slots"]) == (4, 3)

    copy.change_line("    evict: {budget: 3}\n", "    evict: {budget: 4}\n")
    assert copy.repro() == set()
    assert manifest_of_targets(copy) == four


def manifest_of_targets(project: Project) -> Any:
    return json.loads((project.path / "data/smoke/kv_targets/manifest.json").read_text())


def settings_of(name: str, value: object) -> list[tuple[str, object]]:
    """Every number and text of a pipeline's settings, as DVC names it, with what it says."""
    if isinstance(value, dict):
        return [pair for key, part in value.items() for pair in settings_of(f"{name}.{key}", part)]
    return [] if isinstance(value, list) else [(name, value)]


@pytest.mark.parametrize("file", ["pipelines.yaml", "stages/skeleton/pipelines.yaml"])
def test_any_setting_can_be_changed_alone(file: str, tmp_path: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    before = (ROOT / file).read_text()
    path = tmp_path / "pipelines.yaml"
    for name, value in settings_of("pipelines", yaml.safe_load(before)["pipelines"]):
        if isinstance(value, str):
            continue
        path.write_text(before)
        apply_overrides(path, [f"{name}={7 if value != 7 else 8}"])
        lines = changed_lines(before, path.read_text())
        assert [line[0] for line in lines] == ["-", "+"], (name, lines)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resources", {"workers": 1}),
        ("cadence", {"log_every": 3, "save_every": 4, "gradient_share_every": 5}),
    ],
)
def test_settings_that_change_no_result_rerun_nothing(
    copy: Project, key: str, value: dict[str, int]
) -> None:
    copy.change(f"pipelines.smoke.{key}", value)
    assert copy.repro() == set()


# --- several pipelines ----------------------------------------------------------------------------


def test_pipelines_stand_side_by_side(copy: Project) -> None:
    small(copy)
    copy.change("pipeline", "small")
    assert copy.repro() == {
        "prepare", "teacher", "generate", "evict", "distill@kava", "distill@no-cot", "evaluate",
        "report",
    }  # fmt: skip
    small_now = digest(copy.path / "data/small")
    copy.change("pipeline", "smoke")
    assert copy.repro() == set()
    copy.change("pipeline", "small")
    assert copy.repro() == set()
    status = json.loads(copy.run("dvc", "status", "--json"))
    theirs = [name for name in status if "/smoke/" in name or "/small/" in name]
    assert theirs == []
    shown = copy.run("dvc", "metrics", "show")
    assert "data/smoke/evaluation/summary.json" in shown
    assert "data/small/evaluation/summary.json" in shown
    copy.run("dvc", "plots", "show", "--out", "plots")
    page = (copy.path / "plots" / "index.html").read_text()
    assert "smoke/dvc.yaml::exact match" in page and "small/dvc.yaml::exact match" in page
    # What is not active is not garbage.
    copy.run("dvc", "gc", "--workspace", "--force")
    shutil.rmtree(copy.path / "data/small")
    copy.run("dvc", "checkout", "--force", "pipelines/small/dvc.yaml")
    assert digest(copy.path / "data/small") == small_now


# --- students -------------------------------------------------------------------------------------


def test_students_are_those_of_the_settings(copy: Project) -> None:
    small(copy)
    copy.change("pipeline", "small")
    copy.repro()
    kava = yaml.safe_load((copy.path / "pipelines.yaml").read_text())["pipelines"]["small"][
        "students"
    ]["kava"]
    copy.change("pipelines.small.students.kava-short", kava | {"iterations": 1})
    assert copy.repro() == {"distill@kava-short", "evaluate", "report"}
    metrics = json.loads((copy.path / "data/small/evaluation/summary.json").read_text())
    assert "kava-short" in json.dumps(metrics)
    copy.drop("pipelines.small.students.kava-short")
    assert copy.repro() == {"evaluate", "report"}
    metrics = json.loads((copy.path / "data/small/evaluation/summary.json").read_text())
    assert "kava-short" not in json.dumps(metrics)

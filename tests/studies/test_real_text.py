"""The plan for real text says what can be run: its pipelines, its studies, its recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kava_core.settings import load_pipeline, load_study
from kava_core.studies.plan import StudyPlan, plan_study
from stages.recipe import recipe_file
from stages.rehearsal import planned
from tests.stages.project import ROOT

PAGE = (ROOT / "docs/real-text-plan.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
TAKEN = re.findall(r"^kava recipe (\S+)$", PAGE, re.M)
STUDIES = {name: study for block in BLOCKS for name, study in block.get("studies", {}).items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kava recipe` and the page make of pipelines.yaml, in effect."""
    pipelines: dict[str, Any] = {}
    for name in TAKEN:
        pipelines |= yaml.safe_load(recipe_file(name).read_text(encoding="utf-8"))["pipelines"]
    for block in BLOCKS:
        pipelines |= block.get("pipelines", {})
    path = tmp_path_factory.mktemp("plan") / "pipelines.yaml"
    document = {"pipeline": TAKEN[0], "pipelines": pipelines, "studies": STUDIES}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def test_every_pipeline_named_is_there_and_can_be_planned(file: Path, tmp_path: Path) -> None:
    named = set(re.findall(r"--pipeline (\S+)", PAGE)) | {s["pipeline"] for s in STUDIES.values()}
    for name in named:
        planned(name, load_pipeline(file, name)[1], tmp_path / name)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_planned_and_is_run(file: Path, name: str) -> None:
    found = plan_study(file, name, load_study(file, name))
    assert f"\nkava study {name}\n" in PAGE or f"\nkava study {name} " in PAGE
    for cell in found.cells:
        assert cell.asked in ("validation", "test", "gsm-hard", "svamp")
    if name not in ("gpt2-choice", "gpt2-term"):
        assert found.study.split == "test" and len(found.study.seeds) >= 3


def students(found: StudyPlan) -> dict[str, dict[str, Any]]:
    return {
        cell.system: cell.piece.settings["students"][cell.system]
        for cell in found.cells
        if cell.piece.stage[0] == "distill"
    }


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "qwen25-05b", "llama-1b"])
def test_systems_differ_in_what_the_table_says_alone(file: Path, name: str) -> None:
    found = plan_study(file, name, load_study(file, name))
    trained = students(found)
    recipe = load_pipeline(file, found.study.pipeline)[1].students["kava"]
    kava = dict(trained["kava"])
    lengths = {system: each["training"].pop("epochs") for system, each in trained.items()}
    assert lengths == {system: 34 if "time" in system else 10 for system in trained}
    assert len({str(sorted(each["training"].items(), key=str)) for each in trained.values()}) == 1
    own = {key: value for key, value in trained["no-kv"].items() if key != "training"}
    assert own == {
        key: value
        for key, value in kava.items()
        if key not in ("training", "alpha_kv", "iterations") and not key.startswith("kv_")
    }
    assert recipe.training.epochs == 10 and kava["training"]["seed"] in found.study.seeds
    said = recipe.training.model_dump(mode="json", exclude_defaults=True)
    assert {key: kava["training"][key] for key in said if key not in ("epochs", "lora")} == {
        key: value for key, value in said.items() if key not in ("epochs", "lora")
    }


def test_with_and_without_the_readout_nothing_else_differs(file: Path) -> None:
    trained = students(plan_study(file, "gpt2-identity", load_study(file, "gpt2-identity")))
    kava, both = trained["kava"], trained["kava-readout"]
    assert kava.pop("iterations") == 3  # the default, which the other leaves to itself
    assert {key for key in kava | both if kava.get(key) != both.get(key)} == {"alpha_readout"}

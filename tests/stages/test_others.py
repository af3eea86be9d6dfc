"""Others' students are imported, asked beside a pipeline's own, and drawn in its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kava_core.errors import KavaError
from kava_core.models.loading import load_model, load_tokenizer
from kava_core.settings import Evaluate, Pipeline
from stages.cli import Kava
from stages.graph import dvc_file
from tests.models.test_foreign import LATENTS, Base, Coconut

TINY = {"steps": 2, "batch_size": 8, "threads": 1}
SETTINGS: dict[str, Any] = {
    "prepare": {"source": "synthetic", "train": 32, "validation": 8, "test": 8},
    "teacher": {
        "scratch": {"vocabulary": 300, "hidden_size": 32, "intermediate_size": 32},
        "training": TINY,
        "validate_on": 2,
        "max_new_tokens": 2,
    },
    "generate": {"shard_size": 16, "batch_size": 16},
    "evict": {"budget": 4},
    "students": {"no-cot": {"reads": "problems", "training": TINY}},
    "evaluate": {"max_new_tokens": 4, "interpret_records": 0, "others": {"coconut": "theirs"}},
    "report": {"title": "t"},
    "resources": {"workers": 0},
}


def kava(*arguments: str) -> None:
    done = CliRunner(catch_exceptions=False).invoke(Kava(), arguments)
    assert done.exit_code == 0, done.output


def write(settings: dict[str, Any]) -> None:
    document = {"pipeline": "small", "pipelines": {"small": settings}}
    Path("pipelines.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def test_an_imported_student_is_asked_and_drawn_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(SETTINGS)
    for command in ("prepare", "teacher", "generate", "evict"):
        kava(command)
    kava("distill", "no-cot")
    with pytest.raises(KavaError, match=r"evaluate\.others\.coconut: theirs is no student"):
        kava("evaluate")
    teacher = Path("data/small/teacher")
    vocabulary = len(load_tokenizer(str(teacher)))
    published = Coconut(Base("llama", teacher, load_model(str(teacher)), vocabulary))
    made = published.save(tmp_path / "checkpoint_15")
    options = ["--base", str(teacher), "--latents", str(LATENTS)]
    kava("import-student", "coconut", str(made), "theirs", *options)
    kava("evaluate")
    kava("report")
    systems = {"teacher-cot", "teacher-no-cot", "no-cot", "coconut"}
    metrics = json.loads(Path("data/small/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert metrics["synthetic"].keys() == systems
    # The question with <bot>, and each latent, of which the last goes with the answer's beginning.
    assert metrics["synthetic"]["coconut"]["forward_passes"] >= 1 + LATENTS
    differences = Path("data/small/evaluation/comparisons.json").read_text(encoding="utf-8")
    assert json.loads(differences)["synthetic"]["coconut"].keys() == systems - {"coconut"}
    assert "coconut" in Path("data/small/report/table.txt").read_text(encoding="utf-8")
    page = Path("data/small/report/index.html").read_text(encoding="utf-8")
    assert "coconut" in page


def test_dvc_is_told_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs").mkdir()
    stages = dvc_file("small", Pipeline.model_validate(SETTINGS))["stages"]
    assert "theirs" in stages["evaluate"]["deps"]


def test_nobody_else_is_nothing_to_write_down() -> None:
    assert "others" not in Evaluate().model_dump()
    others = Evaluate(others={"a": "b"})
    assert Evaluate.model_validate(others.model_dump(mode="json")) == others


@pytest.mark.parametrize("name", ["no-cot", "teacher-cot", "teacher-no-cot"])
def test_they_are_called_as_no_system_of_the_pipeline(name: str) -> None:
    evaluate = {**SETTINGS["evaluate"], "others": {name: "theirs"}}
    with pytest.raises(ValueError, match=f"evaluate.others.{name}: a system of this pipeline"):
        Pipeline.model_validate({**SETTINGS, "evaluate": evaluate})

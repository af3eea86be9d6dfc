"""What DVC is told of a pipeline that keeps no caches."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kava_core.errors import KavaError
from kava_core.settings import Pipeline
from kava_core.settings.pipeline import load_pipeline
from kava_core.versions import VERSIONS
from stages.graph import check_tracked, dvc_file, project_files
from tests.stages.project import ROOT, Project, ran

SMOKE = yaml.safe_load((ROOT / "pipelines.yaml").read_text(encoding="utf-8"))["pipelines"]["smoke"]


def keeping(what: str, **sections: Any) -> Pipeline:
    generate = {**SMOKE["generate"], "keep": what}
    return Pipeline.model_validate({**SMOKE, "generate": generate, **sections})


def test_caches_are_the_default() -> None:
    assert dvc_file("x", Pipeline.model_validate(SMOKE)) == dvc_file("x", keeping("caches"))


def test_generate_makes_the_targets_and_depends_on_what_cuts_them() -> None:
    stages = dvc_file("x", keeping("targets"))["stages"]
    assert "evict" not in stages
    made = stages["generate"]
    assert made["outs"] == ["data/x/kv_targets"] and made["metrics"] == ["data/x/eviction.json"]
    assert made["params"] == [
        {"pipelines.yaml": ["pipelines.x.generate", "pipelines.x.evict"]},
        {"pipelines/versions.yaml": ["generate", "evict"]},
    ]
    assert "teacher_kv" not in yaml.safe_dump(stages)
    assert "data/x/kv_targets" in stages["report"]["deps"]


@pytest.mark.parametrize(
    ("keep", "resources", "file"),
    [
        ("caches", {}, "teacher_kv/manifest.json"),
        ("caches", {"targets_to": "s3://bucket/x"}, "teacher_kv/manifest.json"),
        ("caches", {"caches_to": "s3://bucket/x"}, "teacher_kv/remote.json"),
        ("targets", {"targets_to": "s3://bucket/x"}, "kv_targets/remote.json"),
    ],
)
def test_students_depend_on_the_file_that_names_what_they_do_not_learn(
    keep: str, resources: dict[str, str], file: str
) -> None:
    generate = {**SMOKE["generate"], "keep": keep, "on_error": "quarantine"}
    plain = {**SMOKE, "generate": generate, "resources": resources}
    stages = dvc_file("x", Pipeline.model_validate(plain))["stages"]
    assert f"data/x/{file}" in stages["distill"]["do"]["deps"]


def test_everything_that_is_read_is_made_by_one_stage() -> None:
    for what, sections in itertools.product(("caches", "targets"), ({}, {"traces": {}})):
        stages = dvc_file("x", keeping(what, **sections))["stages"]
        plain = [each.get("do", each) for each in stages.values()]
        made = [
            out if isinstance(out, str) else next(iter(out))
            for each in plain
            for out in [*each["outs"], *each.get("metrics", [])]
        ]
        assert len(made) == len(set(made))
        folders = ("data/x/students", "data/x/curves", "data/x/${item.reads}")
        for each in plain:
            for dep in each.get("deps", []):
                assert dep in made or dep in folders, (what, dep)


def test_chains_of_the_teachers_stand_before_all_that_is_taught() -> None:
    plain = dvc_file("x", Pipeline.model_validate(SMOKE))["stages"]
    for what in ("caches", "targets"):
        stages = dvc_file("x", keeping(what, traces={}))["stages"]
        assert stages["traces"]["deps"] == ["data/x/problems", "data/x/teacher"]
        assert stages["traces"]["params"] == [
            {"pipelines.yaml": ["pipelines.x.traces"]},
            {"pipelines/versions.yaml": ["traces"]},
        ]
        assert stages["generate"]["deps"] == ["data/x/traces", "data/x/teacher"]
        assert "data/x/traces" in stages["distill"]["do"]["deps"]
        assert "data/x/traces" in stages["report"]["deps"]
        assert stages["teacher"] == plain["teacher"] and stages["fidelity"] == plain["fidelity"]
    assert "traces" not in plain and "data/x/traces" not in yaml.safe_dump(plain)


def written(folder: Path, settings: Pipeline) -> None:
    for path, text in project_files({"x": settings}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def test_a_stale_file_is_noticed(tmp_path: Path) -> None:
    written(tmp_path, keeping("caches"))
    with pytest.raises(KavaError, match="Run `kava sync`"):
        check_tracked(tmp_path, "x", keeping("targets"), "generate")
    written(tmp_path, keeping("targets"))
    check_tracked(tmp_path, "x", keeping("targets"), "generate")
    versions = tmp_path / "pipelines/versions.yaml"
    text = versions.read_text(encoding="utf-8")
    versions.write_text(text.replace(f"evict: {VERSIONS['evict']}", "evict: 99"), encoding="utf-8")
    with pytest.raises(KavaError, match=re.escape(f"version {VERSIONS['evict']}")):
        check_tracked(tmp_path, "x", keeping("targets"), "generate")


@pytest.mark.parametrize("resources", [{"push_caches": False}, {"caches_to": "s3://bucket/x"}])
def test_pushing_caches_that_nobody_keeps_is_an_error(
    tmp_path: Path, resources: dict[str, Any]
) -> None:
    file = tmp_path / "pipelines.yaml"
    wrong = {**SMOKE, "generate": {"keep": "targets"}, "resources": resources}
    file.write_text(yaml.safe_dump({"pipelines": {"x": wrong}}), encoding="utf-8")
    (name,) = resources
    with pytest.raises(KavaError, match=rf"pipelines\.x: resources\.{name}: means nothing"):
        load_pipeline(file, "x")


@pytest.mark.slow
def test_dvc_reruns_the_teachers_pass_for_another_budget(tmp_path: Path) -> None:
    project = Project.clone(tmp_path / "clone")
    tiny = {"steps": 2, "batch_size": 16, "threads": 1}
    kava = {"reads": "kv_targets", "alpha_kv": 1.0, "training": tiny}
    small = {
        **{name: section for name, section in SMOKE.items() if name != "fidelity"},
        "prepare": {**SMOKE["prepare"], "train": 64, "validation": 8, "test": 8},
        "teacher": {**SMOKE["teacher"], "training": tiny, "validate_on": 4},
        "generate": {"keep": "targets", "shard_size": 32, "batch_size": 16},
        "students": {"kava": kava},
        "evaluate": {"max_new_tokens": 4, "interpret_records": 0, "similarity_records": 8},
        "resources": {"workers": 0},
    }
    project.change("pipelines.small", small)
    project.kava("sync")
    file = "pipelines/small/dvc.yaml"
    every = {"prepare", "teacher", "generate", "distill@kava", "evaluate", "report"}
    assert ran(project.run("dvc", "repro", file)) == every
    assert not (project.path / "data/small/teacher_kv").exists()
    project.change("pipelines.small.evict.budget", 3)
    after = {"generate", "distill@kava", "evaluate", "report"}
    assert ran(project.run("dvc", "repro", file)) == after
    assert ran(project.run("dvc", "repro", file)) == set()

"""What DVC tracks and keeps: code, inputs, the disk, other machines; every case reads what real DVC
says it ran."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from kava_core.versions import VERSIONS
from tests.stages.project import ROOT, Project, ran, small

# --- code -----------------------------------------------------------------------------------------


def test_what_a_stage_computes_is_tracked_and_not_its_text(copy: Project) -> None:
    copy.environment["PYTHONPATH"] = str(copy.path)  # the copy's own library
    with (copy.path / "kava_core/distill/objective.py").open("a") as file:
        file.write("\n# A comment.\n")
    assert copy.repro() == set()
    versions = copy.path / "kava_core/versions.py"
    number = VERSIONS["evict"]
    versions.write_text(
        versions.read_text().replace(f'"evict": {number}', f'"evict": {number + 1}')
    )
    assert "Run `kava sync`" in copy.kava("evict", expect=1)
    copy.kava("sync")
    assert "evict" in ran(copy.run("dvc", "repro", "pipelines/smoke/dvc.yaml:evict"))


# --- inputs ---------------------------------------------------------------------------------------


def write_rows(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"q": f"What is {i} and {i % 7}?", "s": [f"<<{i}+{i % 7}={i + i % 7}>>"],
                    "a": str(i + i % 7)})
        for i in range(rows)
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


TABLE = {
    "source": {"name": "table", "question": "q", "answer": "a", "steps": "s"},
    "path": "data/raw/table.jsonl",
    "validation": 8,
    "test": 8,
}


def test_a_truncated_input_is_noticed(copy: Project) -> None:
    write_rows(copy.path / "data/raw/table.jsonl", 90)
    small(copy, prepare=TABLE)
    prepare = "pipelines/small/dvc.yaml:prepare"
    assert ran(copy.run("dvc", "repro", prepare)) == {"prepare"}
    assert ran(copy.run("dvc", "repro", prepare)) == set()
    write_rows(copy.path / "data/raw/table.jsonl", 80)
    assert ran(copy.run("dvc", "repro", prepare)) == {"prepare"}


def test_a_local_model_is_an_input(copy: Project) -> None:
    shutil.copytree(copy.path / "data/smoke/teacher", copy.path / "models/start")
    small(copy)
    teacher = {"model": "models/start", "training": {"steps": 2, "batch_size": 16}}
    copy.change("pipelines.small.teacher", teacher | {"validate_on": 4, "max_new_tokens": 4})
    said = copy.kava("teacher", "--pipeline", "small", expect=1)
    assert "models/start" in said and "Run `kava sync`" in said
    copy.kava("sync")
    target = "pipelines/small/dvc.yaml:teacher"
    assert ran(copy.run("dvc", "repro", target)) == {"prepare", "teacher"}
    assert ran(copy.run("dvc", "repro", target)) == set()
    config = copy.path / "models/start/generation_config.json"
    config.write_text(config.read_text() + "\n")
    assert ran(copy.run("dvc", "repro", target)) == {"teacher"}


def test_a_new_test_set_asks_and_teaches_nothing(copy: Project) -> None:
    write_rows(copy.path / "data/raw/table.jsonl", 12)
    more = {"more": {"source": TABLE["source"], "path": TABLE["path"]}}
    copy.change("pipelines.smoke.prepare.test_sets", more)
    copy.kava("sync")
    assert copy.repro() == {"prepare", "evaluate", "report"}


def test_another_share_of_the_trace_reruns_what_cuts_it(copy: Project) -> None:
    copy.change("pipelines.smoke.generate.latent_fraction", 0.5)
    said = copy.run("dvc", "repro", "pipelines/smoke/dvc.yaml:evict")
    assert ran(said) == {"generate", "evict"}  # what follows new targets: the first test


# --- disk and other machines ----------------------------------------------------------------------


def test_the_cache_is_no_second_copy(finished: Project) -> None:
    cache = finished.path / ".dvc/cache/files"
    files = [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".dir"]
    alone = [file for file in files if file.stat().st_nlink == 1]
    assert len(files) > 100 and alone == []


def test_caches_may_be_kept_out_of_pushes(copy: Project) -> None:
    copy.change("pipelines.smoke.resources", {"push_caches": False})
    copy.kava("sync")
    assert copy.repro() == set()
    remote = copy.path / "remote"
    copy.run("dvc", "remote", "add", "-d", "there", str(remote))
    copy.run("dvc", "push", "pipelines/smoke/dvc.yaml")
    pushed = {file.name for file in remote.rglob("*") if file.is_file()}
    lock = yaml.safe_load((copy.path / "pipelines/smoke/dvc.lock").read_text())["stages"]
    (caches,) = lock["generate"]["outs"]
    (targets,) = [out for out in lock["evict"]["outs"] if out["path"].endswith("kv_targets")]
    assert targets["md5"][2:] in pushed and caches["md5"][2:] not in pushed


def test_another_machine_leaves_the_lock_as_it_is(finished: Project, tmp_path: Path) -> None:
    other = Project.clone(tmp_path / "elsewhere")
    other.environment["TZ"] = "Asia/Tokyo"
    other.repro()
    locks = [
        yaml.safe_load((project.path / "pipelines/smoke/dvc.lock").read_text())["stages"]
        for project in (finished, other)
    ]
    for lock in locks:
        for stage in lock.values():
            stage["outs"] = [
                out
                for out in stage["outs"]
                if "/measured/" not in out["path"] and not out["path"].endswith("/costs")
            ]
    assert locks[0] == locks[1]


# --- the files themselves -------------------------------------------------------------------------


def test_the_repositorys_dvc_files_are_what_its_settings_say() -> None:
    project = Project(ROOT)
    project.kava("sync", "--check")


def test_sync_writes_what_changed_and_removes_what_is_gone(copy: Project) -> None:
    assert copy.kava("sync").strip() == "nothing to do"
    small(copy)
    assert (copy.path / "pipelines/small/dvc.yaml").is_file()
    copy.drop("pipelines.small")
    assert "pipelines/small" in copy.kava("sync", "--check", expect=1)
    assert "removed pipelines/small" in copy.kava("sync")
    assert not (copy.path / "pipelines/small").exists()


@pytest.mark.parametrize("git", [True, False])
def test_init_makes_a_project_that_runs(tmp_path: Path, git: bool) -> None:
    project = Project(tmp_path / "own")
    project.path.mkdir()
    if git:
        project.run("git", "init", "-q")
    project.run("kava", "init")
    project.run("kava", "sync", "--check")
    assert ran(project.run("dvc", "repro", "pipelines/first/dvc.yaml:prepare")) == {"prepare"}
    assert "expected" in project.run("kava", "init", expect=1)
    for template in (ROOT / ".dvc/plots").iterdir():
        assert (project.path / ".dvc/plots" / template.name).read_bytes() == template.read_bytes()


def test_the_recipe_for_data_of_ones_own_is_whole(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    recipe = page[page.index("## My own data") :].partition("\n## ")[0]
    init, settings, sync = re.findall(r"```(?:yaml)?\n(.*?)```", recipe, re.S)
    assert init == "kava init my-project && cd my-project\n"
    assert sync == "kava sync && dvc repro\n"
    project = Project(tmp_path / "my-project")
    Project(tmp_path).run("kava", "init", "my-project")
    prepare = yaml.safe_load(settings)["prepare"]
    project.change("pipelines.first.prepare", prepare)
    rows = [
        {"problem": f"What is {i} and {i % 7}?", "solution": [f"<<{i}+{i % 7}={i + i % 7}>>"],
         "result": str(i + i % 7)}
        for i in range(sum(prepare[part] for part in ("train", "validation", "test")))
    ]  # fmt: skip
    file = project.path / prepare["path"]
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Run `kava sync`" in project.run("kava", "prepare", expect=1)
    project.run("kava", "sync")
    assert ran(project.run("dvc", "repro", "pipelines/first/dvc.yaml:prepare")) == {"prepare"}

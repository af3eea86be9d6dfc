"""DVC tells the truth: every case reads what real DVC says it ran."""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from kava_core.versions import VERSIONS
from tests.stages.project import ROOT, Project, digest, ran

LATENT = {"distill@kava", "distill@endpoint", "distill@answer-only"}
AFTER_EVICTION = {"evict", *LATENT, "evaluate", "report"}
TINY = {"steps": 4, "batch_size": 16}


def changed_lines(before: str, after: str) -> list[str]:
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def small(copy: Project, name: str = "small", **sections: object) -> None:
    """A second pipeline, with two students, in seconds."""
    settings = yaml.safe_load((copy.path / "pipelines.yaml").read_text())["pipelines"]["smoke"]
    settings |= {"students": {k: v for k, v in settings["students"].items() if k in SMALL}}
    for student in settings["students"].values():
        student["training"] = TINY
    settings["teacher"]["training"] = {"steps": 4, "batch_size": 16}
    settings["prepare"] |= {"train": 64, "validation": 8, "test": 8}
    settings["generate"] = {"shard_size": 32, "batch_size": 16}
    settings["evaluate"] |= {"interpret_records": 0, "similarity_records": 8}
    settings |= {"resources": {"workers": 0}, **sections}
    del settings["fidelity"]
    copy.change(f"pipelines.{name}", settings)
    copy.kava("sync")


SMALL = ("kava", "no-cot")


# --- settings -------------------------------------------------------------------------------------


def test_the_headline_command_changes_one_line_and_runs_what_follows(copy: Project) -> None:
    shutil.copy2(ROOT / "pipelines.yaml", copy.path)
    copy.change_line("\npipeline: quickstart\n", "\npipeline: smoke\n")
    copy.run("git", "add", "-A")
    copy.run("git", "commit", "-q", "-m", "Finish")
    before = (copy.path / "pipelines.yaml").read_text()
    said = copy.run("dvc", "exp", "run", "-S", "pipelines.yaml:pipelines.smoke.evict.budget=3")
    assert ran(said) == AFTER_EVICTION
    after = (copy.path / "pipelines.yaml").read_text()
    assert changed_lines(before, after) == ["-    evict: {budget: 4}", "+    evict: {budget: 3}"]


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
    assert copy.repro() == {"generate", *AFTER_EVICTION}


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

"""`kava study` as a person runs it, on a pipeline of seconds."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from kava_core.artefacts import read_json
from kava_core.models.loading import model_fingerprint
from kava_core.settings import load_study
from kava_core.studies.plan import plan_study
from tests.stages.project import ROOT, Project, digest, end_session

TRAINING = {"steps": 2, "batch_size": 8, "threads": 1}
SCRATCH = {
    "vocabulary": 300,
    "hidden_size": 32,
    "heads": 4,
    "kv_heads": 2,
    "intermediate_size": 48,
}
TINY: dict[str, Any] = {
    "prepare": {
        "source": "synthetic",
        "train": 32,
        "validation": 12,
        "test": 14,
        "test_sets": {"longer": {"source": {"name": "synthetic", "steps": [5, 5]}, "size": 3}},
    },
    "teacher": {"scratch": SCRATCH, "training": TRAINING, "validate_on": 4, "max_new_tokens": 8},
    "generate": {"threads": 1},
    "evict": {"budget": 3, "threads": 1},
    "students": {
        "kava": {"reads": "kv_targets", "iterations": 1, "alpha_kv": 1.0, "training": TRAINING},
        "no-cot": {"reads": "problems", "training": TRAINING},
    },
    "evaluate": {"max_new_tokens": 6, "threads": 1},
    "report": {"title": "Tiny"},
    "resources": {"workers": 0},
}
STUDY = {"pipeline": "tiny", "seeds": [0, 1], "baseline": "no-cot", "split": "test"}


class Bench:
    """A file of settings and a data folder, from which `kava study tiny` runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / "data/studies/tiny"

    def write(self, **study: Any) -> None:
        document = {
            "pipeline": "tiny",
            "pipelines": {"tiny": TINY},
            "studies": {"tiny": {**STUDY, **study}},
        }
        (self.path / "pipelines.yaml").write_text(yaml.safe_dump(document))

    def kava(self, *arguments: str, expect: int = 0) -> str:
        places = ["--pipelines", f"{self.path}/pipelines.yaml", "--data", f"{self.path}/data"]
        return Project(ROOT).kava(*arguments, *places, expect=expect)

    def made(self) -> dict[str, int]:
        """Every piece, and when it was made."""
        return {path.name: path.stat().st_mtime_ns for path in self.folder.glob("made/*-*")}

    def asked(self) -> list[tuple[str, int | None]]:
        lines = (self.folder / "asked.jsonl").read_text().splitlines()
        return [(line["system"], line["seed"]) for line in map(json.loads, lines)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, str]:
    """The study, run to its end, and what it said. Leave it as it is."""
    bench = Bench(tmp_path_factory.mktemp("study"))
    bench.write()
    return bench, bench.kava("study", "tiny", "--jobs", "2")


@pytest.fixture
def copy(done: tuple[Bench, str], tmp_path: Path) -> Bench:
    shutil.copytree(done[0].path, tmp_path / "copy", symlinks=True)
    return Bench(tmp_path / "copy")


def test_every_student_is_trained_with_every_seed_from_one_store(done: tuple[Bench, str]) -> None:
    bench, said = done
    stages = "1 prepare, 1 teacher, 1 generate, 1 evict, 4 distill"
    assert f"6 cells, 6 to do; stages to run: {stages}" in " ".join(said.split())
    made = sorted(name.rsplit("-", 1)[0] for name in bench.made())
    assert made == ["evict", "generate", *["kava"] * 2, *["no-cot"] * 2, "prepare", "teacher"]
    students = [path for path in bench.folder.glob("made/*/students/*") if path.is_dir()]
    seeds = {
        (path.name, read_json(path / "student.json")["settings"]["training"]["seed"])
        for path in students
    }
    assert seeds == {(name, seed) for name in ("kava", "no-cot") for seed in (0, 1)}
    assert len({model_fingerprint(str(path)) for path in students}) == 4


def test_what_it_wrote_and_when_it_asked(done: tuple[Bench, str]) -> None:
    bench, said = done
    asked = [("teacher-cot", None), ("teacher-no-cot", None)]
    asked += [(name, seed) for name in ("kava", "no-cot") for seed in (0, 1)]
    assert sorted(map(str, bench.asked())) == sorted(map(str, asked))
    assert "Test problems were asked 6 times" in said
    for name in ("results.csv", "answers.parquet", "summary.json", "index.html"):
        assert (bench.folder / name).is_file()
    assert len((bench.folder / "results.csv").read_text().splitlines()) == 7
    assert "Holm" in said and "no-cot" in said


def test_run_again_it_does_nothing_and_says_the_same(copy: Bench) -> None:
    names = ("results.csv", "answers.parquet", "summary.json", "index.html", "asked.jsonl")
    before = {name: (copy.folder / name).read_bytes() for name in names}, copy.made()
    said = copy.kava("study", "tiny", "--json")
    assert "6 cells, 0 to do" in said
    assert ({name: (copy.folder / name).read_bytes() for name in names}, copy.made()) == before
    shown = json.loads(said[said.index("{\n") : said.rindex("\n}") + 2])
    assert shown == read_json(copy.folder / "summary.json")


def test_interrupted_it_does_what_is_missing(copy: Bench) -> None:
    results, made = (copy.folder / "results.csv").read_bytes(), copy.made()
    settings = copy.path / "pipelines.yaml"
    cells = plan_study(settings, "tiny", load_study(settings, "tiny")).cells
    lost = next(cell for cell in cells if (cell.system, cell.seed) == ("no-cot", 1))
    place = copy.folder / "made" / lost.piece.name
    weights = digest(place / "students")
    shutil.rmtree(place)
    (copy.folder / "cells" / f"{lost.name}.json").unlink()
    with (copy.folder / "asked.jsonl").open("a") as log:
        log.write('{"at":"2026-01-')  # as a full disk leaves a line
    said = copy.kava("study", "tiny")
    assert "6 cells, 1 to do" in said and "the last line is torn" in " ".join(said.split())
    assert copy.asked()[6:] == [("no-cot", 1)]
    assert (copy.folder / "results.csv").read_bytes() == results
    assert digest(place / "students") == weights
    again = copy.made()
    assert {name for name in made if made[name] != again[name]} == {lost.piece.name}


def test_more_seeds_train_what_is_new_and_are_no_other_settings(copy: Bench) -> None:
    made = copy.made()
    copy.write(seeds=[1, 2], students=["no-cot"], baseline=None)
    said = copy.kava("study", "tiny")
    assert "4 cells, 1 to do; stages to run: 1 distill" in " ".join(said.split())
    assert "asked before" not in said
    (new,) = set(copy.made()) - set(made)
    assert new.startswith("no-cot-")


def test_what_is_chosen_after_test_problems_were_asked_is_told(copy: Bench) -> None:
    copy.write(split="validation", students=["no-cot"], baseline=None)
    said = copy.kava("study", "tiny")
    assert "asked before" not in said and "Test problems were asked 6 times" in said
    copy.write(split="validation", students=["no-cot"], baseline=None,
               settings={"students.no-cot.training.warmup": 0.5})  # fmt: skip
    said = copy.kava("study", "tiny")
    assert "asked before with other settings (2 times" in said
    assert len(copy.asked()) == 6


def test_latents_are_changed_and_test_sets_asked_of_what_is_trained(copy: Bench) -> None:
    made, before = copy.made(), (copy.folder / "results.csv").read_text()
    copy.write(interventions=5, test_sets=["longer"])
    said = copy.kava("study", "tiny")
    assert "12 cells, 8 to do" in said and copy.made() == made
    assert "What the latents carry" in (copy.folder / "index.html").read_text()
    after = (copy.folder / "results.csv").read_text()
    longer = [line for line in after.splitlines() if "test_set=longer," in line]
    assert len(longer) == 6 and set(before.splitlines()) | set(longer) == set(after.splitlines())
    assert all(",3," in line for line in longer)
    with (copy.folder / "interventions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["system"], row["seed"], row["n"]) for row in rows] == [
        ("kava", "0", "5"),
        ("kava", "1", "5"),
    ]
    own, asked = (copy.folder / "interventions.csv").read_bytes(), len(copy.asked())
    kinds = [json.loads(line)["kind"] for line in (copy.folder / "asked.jsonl").open()]
    # What was asked before is not asked again, but for those with latents, which then are changed.
    assert asked == 14 and sorted(kinds[6:]) == ["answers"] * 6 + ["interventions"] * 2
    assert "12 cells, 0 to do" in copy.kava("study", "tiny")
    assert (copy.folder / "interventions.csv").read_bytes() == own
    copy.write()
    copy.kava("study", "tiny")
    assert not (copy.folder / "interventions.csv").exists()


def test_what_is_killed_while_it_asks_has_asked(copy: Bench) -> None:
    def changes() -> list[dict[str, Any]]:
        lines = map(json.loads, (copy.folder / "asked.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == "interventions"]

    copy.write(interventions=14)
    settings = copy.path / "pipelines.yaml"
    slow = yaml.safe_load(settings.read_text())
    slow["pipelines"]["tiny"]["evaluate"]["batch_size"] = 1
    settings.write_text(yaml.safe_dump(slow))
    places = ["--pipelines", f"{copy.path}/pipelines.yaml", "--data", f"{copy.path}/data"]
    study = subprocess.Popen(
        ["kava", "study", "tiny", *places],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=copy.path,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    try:
        while not changes():
            assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)  # it asks now: what is written afterwards is not there yet
        study.kill()
        study.wait()
    finally:
        end_session(study.pid)
    assert not list(copy.folder.glob("cells/*-changed-14.json"))
    copy.kava("study", "tiny")
    assert [line["problems"] for line in changes()] == [14] * 3


def test_a_torn_cell_is_asked_again(copy: Bench) -> None:
    results = (copy.folder / "results.csv").read_bytes()
    (torn,) = copy.folder.glob("cells/teacher-cot-*.json")
    whole = torn.read_bytes()
    torn.write_bytes(whole[:40])
    said = copy.kava("study", "tiny")
    assert "6 cells, 1 to do" in said and f"{torn.name} cannot be read" in " ".join(said.split())
    assert torn.read_bytes() == whole and (copy.folder / "results.csv").read_bytes() == results
    assert copy.asked()[6:] == [("teacher-cot", None)]
    assert "6 cells, 0 to do" in copy.kava("study", "tiny")


def test_the_teacher_is_asked_from_the_slots_of_every_store(copy: Bench) -> None:
    copy.write(fidelity=6, grid={"evict.budget": [2, 3, 4]}, seeds=[0])
    said = copy.kava("study", "tiny")
    assert said.count("made fidelity-") == 3 and "kava over 3 settings" in " ".join(said.split())
    with (copy.folder / "fidelity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["n"]) for row in rows] == [
        (f"evict.budget={budget}", "6") for budget in (2, 3, 4)
    ]
    assert len({row["full"] for row in rows}) == 1 and all(float(row["kl"]) >= 0 for row in rows)
    assert "Does fidelity foretell the student?" in (copy.folder / "index.html").read_text()
    shutil.rmtree(copy.folder / "made")  # what it found stays
    assert "0 to do" in copy.kava("study", "tiny")


def test_where_a_stage_fails_the_others_are_summed_up(copy: Bench) -> None:
    """The first student starts from what is not there, and the other one is trained anew."""
    steps = {"students.no-cot.training.steps": 3}
    copy.write(seeds=[0], settings={"students.kava.model": "/nowhere/at-all", **steps})
    before = set(copy.made())
    said = copy.kava("study", "tiny", expect=1)
    failed, trained = sorted(set(copy.made()) - before)
    assert failed.startswith("kava-") and trained.startswith("no-cot-")
    error = said[said.index("error: study tiny") :]
    assert f"study tiny lacks 1 of its 4 cells, since these failed: {failed}. Mend" in error
    assert "`kava distill kava` ended with status 1" in error and "log.txt ends with:" in error
    assert "/nowhere/at-all" in said
    with (copy.folder / "results.csv").open(newline="") as file:
        systems = [row["system"] for row in csv.DictReader(file)]
    assert systems == ["teacher-cot", "teacher-no-cot", "no-cot"]
    assert read_json(copy.folder / "summary.json")["compared"] == []
    copy.write(seeds=[0], settings=steps)
    assert "4 cells, 0 to do" in copy.kava("study", "tiny")
    assert len(read_json(copy.folder / "summary.json")["compared"]) == 1


def test_nothing_is_summed_up_where_nothing_is_there(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.write(settings={"teacher.model": "/nowhere/at-all", "teacher.scratch": {}})
    said = bench.kava("study", "tiny", expect=1)
    assert "lacks 6 of its 6 cells, since these failed: teacher-" in said
    assert "/nowhere/at-all" in said and not (bench.folder / "results.csv").exists()
    assert sorted(name.split("-")[0] for name in bench.made()) == ["prepare", "teacher"]


def test_told_to_end_it_leaves_no_stage_at_work(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.write(settings={"students.kava.training.steps": 1_000_000}, students=["kava"], seeds=[0],
                baseline=None)  # fmt: skip
    places = ["--pipelines", f"{tmp_path}/pipelines.yaml", "--data", f"{tmp_path}/data"]
    study = subprocess.Popen(
        ["kava", "study", "tiny", *places],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    try:
        while not list((tmp_path / "data/.work").glob("distill-kava-*.lock")):
            assert study.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        stages = psutil.Process(study.pid).children()
        study.send_signal(signal.SIGTERM)
        _, said = study.communicate(timeout=300)
    finally:
        end_session(study.pid)
    assert study.returncode == 128 + signal.SIGTERM and "interrupted; run the same" in said, said
    assert stages and not any(stage.is_running() for stage in stages)


def test_it_is_run_once_at_a_time(done: tuple[Bench, str]) -> None:
    bench, _ = done
    with (bench.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use" in bench.kava("study", "tiny", expect=1)

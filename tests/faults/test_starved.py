"""Where a machine gives little, a stage works, or says in a sentence what it lacks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.faults import starve
from tests.faults.conftest import Tell, Whole
from tests.faults.stage import Stage
from tests.golden.inputs import NAME, with_settings
from tests.stages.project import ROOT, digest

MakeStage = Callable[[str], Stage]


def kava(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of its own in `home`."""
    return subprocess.run(
        [sys.executable, "-m", "stages", *arguments],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize("before", [starve.few_files, starve.one_core], ids=lambda f: f.__name__)
def test_few_files_and_one_core_are_enough(
    make_stage: MakeStage, before: Callable[[], None], tell: Tell
) -> None:
    stage = make_stage("evict")
    assert stage.run(before)[0] == 0, stage.said
    tell("starved", before.__name__.replace("_", " "), "works")


@pytest.mark.parametrize("name", ["evict", "teacher"])
def test_a_clock_that_jumps_changes_no_byte(
    whole: Callable[[str], Whole], name: str, tmp_path: Path, tell: Tell
) -> None:
    """A training that was ended goes on from its last checkpoint, whatever the clock says."""
    stage = whole(name).again(tmp_path / "home", name)
    if name == "teacher":
        with_settings(stage.home, "cadence", save_every=1)
        process = stage.start(starve.with_a_clock_that_jumps)
        checkpoints = stage.work.glob
        while not list(checkpoints("teacher-*/checkpoints/checkpoint-4/trainer_state.json")):
            assert process.is_alive(), stage.said
        process.kill()
        process.join()
    assert stage.run(starve.with_a_clock_that_jumps)[0] == 0, stage.said
    assert stage.digests() == whole(name).expected
    if name == "teacher":
        assert re.search(r"continuing from checkpoint-[3456]", stage.said), stage.said
    tell("starved", "a clock that jumps by days", "the same bytes")


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (starve.hardly_any_files, "Too many open files"),
        (starve.little_memory, "not enough memory"),
    ],
    ids=["files", "memory"],
)
def test_what_is_lacking_is_said_and_given_it_goes_on(
    make_stage: MakeStage, before: Callable[[], None], words: str, tell: Tell
) -> None:
    stage = make_stage("generate")
    code, _ = stage.run(before)
    said = " ".join(stage.said.split())
    assert code == 1 and "Traceback" not in said, said
    assert words in said and said.count("error: ") == 1, said
    assert stage.run()[0] == 0, stage.said
    assert list(stage.work.iterdir()) == []
    tell("starved", before.__name__.replace("_", " "), "a sentence; given more, it goes on")


def test_a_home_of_its_own_is_not_needed(make_stage: MakeStage, tell: Tell) -> None:
    """Locale C, a path with spaces and other scripts, a HOME that is none, another hash seed: the
    same bytes."""
    stage = make_stage("evict")
    strange = stage.home.with_name("ein Ort, größer 数 ñ")
    shutil.copytree(stage.home, strange)
    assert stage.run()[0] == 0, stage.said
    done = kava(strange, "evict", LC_ALL="C", HOME="/proc/none", PYTHONHASHSEED="4711")
    assert done.returncode == 0, done.stdout
    assert digest(strange / "data" / NAME / "kv_targets") == stage.digests()[0]
    tell("starved", "locale C, odd path, no HOME, PYTHONHASHSEED", "the same bytes")


def test_a_python_that_reads_no_utf8_says_so(tmp_path: Path, tell: Tell) -> None:
    done = kava(tmp_path, "evict", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 1 and done.stdout.count("\n") == 1, done.stdout
    assert "expected UTF-8" in done.stdout and "PYTHONUTF8=1" in done.stdout
    tell("starved", "a locale without UTF-8", "a sentence")


def test_a_model_of_the_hub_without_a_network(make_stage: MakeStage, tell: Tell) -> None:
    stage = make_stage("teacher")
    file = stage.home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    teacher = {"model": "someone/a-model", "training": {"steps": 2}}
    document["pipelines"][NAME]["teacher"] = teacher
    file.write_text(yaml.safe_dump(document))
    before = stage.digests()
    done = kava(
        stage.home, "teacher", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(stage.home / "hub")
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 1 and "Traceback" not in said, said
    assert said.count("error: ") == 1 and "someone/a-model" in said, said
    assert stage.digests() == before
    tell("starved", "no network, a model of the Hub", "a sentence")


@pytest.mark.slow
def test_ray_without_shared_memory(make_stage: MakeStage, tell: Tell) -> None:
    """/dev/shm of a megabyte, as containers have it."""
    if shutil.which("unshare") is None or subprocess.call(
        ["unshare", "-m", "true"], stderr=subprocess.DEVNULL
    ):
        pytest.skip("no mounts of one's own here")
    stage = make_stage("generate")
    assert stage.run()[0] == 0, stage.said
    (before,) = stage.digests()
    shutil.rmtree(stage.outputs[0])
    file = stage.home / "pipelines.yaml"
    file.write_text(file.read_text().replace("workers: 0", "workers: 2, cpus_per_worker: 0.5"))
    command = (
        f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} -m stages generate"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        cwd=stage.home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert stage.digests() == [before]
    tell("starved", "Ray with a /dev/shm of 1 MB", "works")

"""Workers, restarts and kills never change a byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.stages.project import Project, digest

DATA = Path("data/smoke")


@pytest.mark.parametrize("stage", ["generate", "evict"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_writes_the_same_store(
    copy: Project, stage: str, workers: int
) -> None:
    store = copy.path / DATA / {"generate": "teacher_kv", "evict": "kv_targets"}[stage]
    expected = digest(store)
    shutil.rmtree(store)
    copy.change("pipelines.smoke.resources", {"workers": workers, "cpus_per_worker": 0.5})
    copy.kava(stage)
    assert digest(store) == expected


@pytest.mark.parametrize("stage", ["generate", "evict"])
def test_killed_with_sigkill_a_store_is_completed_and_only_the_rest_is_redone(
    copy: Project, stage: str
) -> None:
    name = {"generate": "teacher_kv", "evict": "kv_targets"}[stage]
    store = copy.path / DATA / name
    expected = digest(store)
    shutil.rmtree(store)
    work = copy.path / "data/.work"
    copy.change("pipelines.smoke.resources", {"workers": 0})

    def side_records() -> list[Path]:
        return sorted(work.glob(f"{name}-*/output/shard-*.json"))

    copy.kill_when(lambda: len(side_records()) >= 2, stage)
    finished = {p.with_suffix(".safetensors") for p in side_records()}
    assert 2 <= len(finished) < len([f for f in expected if f.startswith("shard-")])
    identities = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in finished}
    assert not store.exists()

    copy.kava(stage)
    assert digest(store) == expected
    for file, identity in identities.items():
        stat = (store / file).stat()
        assert (stat.st_ino, stat.st_mtime_ns) == identity, f"{file} was written again"


def test_killed_with_sigkill_a_student_ends_with_the_same_weights(copy: Project) -> None:
    student = copy.path / DATA / "students/kava"
    copy.change("pipelines.smoke.cadence.save_every", 5)
    shutil.rmtree(student)
    copy.kava("distill", "kava")
    expected = digest(student)
    shutil.rmtree(student)

    checkpoints = copy.path / "data/.work"
    copy.kill_when(
        lambda: any(checkpoints.glob("kava-*/checkpoints/checkpoint-15/trainer_state.json")),
        "distill",
        "kava",
    )
    assert not student.exists()
    assert "continuing from checkpoint-1" in copy.kava("distill", "kava")
    assert digest(student) == expected


@pytest.mark.parametrize("student", ["kava", "no-cot"])
def test_processes_that_read_ahead_change_no_weight(copy: Project, student: str) -> None:
    folder = copy.path / DATA / "students" / student
    expected = digest(folder)
    shutil.rmtree(folder)
    copy.change("pipelines.smoke.resources", {"loader_workers": 2})
    copy.kava("distill", student)
    assert digest(folder) == expected

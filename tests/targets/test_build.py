"""One driver makes every store: what is finished is kept, what is missing is done, bytes agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.settings import Resources
from kava_core.store import (
    StoreSpec,
    TargetsStore,
    TeacherStore,
    Work,
    finished_shards,
    write_targets_shard,
    write_teacher_shard,
)
from kava_core.targets.build import Build, ShardCounts, build_store
from tests.stages.project import digest
from tests.store.make import FINGERPRINTS, TARGETS, TEACHER, targets_data, teacher_data

SIZES = (3, 1, 4)
TOKENS = [sum(len(r.cot_ids) for r in targets_data(n, seed=k).records) for k, n in enumerate(SIZES)]


@dataclass(frozen=True)
class Job:
    """Writes made-up shards of either kind; `broken` is one that cannot be made."""

    folder: Path
    spec: StoreSpec = TARGETS
    threads: int = 1
    broken: int | None = None
    worked: list[int] = field(default_factory=list)

    def open(self) -> Callable[[int], ShardCounts]:
        def work(shard: int) -> ShardCounts:
            if shard == self.broken:
                raise KavaError(f"shard {shard} is broken. Mend it.")
            self.worked.append(shard)
            if self.spec.kind == "kv_targets":
                targets = targets_data(SIZES[shard], seed=shard)
                write_targets_shard(self.folder, self.spec, shard, **vars(targets))
            else:
                caches = teacher_data(SIZES[shard], seed=shard)
                write_teacher_shard(self.folder, self.spec, shard, **vars(caches))
            return ShardCounts(SIZES[shard], TOKENS[shard])

        return work


def build(job: Job, workers: int = 0) -> Build:
    resources = Resources(workers=workers, cpus_per_worker=0.5)
    work = Work(job.folder)
    return build_store(
        job,
        len(SIZES),
        work,
        done=work.finished(),
        finish=partial(
            work.finalise,
            job.spec,
            shards=len(SIZES),
            settings={"a": 1},
            fingerprints=FINGERPRINTS,
        ),
        resources=resources,
    )


@pytest.mark.parametrize("kind", ["teacher_kv", "kv_targets"])
def test_a_job_over_shards_becomes_a_store(tmp_path: Path, kind: str) -> None:
    job = Job(tmp_path / "store", TEACHER if kind == "teacher_kv" else TARGETS)
    built = build(job)
    store = (TeacherStore if kind == "teacher_kv" else TargetsStore).open(built.folder)
    assert store.manifest == built.manifest
    assert built.manifest.shards == SIZES
    assert (built.manifest.settings, built.manifest.fingerprints) == ({"a": 1}, FINGERPRINTS)
    assert (built.examples, built.tokens) == (sum(SIZES), sum(TOKENS))
    assert built.tokens == built.manifest.trace_tokens
    assert job.worked == [0, 1, 2]


def test_finished_shards_are_kept_and_the_bytes_are_those_of_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = build(Job(tmp_path / "whole"))
    assert "finished already" not in capsys.readouterr().err
    with pytest.raises(KavaError, match="shard 1 is broken"):
        build(Job(tmp_path / "parts", broken=1))
    assert finished_shards(tmp_path / "parts") == {0}
    job = Job(tmp_path / "parts")
    rest = build(job)
    assert job.worked == [1, 2]
    assert (rest.examples, rest.tokens) == (sum(SIZES[1:]), sum(TOKENS[1:]))  # of this run
    assert rest.manifest == whole.manifest
    assert digest(rest.folder) == digest(whole.folder)
    assert "kv_targets: 1 of 3 shards are finished already" in capsys.readouterr().err


def test_a_store_that_is_complete_is_left_as_it_is(tmp_path: Path) -> None:
    first = build(Job(tmp_path / "store"))
    before, job = digest(first.folder), Job(tmp_path / "store")
    again = build(job)
    assert job.worked == [] and again.manifest == first.manifest
    assert digest(again.folder) == before
    assert again.rate == "all of it was there"


@pytest.mark.usefixtures("two_cores")
def test_workers_make_the_same_store(tmp_path: Path) -> None:
    one, many = build(Job(tmp_path / "one")), build(Job(tmp_path / "many"), workers=2)
    assert digest(one.folder) == digest(many.folder)
    assert (many.examples, many.tokens) == (one.examples, one.tokens)

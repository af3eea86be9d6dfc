"""A shard is written while the next one is computed, in one process and on workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.parallel.overlap import Computed
from kava_core.parallel.shards import run_shards
from kava_core.settings import Resources

PATIENCE = 60.0


@dataclass(frozen=True)
class Writes:
    """Shard n is computed, then written; `log` has a line for whatever begins or ends.

    waits: a shard is written only once another one is being computed. die: a shard in whose writing
    the process is killed, once. torn: a shard that cannot be written; wrong: one that cannot be
    computed.
    """

    folder: Path
    threads: int = 1
    waits: int | None = None
    die: int | None = None
    torn: int | None = None
    wrong: int | None = None

    def open(self) -> Callable[[int], Computed[int]]:
        def work(shard: int) -> Computed[int]:
            self.note(f"compute {shard}")
            if shard == self.wrong:
                raise KavaError(f"shard {shard} is wrong")

            def finish() -> int:
                self.note(f"write {shard}")
                deadline = time.monotonic() + PATIENCE
                while shard == self.waits and f"compute {shard + 1}" not in self.log:
                    assert time.monotonic() < deadline, "nothing is computed meanwhile"
                    time.sleep(0.01)
                if shard == self.torn:
                    raise KavaError(f"no room for shard {shard}")
                if shard == self.die and not (self.folder / "died").exists():
                    (self.folder / "died").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                (self.folder / f"{shard}.txt").write_text(str(shard))
                self.note(f"written {shard}")
                return shard * shard

            return Computed(finish)

        return work

    def note(self, line: str) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(f"{line}\n")

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    @property
    def written(self) -> set[str]:
        return {path.stem for path in self.folder.glob("*.txt")}


def run(job: Writes, workers: int, shards: int = 4) -> list[tuple[int, int]]:
    resources = Resources(workers=workers)
    found = run_shards(job, range(shards), resources, folder=job.folder, examples=lambda *_: 1)
    return list(found)


EXPECTED = [(shard, shard * shard) for shard in range(4)]


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_shard_is_computed_while_one_is_written(tmp_path: Path, workers: int) -> None:
    job = Writes(tmp_path, waits=1)
    assert run(job, workers) == EXPECTED
    assert job.log.index("compute 2") < job.log.index("written 1")
    # No third one is begun before the first is written, so memory holds two.
    for shard in range(2):
        assert job.log.index(f"written {shard}") < job.log.index(f"write {shard + 1}")


@pytest.mark.usefixtures("two_cores")
def test_many_workers_finish_what_they_hold(tmp_path: Path) -> None:
    assert sorted(run(Writes(tmp_path), 2)) == EXPECTED
    assert Writes(tmp_path).written == set("0123")


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("die", [1, 3])
def test_a_worker_that_dies_while_it_writes_costs_what_it_held(tmp_path: Path, die: int) -> None:
    job = Writes(tmp_path, die=die)
    assert sorted(run(job, 1)) == EXPECTED
    assert job.written == set("0123")
    # Those it held, and the one before if its word had not come yet.
    computed = [line for line in job.log if line.startswith("compute")]
    assert len(computed) <= 4 + 2


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_writing_is_told_and_the_rest_is_kept(tmp_path: Path, workers: int) -> None:
    for torn in (1, 3):
        job = Writes(tmp_path / str(torn), torn=torn)
        job.folder.mkdir()
        with pytest.raises(KavaError, match=f"no room for shard {torn}"):
            run(job, workers)
        assert job.written >= set("0123"[:torn]) and str(torn) not in job.written


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_computed_before_an_error_is_written(tmp_path: Path, workers: int) -> None:
    job = Writes(tmp_path, wrong=2)
    with pytest.raises(KavaError, match="shard 2 is wrong"):
        run(job, workers)
    assert job.written == {"0", "1"}


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    found = run_shards(
        Writes(tmp_path), range(4), Resources(workers=0), folder=tmp_path, examples=lambda *_: 1
    )
    assert next(found) == (0, 0)
    found.close()  # as on an interrupt: what is being written still is
    assert threading.active_count() == before
    assert Writes(tmp_path).written == {"0", "1"}

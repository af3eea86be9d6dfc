"""Shards give the same results wherever they are worked on, and a dead worker costs a retry."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import torch

from kava_core.errors import KavaError
from kava_core.parallel.cluster import RAY_FOLDER
from kava_core.parallel.shards import run_shards
from kava_core.settings import Resources

NO_PROCESS = 4_194_305  # above what Linux numbers processes with


@dataclass(frozen=True)
class Squares:
    """Writes shard n's square to a file, like a stage does; the rest is what may go wrong."""

    folder: Path
    threads: int = 1
    mend: int | None = None  # a shard with an error that a person can mend
    bug: int | None = None  # a shard with any other error
    die: int | None = None  # a shard in whose middle the process is killed, once
    deadly: int | None = None  # a shard in whose middle every process is killed
    together: int = 1  # shards wait until so many processes are at work

    def open(self) -> Callable[[int], dict[str, Any]]:
        with (self.folder / "opened").open("a") as file:
            file.write(f"{os.getpid()}\n")

        def work(shard: int) -> dict[str, Any]:
            while len(self.opened) < self.together:
                time.sleep(0.05)
            if shard == self.mend:
                raise KavaError(f"expected something else in shard {shard}. Mend it.")
            if shard == self.bug:
                raise ZeroDivisionError("a fault of the program")
            mark = self.folder / "died"
            if shard == self.die and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if shard == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            (self.folder / f"{shard}.txt").write_text(str(shard * shard))
            pool = pa.default_memory_pool().backend_name
            (self.folder / "pools").open("a").write(f"{pool}\n")
            return {"square": shard * shard, "threads": torch.get_num_threads()}

        return work

    @property
    def opened(self) -> set[str]:
        return set((self.folder / "opened").read_text().split())


SHARDS = [7, 0, 3, 5, 2]


def in_order(
    job: Squares, shards: list[int], workers: int | None, **shares: float
) -> list[tuple[int, dict[str, Any]]]:
    resources = Resources(workers=workers, **shares)
    return list(run_shards(job, shards, resources, folder=job.folder, examples=lambda *_: 1))


def run(job: Squares, workers: int | None, **shares: float) -> dict[int, dict[str, Any]]:
    results = in_order(job, SHARDS, workers, **shares)
    assert len(results) == len(SHARDS)
    return dict(results)


def expected(threads: int = 1) -> dict[int, dict[str, Any]]:
    return {shard: {"square": shard * shard, "threads": threads} for shard in SHARDS}


# --- in process -----------------------------------------------------------------------------------


def test_in_process_opens_once_and_goes_in_order(tmp_path: Path) -> None:
    results = in_order(Squares(tmp_path), SHARDS, 0)
    assert [shard for shard, _ in results] == SHARDS
    assert dict(results) == expected()
    assert Squares(tmp_path).opened == {str(os.getpid())}


def test_in_process_sets_its_threads_and_puts_them_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert run(Squares(tmp_path, threads=before + 1), 0) == expected(before + 1)
    assert torch.get_num_threads() == before
    with pytest.raises(KavaError):
        run(Squares(tmp_path, threads=before + 1, mend=0), 0)
    assert torch.get_num_threads() == before


def test_no_shards_no_work(tmp_path: Path) -> None:
    for workers in (0, 2, None):  # Ray is not even started
        assert in_order(Squares(tmp_path), [], workers) == []
    assert not (tmp_path / "opened").exists()


# --- Ray ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_cores")
class TestOnRay:
    def test_many_workers_and_a_killed_one_give_what_one_process_gives(
        self, tmp_path: Path
    ) -> None:
        """Of four workers two have a core; one is killed in a shard, and another does it."""
        job = Squares(tmp_path, together=2, die=3)
        assert run(job, 4) == expected()
        assert (tmp_path / "died").exists()
        assert len(job.opened) in (2, 3) and str(os.getpid()) not in job.opened
        # Arrow's own keeps what it has decoded; workers give it back.
        assert set((tmp_path / "pools").read_text().split()) == {"system"}
        assert {p.name: p.read_text() for p in tmp_path.glob("*.txt")} == {
            f"{shard}.txt": str(shard * shard) for shard in SHARDS
        }

    def test_a_workers_kava_error_arrives_as_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(KavaError) as error:
            run(Squares(tmp_path, mend=3), 1)
        assert str(error.value) == "expected something else in shard 3. Mend it."
        assert {"0.txt", "7.txt"} <= {p.name for p in tmp_path.glob("*.txt")}

    @pytest.mark.slow
    def test_another_error_says_where_to_look(self, tmp_path: Path) -> None:
        with pytest.raises(KavaError, match=r"(?s)a fault of the program.*resources\.workers: 0"):
            run(Squares(tmp_path, bug=3), 1)

    @pytest.mark.slow
    def test_a_shard_that_every_worker_dies_in_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(KavaError, match=r"4 workers died in shard 3 .*resources\.workers: 0"):
            run(Squares(tmp_path, deadly=3), 1)
        assert len(Squares(tmp_path).opened) == 4

    @pytest.mark.slow
    def test_by_default_the_workers_share_the_cores(self, tmp_path: Path) -> None:
        job = Squares(tmp_path, together=2)
        assert run(job, None) == expected()
        assert len(job.opened) == 2
        one = Squares(tmp_path / "one")
        one.folder.mkdir()
        assert run(one, None, cpus_per_worker=2) == expected()
        assert len(one.opened) == 1

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ({"cpus_per_worker": 3}, r"3 CPUs and 0 GPUs, found 2 CPUs .*cpus_per_worker"),
            ({"gpus_per_worker": 0.5}, r"1 CPUs and 0\.5 GPUs, found 2 CPUs and 0 GPUs"),
        ],
    )
    @pytest.mark.parametrize("workers", [1, None])
    def test_a_worker_that_fits_nowhere_is_an_error_not_a_wait(
        self, tmp_path: Path, workers: int | None, shares: dict[str, float], message: str
    ) -> None:
        with pytest.raises(KavaError, match=message):
            run(Squares(tmp_path), workers, **shares)


@pytest.mark.slow
def test_ray_is_started_and_stopped_where_there_was_none(tmp_path: Path) -> None:
    import ray

    if ray.is_initialized():  # left by the tests above
        ray.shutdown()
    left = Path(tempfile.gettempdir()) / f"{RAY_FOLDER}{NO_PROCESS}-left"
    left.mkdir(exist_ok=True)  # by a run that was killed
    before, handler = psutil.Process().children(recursive=True), signal.getsignal(signal.SIGTERM)
    assert run(Squares(tmp_path, threads=2), 1) == expected(2)
    assert not ray.is_initialized()
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    assert not left.exists() and not list(left.parent.glob(f"{RAY_FOLDER}{os.getpid()}-*"))
    assert signal.getsignal(signal.SIGTERM) is handler

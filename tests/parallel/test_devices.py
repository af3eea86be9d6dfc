"""Who computes on which GPU, on hosts and clusters that say they have some."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.errors import KavaError
from kava_core.parallel import group
from kava_core.parallel.devices import check_own_gpu, gpu_share
from kava_core.parallel.meter import Meter
from kava_core.parallel.nodes import Host
from kava_core.parallel.processes import count_processes, run_processes
from kava_core.parallel.shards import run_shards
from kava_core.parallel.workers import Demand, Pool
from kava_core.settings import Resources
from kava_core.settings.base import Device, Processes

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(scope="module")
def eight_gpus() -> Iterator[None]:
    """A Ray that takes this machine for one of 3 cores and 8 GPUs."""
    import ray

    ray.init(
        address="local",
        num_cpus=3,
        num_gpus=8,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


def see(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Let torch count so many GPUs on this host."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "asked", "visible", "share"),
    [
        ("auto", None, 8, 1),
        ("auto", None, 0, 0),
        ("auto", 0.5, 8, 0.5),
        ("auto", 0, 0, 0),
        ("cpu", None, 8, 0),
        ("cpu", 0, 8, 0),
    ],
)
def test_a_share_is_a_whole_gpu_where_there_are_any(
    device: Device, asked: float | None, visible: int, share: float
) -> None:
    assert gpu_share(device, asked, visible) == share


def test_no_share_beside_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"gpus_per_worker is 0 beside visible GPUs \(8\).*resources\.device to cpu"
    with pytest.raises(KavaError, match=said):
        gpu_share("auto", 0, 8)
    see(monkeypatch, 8)
    with pytest.raises(KavaError, match=said):
        check_own_gpu("auto", 0)
    with pytest.raises(KavaError, match=said):
        count_processes(1, 8, device="auto", gpus=0)
    with pytest.raises(KavaError, match=said):
        seen(Sees(Path(), 1), 1, workers=0, gpus_per_worker=0)


# --- workers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sees:
    """Says which GPUs a worker sees, once `together` workers are at work."""

    folder: Path
    together: int
    threads: int = 1

    def open(self) -> Callable[[int], str]:
        (self.folder / str(os.getpid())).touch()

        def work(_: int) -> str:
            while sum(p.name.isdigit() for p in self.folder.iterdir()) < self.together:
                time.sleep(0.05)
            return os.environ.get(VISIBLE, "all")

        return work


def seen(job: Sees, shards: int, **resources: Any) -> list[str]:
    found = run_shards(
        job, range(shards), Resources(**resources), folder=job.folder, examples=lambda *_: 1
    )
    return [each for _, each in found]


@pytest.mark.usefixtures("eight_gpus")
class TestOfEight:
    def test_each_worker_sees_one_of_its_own(self, tmp_path: Path) -> None:
        found = seen(Sees(tmp_path, 3), 3)
        assert len(set(found)) == 3 and set(found) <= set("01234567")

    def test_workers_with_half_a_gpu_share_one(self, tmp_path: Path) -> None:
        job = Sees(tmp_path, 2)
        found = seen(job, 2, workers=2, gpus_per_worker=0.5)
        assert len(found) == 2 and set(found) <= set("01234567") and len(set(found)) == 1

    def test_on_the_cpu_a_worker_sees_none(self, tmp_path: Path) -> None:
        assert seen(Sees(tmp_path, 1), 1, workers=1, device="cpu") == [""]

    def test_no_share_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(KavaError, match=r"gpus_per_worker is 0 beside visible GPUs \(8\)"):
            seen(Sees(tmp_path, 1), 1, workers=1, gpus_per_worker=0)

    @pytest.mark.parametrize(("device", "asked"), [("auto", 0.5), ("cpu", None)])
    def test_each_process_of_a_training_has_a_whole_one_or_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device, asked: float | None
    ) -> None:
        """Ray Train shows the processes of a node all GPUs that they have, and each uses its own:
        the n-th of them, that of its rank there."""
        import ray.train.torch as train

        gloo = train.TorchConfig(backend="gloo")  # NCCL needs real ones
        monkeypatch.setattr(train, "TorchTrainer", partial(train.TorchTrainer, torch_config=gloo))
        run_processes(
            Notes(tmp_path),
            2,
            folder=tmp_path / "ray",
            stop_file=tmp_path / "stop",
            threads=1,
            cpus=1,
            device=device,
            gpus=asked,
            patience=60,
        )
        notes = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(2)]
        if device == "cpu":
            assert notes == [["none", "cpu"]] * 2
        else:
            (both, first), (same, second) = notes
            assert both == same and len(set(both.split(","))) == 2
            assert {first, second} == {"cuda:0", "cuda:1"}

    def test_auto_takes_those_of_the_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        see(monkeypatch, 0)
        assert count("auto", 64) == 8
        assert count("auto", 1) == 1  # there, not here
        assert count("auto", 64, device="cpu") == 0


@dataclass(frozen=True)
class Notes:
    """Notes, by rank, what a training process sees and what it would compute on."""

    folder: Path

    def __call__(self) -> None:
        seen, device = os.environ.get(VISIBLE, "all"), os.environ["ACCELERATE_TORCH_DEVICE"]
        (self.folder / f"rank-{group.rank()}").write_text(f"{seen or 'none'} {device}")


# --- processes ------------------------------------------------------------------------------------


def count(asked: Processes, batch_size: int, device: Device = "auto") -> int:
    return count_processes(asked, batch_size, device=device, gpus=None)


@pytest.mark.parametrize(
    ("asked", "batch_size", "gpus", "processes"),
    [
        (1, 64, 8, 0),  # this one
        (2, 64, 8, 2),
        (2, 64, 0, 2),
        ("auto", 64, 0, 0),
        ("auto", 64, 1, 0),
        ("auto", 64, 8, 8),
        ("auto", 66, 8, 6),
        ("auto", 7, 4, 0),
    ],
)
def test_auto_takes_the_gpus_there_are(
    monkeypatch: pytest.MonkeyPatch, asked: Processes, batch_size: int, gpus: int, processes: int
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    see(monkeypatch, gpus)
    assert count(asked, batch_size) == processes


def test_gpus_that_stand_idle_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    see(monkeypatch, 8)
    count("auto", 66)
    assert "6 of 8 GPUs train: batch_size 66 is shared evenly" in capsys.readouterr().err


def test_a_gpu_of_another_kind_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demand = Demand(workers=2, threads=1, cpus=1, gpus=1, patience=1)
    pool: Pool[int] = Pool(
        None, deque(), demand, tmp_path, lambda _: (), lambda *_: 1, Meter(metrics=False)
    )
    for name, gpu in (("a", "H100"), ("b", "H100"), ("c", "A100"), ("d", "A100")):
        pool._compare(Host(name, {}, gpu=gpu))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("GPUs of different kinds: H100 on a, A100 on c.") == said.count("kinds") == 1

"""Several processes train as one does: the same losses, the same ends, one set of files."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.callbacks import STOP_FILE
from kava_core.distill.fit import Stopped, fit
from kava_core.distill.match import Match
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.parallel import group
from kava_core.parallel.processes import run_processes
from kava_core.settings import Cadence, HeldOut
from kava_core.store import ShardShuffleSampler, TargetsStore
from tests.distill import toy
from tests.distill.toy import TRAINING, files, same, toy_student, toy_traces, write_store

STEPS = toy.but(TRAINING, steps=8, held_out=HeldOut(records=5, every=4))
CADENCE = Cadence(log_every=1, save_every=3, gradient_share_every=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 records, of which the last 5 are held out: 3 steps of 2 batches of 4 an epoch."""
    folder = tmp_path_factory.mktemp("processes") / "store"
    write_store(folder, toy_traces(31), shard_size=6)
    return folder


@dataclass(frozen=True)
class Training:
    """A run of `fit`, in one process or as one of several.

    Each process writes down the records of its batches; in its `at`-th batch, process `of` does
    what `trouble` says. With `temporary`, the first one is still at its files of a checkpoint, each
    put down under another name at first, when the other one writes its own.
    """

    store: Path
    folder: Path
    dropout: float = 0.0
    iterations: int = 2
    trouble: str = ""
    of: int = 1
    at: int = 0

    def __call__(self) -> None:
        torch.set_num_threads(1)
        store = TargetsStore.open(self.store)
        model = toy_student(self.dropout, iterations=self.iterations)
        objective = toy.toy_objective(store, alpha_codi=1e-9, w_cot=1.0)
        terms = student_terms(objective, Match.of(store))
        self.folder.mkdir(exist_ok=True)
        if self.trouble == "temporary":
            if group.rank() == 0:
                model.save_pretrained = partial(with_temporary, model.save_pretrained)
            else:
                torch.save = partial(later, torch.save)
        seen = toy.Seen()

        def recorded(student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
            result = terms(student, batch)
            if not student.training:
                return result
            if batch["ids"] not in seen.batches:  # else it was read to measure, too
                with (self.folder / f"seen-{group.rank()}.txt").open("a") as file:
                    file.write(" ".join(batch["ids"]) + "\n")
            if seen.number(batch) == self.at and group.rank() == self.of:
                if self.trouble == "nan":
                    return {**result, "kv": result["kv"] * float("nan")}
                if self.trouble == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KavaError("expected something else. Mend it.")
            return result

        fit(
            model,
            recorded,
            TargetsDataset(store, chains=True),
            ShardShuffleSampler((6, 6, 6, 6, 2), seed=TRAINING.seed),
            STEPS,
            CADENCE,
            folder=self.folder / "checkpoints",
            curves=self.folder / "curves",
            title="toy",
            held_out=range(26, 31),
        )
        if group.rank() == 0:
            torch.save(model.state_dict(), self.folder / "weights.pt")

    @property
    def weights(self) -> dict[str, Tensor]:
        return torch.load(self.folder / "weights.pt")

    def seen(self, rank: int) -> list[list[str]]:
        text = (self.folder / f"seen-{rank}.txt").read_text()
        return [line.split() for line in text.splitlines()]

    def curve(self, name: str) -> list[float]:
        text = (self.folder / "curves" / "plots" / "metrics" / f"{name}.tsv").read_text()
        return [float(row.split("\t")[1]) for row in text.splitlines()[1:]]

    def but(self, **changes: Any) -> Training:
        return toy.replace(self, **changes)


def with_temporary(save: Callable[..., None], folder: str, **options: Any) -> None:
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        temporary = [Path(folder, f".tmp{i}") for i in range(20)]
        for each in temporary:
            each.touch()
        for each in temporary:
            each.unlink()
    save(folder, **options)


def later(save: Callable[..., None], *content: Any, **options: Any) -> None:
    time.sleep(0.2)
    save(*content, **options)


def in_two(training: Training) -> None:
    run_processes(
        training,
        2,
        folder=training.folder / "ray",
        stop_file=training.folder / "checkpoints" / STOP_FILE,
        threads=1,
        cpus=1,
        device="auto",
        gpus=None,
        patience=60,
    )


@pytest.mark.usefixtures("two_cores")
class TestTwo:
    def test_two_processes_lose_what_one_loses(
        self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without iterations the projection has no part in the loss, which must not matter."""
        one = Training(store, tmp_path / "one", iterations=0)
        two = one.but(folder=tmp_path / "two", trouble="temporary")
        before = torch.get_num_threads()
        one()
        torch.set_num_threads(before)
        said = capsys.readouterr().err
        in_two(two)
        for text in (said, capsys.readouterr().err):
            assert text.count("the codi term carries 0.00% of the gradient at step 0") == 1
            assert "were lost" not in text, text
        # Batch k of one process is cut in two, in order.
        assert len(one.seen(0)) == 16
        for whole, first, second in zip(one.seen(0), two.seen(0), two.seen(1), strict=True):
            assert whole == first + second and len(first) == 2
        names = {p.name for p in (one.folder / "curves" / "plots" / "metrics").iterdir()}
        assert names == {p.name for p in (two.folder / "curves" / "plots" / "metrics").iterdir()}
        assert {"loss_kv.tsv", "eval_loss_kv.tsv", "gradient_share_kv.tsv"} <= names
        for name in sorted(names):
            stem = name.removesuffix(".tsv")
            assert two.curve(stem) == pytest.approx(one.curve(stem), rel=1e-4, abs=1e-12), stem
        largest = max(float((x - two.weights[k]).abs().max()) for k, x in one.weights.items())
        assert largest < 2e-4  # Adam divides by the gradient's size, and with it by its rounding

    def test_a_broken_loss_in_one_process_ends_all_and_names_its_records(
        self, store: Path, tmp_path: Path
    ) -> None:
        training = Training(store, tmp_path / "run", trouble="nan", at=10)
        with pytest.raises(KavaError, match=r"the loss became nan at step 5, on the records") as e:
            in_two(training)
        assert f"records {', '.join(training.seen(1)[9])}. The state" in str(e.value)
        assert sorted(p.name for p in (training.folder / "checkpoints").glob("checkpoint-*")) == [
            "checkpoint-3",
            "checkpoint-4",
        ]

    @pytest.mark.slow
    def test_killed_it_goes_on_and_stopped_and_repeated_too_and_ends_alike(
        self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One process dies in the ninth batch of each attempt, of which the third has fewer."""
        whole = Training(store, tmp_path / "whole", dropout=0.1)
        in_two(whole)
        killed = whole.but(folder=tmp_path / "killed")
        in_two(killed.but(trouble="die", at=9))
        said = " ".join(capsys.readouterr().err.split())
        assert "all go on from the last checkpoint (2 of 3)" in said and "(3 of 3)" not in said
        run = whole.but(folder=tmp_path / "run")

        def terminate() -> None:
            while not (run.folder / "seen-0.txt").exists() or len(run.seen(0)) < 8:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        threading.Thread(target=terminate).start()
        with pytest.raises(Stopped, match=r"toy: stopped at step \d of 8 and saved") as ended:
            in_two(run)
        assert ended.value.status == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
        in_two(run)
        for each in (killed, run):
            assert same(each.weights, whole.weights)
            assert files(each.folder / "curves") == files(whole.folder / "curves")

    @pytest.mark.slow
    def test_what_goes_wrong_in_one_process_arrives_as_it_is(
        self, store: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(KavaError) as error:
            in_two(Training(store, tmp_path / "run", trouble="mend", at=3))
        assert str(error.value) == "expected something else. Mend it."

    def test_more_processes_than_fit_are_an_error_not_a_wait(self, tmp_path: Path) -> None:
        with pytest.raises(KavaError, match=r"room for 3 processes .* found room for 2"):
            run_processes(
                Training(tmp_path, tmp_path),
                3,
                folder=tmp_path / "ray",
                stop_file=tmp_path / "stop",
                threads=1,
                cpus=1,
                device="auto",
                gpus=None,
                patience=60,
            )

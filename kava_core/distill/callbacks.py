"""What goes on around the steps of a run: its window of measurements, its progress bar, its loss
curves, its end by a signal."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dvclive import Live
from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from kava_core.console import progress
from kava_core.distill.checkpoints import RandomState
from kava_core.parallel import group
from kava_core.settings import Training
from kava_core.store import ShardShuffleSampler

STOP_FILE = "stop"
FOLLOW_SECONDS = 0.5
LOGGED = (
    "loss",
    "eval_loss",
    "exact_match",
    "learning_rate",
    "grad_norm",
    "gradient_share",
    "weight",
)


class _Files(Live):
    """The files of a Live, without its look at repositories: it would make a DVC repository of any
    git repository around, and end in an error in one without a commit."""

    def _init_dvc(self) -> None:
        pass


class Epochs(TrainerCallback):
    """Tells the sampler its epoch. Accelerate does too, but does not reach it in a continued run of
    several processes, whose epochs would all be the first one."""

    def __init__(self, sampler: ShardShuffleSampler, training: Training) -> None:
        self.sampler = sampler
        self.steps = training.steps_per_epoch(len(sampler))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.sampler.set_epoch(state.global_step // self.steps)


class Window(TrainerCallback, ExportableState):
    """What has been measured since the last log. It is part of every checkpoint, so that a
    continued run logs what an uninterrupted one does, wherever it was stopped.

    weights: those found by measuring. before: this window and the random numbers as they were when
    the step at work began."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.batches = 0
        self.shares: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.before: tuple[dict[str, Any], RandomState] | None = None

    def attributes(self) -> dict[str, Any]:
        return {
            "sums": dict(self.sums),
            "batches": self.batches,
            "shares": dict(self.shares),
            "weights": dict(self.weights),
        }

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.attributes()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        saved: Any = state.stateful_callbacks
        vars(self).update(saved[type(self).__name__]["attributes"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.before is not None:
            self.before = (self.attributes(), self.before[1])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Here, not when the next step begins: a new epoch's loader draws in between.
        self.before = ({}, RandomState.now())

    def rewind(self) -> None:
        """Back to where the step at work began; this run has taken a step before it."""
        assert self.before is not None
        attributes, numbers = self.before
        vars(self).update(attributes)
        numbers.restore()


class ProgressBar(TrainerCallback):
    """Shows the step and the losses of the last log."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self.display, self.task = display, task

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.display.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        note = _note(logs or {})
        if note:
            self.display.update(self.task, note=note)


@contextmanager
def following(curves: Path, title: str, steps: int) -> Iterator[Progress]:
    """The progress bar of a run in other processes, from the curves they write."""
    over = threading.Event()
    with progress() as display:
        task = display.add_task(title, total=steps, note="")

        def follow() -> None:
            last = False
            while not last:
                last = over.wait(FOLLOW_SECONDS)
                try:
                    metrics = json.loads((curves / "metrics.json").read_text(encoding="utf-8"))
                except (OSError, json.JSONDecodeError):  # not there yet, or being written
                    continue
                display.update(task, completed=metrics["step"], note=_note(metrics))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield display
        finally:
            over.set()
            thread.join()


def _note(logs: dict[str, float]) -> str:
    """`loss 0.512  kv 0.301 …` of what is logged."""
    return "  ".join(
        f"{name.removeprefix('loss_')} {value:.3f}"
        for name, value in logs.items()
        if name.startswith("loss")
    )


class Curves(TrainerCallback):
    """Loss curves in DVCLive's files. What a killed run wrote past its checkpoint is written anew,
    so that the files of a repeated run are those of an uninterrupted one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.live = _Files(str(self.folder), save_dvc_exp=False, dvcyaml=None)
        for entry in state.log_history:
            self._write(entry, int(entry["step"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._write(logs or {}, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.live.end()

    def _write(self, logs: dict[str, float], step: int) -> None:
        if not logs.keys() & {"loss", "eval_loss", "exact_match"}:
            return  # the Trainer's closing summary holds seconds, which no artefact may
        self.live.step = step
        # Sorted, as the entries of a checkpoint are: the order of the files' keys must not tell.
        for name, value in sorted(logs.items()):
            if name.startswith(LOGGED):
                self.live.log_metric(name, value)
        self.live.make_summary()


class Stop(TrainerCallback):
    """Saves and ends the run after the step at work, at a signal or once a file is there."""

    def __init__(self, termination: threading.Event, file: Path) -> None:
        self.termination, self.file = termination, file
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # All processes must stop after the same step.
        self.stopped = group.any_of(self.termination.is_set() or self.file.exists())
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True


class Termination:
    """Turns SIGTERM into an event while training runs (main thread only, as signals are)."""

    def __enter__(self) -> threading.Event:
        self.event = threading.Event()
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self._receive)
        return self.event

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.event.set()

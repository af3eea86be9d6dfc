"""Fit a model with `transformers.Trainer`: resumable at any step, the same to the last bit.

Checkpoints, schedules, mixed precision, clipping and distribution are the Trainer's. What is ours
is the loss, the order of the data, and that a killed run goes on where its last whole checkpoint
stands and ends with the weights of a run that was never killed.

In a process group (`kava_core.parallel.processes`) every process calls `fit`: each works on its
part of every batch, and what is logged, saved and decided is that of all of them together.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from kava_core.console import progress, say
from kava_core.errors import KavaError
from kava_core.parallel import group

Batch = dict[str, Any]
# Maps a model and a batch to named weighted terms, each a scalar; their sum is minimised.
Terms = Callable[[nn.Module, Batch], dict[str, Tensor]]

LOWEST_SHARE = 0.01
STOP_FILE = "stop"
FOLLOW_SECONDS = 0.5
LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "gradient_share")


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast; every field but the last changes the result.

    `warmup` is the share of `steps` over which the learning rate rises; a batch is `batch_size`
    records (of all processes together), `accumulation` of them make a step. evaluate_every: steps
    between two looks at the held-out records; 0: none.
    """

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    weight_decay: float
    warmup: float
    max_grad_norm: float
    precision: str
    log_every: int
    save_every: int
    seed: int
    evaluate_every: int = 0


class Stopped(KavaError):
    """SIGTERM arrived; the state is saved and the run can be repeated."""


def fit(
    model: PreTrainedModel,
    terms: Terms,
    dataset: Dataset[Any],
    sampler: Sampler[int],
    settings: FitSettings,
    *,
    folder: Path,
    live_folder: Path,
    title: str,
    loader_workers: int = 0,
    shares_every: int = 0,
    held_out: Sequence[int] = (),
) -> None:
    """Train `model` in place.

    dataset: `dataset.__getitems__(indices)` returns a collated batch; the sampler's order is that
    of the run and depends on (seed, epoch) alone. folder: where checkpoints live until the run is
    complete; a whole checkpoint found there is continued from. live_folder: loss curves in
    DVCLive's format. shares_every: every so many steps (0: never) the share of each term in the
    gradient's norm is measured and logged. held_out: indices of the dataset that the sampler leaves
    out, on which the terms are measured every `settings.evaluate_every` steps.

    A file `stop` in `folder` does what SIGTERM does: the state is saved after the step at work.

    Raises KavaError on a loss that is not a number (naming the records), `Stopped` on SIGTERM.
    """
    # The Trainer moves the model; initial states must not depend on what ran before.
    set_seed(settings.seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // group.size(),
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=round(settings.warmup * settings.steps),
        lr_scheduler_type="cosine",
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused there
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        eval_strategy="steps" if settings.evaluate_every else "no",
        eval_steps=settings.evaluate_every or None,
        seed=settings.seed,
        # Not persistent: only fresh loader processes draw from the random numbers as none do.
        dataloader_num_workers=loader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        remove_unused_columns=False,
        label_names=[],
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
    )
    checkpoint = group.from_first(lambda: last_whole_checkpoint(folder))
    if checkpoint:
        say(f"{title}: continuing from {checkpoint.name}")
    window = _Window()
    with progress() as display, _Terminable() as termination:
        task = display.add_task(title, total=settings.steps, note="")
        stop = _Stop(termination, folder / STOP_FILE)
        callbacks: list[TrainerCallback] = [_Epochs(sampler, settings), window, stop]
        if group.rank() == 0:
            callbacks += [_Display(display, task), _Live(live_folder)]
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=dataset if settings.evaluate_every else None,
            data_collator=_as_it_is,  # type: ignore[arg-type]
            callbacks=callbacks,
        )
        trainer.bind(terms, sampler, shares_every, window, held_out)
        trainer.pop_callback(_printer())
        if group.size() > 1:
            set_seed(settings.seed + group.rank())  # no two processes drop out the same units
        if checkpoint and _step_of(checkpoint) >= settings.steps:
            trainer.take_over(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # Mixed precision wrapped the model's forward; the caller gets its own model back.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if stop.stopped and trainer.state.global_step < settings.steps:
        raise Stopped(
            f"{title}: stopped at step {trainer.state.global_step} of {settings.steps} and saved. "
            "Run the same command again to go on."
        )


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the Trainer writes its state last)."""
    found = sorted(folder.glob("checkpoint-*"), key=_step_of)
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)  # a kill left it half-written
        else:
            return checkpoint
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Epochs(TrainerCallback):
    """Tells the sampler its epoch. Accelerate does too, but does not reach it in a continued run of
    several processes, whose epochs would all be the first one."""

    def __init__(self, sampler: Sampler[int], settings: FitSettings) -> None:
        self.sampler = cast(Any, sampler)  # its length and `set_epoch` are no part of the type
        batches = len(self.sampler) // settings.batch_size
        self.steps = -(-batches // settings.accumulation)  # in an epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.sampler.set_epoch(state.global_step // self.steps)


class _Window(TrainerCallback, ExportableState):
    """What has been measured since the last log. It is part of every checkpoint, so that a
    continued run logs what an uninterrupted one does, wherever it was stopped.

    before: this window and the random numbers as they were when the step at work began."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.batches = 0
        self.shares: dict[str, float] = {}
        self.before: tuple[dict[str, Any], Any] | None = None

    def attributes(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "batches": self.batches, "shares": dict(self.shares)}

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
        self.before = ({}, _random_state())

    def rewind(self) -> None:
        """Back to where the step at work began; this run has taken a step before it."""
        assert self.before is not None
        attributes, numbers = self.before
        vars(self).update(attributes)
        _set_random_state(numbers)


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[3])


class _Trainer(Trainer):
    model_accepts_loss_kwargs = False  # every term is a mean over records: plain averaging is right

    def bind(
        self,
        terms: Terms,
        sampler: Sampler[int],
        shares_every: int,
        window: _Window,
        held_out: Sequence[int],
    ) -> None:
        self.terms = terms
        self.sampler = sampler
        self.shares_every = shares_every
        self.window = window
        self.held_out = held_out
        self.warned: set[str] = set()

    def take_over(self, checkpoint: Path) -> None:
        """End as the run did that wrote its last checkpoint; `train` would take one step more."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        terms = self.terms(model, inputs)
        if self.shares_every and self.state.global_step % self.shares_every == 0:
            self._measure_shares(terms, model)
        loss = torch.stack(list(terms.values())).sum()
        # One exchange: the means over all processes, which are not finite if any process's is not.
        values = group.mean(torch.stack([loss, *terms.values()]).detach()).tolist()
        if not math.isfinite(values[0]):
            self._give_up(model, values[0], loss, inputs["ids"])
        window = self.window
        for name, value in zip(("loss", *terms), values, strict=True):
            window.sums[name] = window.sums.get(name, 0.0) + value
        window.batches += 1
        return (loss, None) if return_outputs else loss

    def _give_up(self, model: nn.Module, value: float, own: Tensor, ids: list[str]) -> None:
        """Save what the steps before this one gave, and say where it went wrong."""
        step = self.state.global_step
        saved = group.from_first(lambda: last_whole_checkpoint(Path(str(self.args.output_dir))))
        if step > (_step_of(saved) if saved else 0):
            self.window.rewind()
            self._save_checkpoint(model, trial=None)
        bad = group.gather([] if torch.isfinite(own) else ids)
        raise KavaError(
            f"the loss became {value:g} at step {step + 1}, on the records "
            f"{', '.join(name for names in bad for name in names)}. The state before that step is "
            "saved. Lower the learning rate, or look at these records."
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process writes the Trainer's state next, which makes the checkpoint a whole one.
        group.wait()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The terms on the held-out records, logged as `eval_loss…`; draws no random numbers."""
        assert self.model is not None
        own = self.held_out[group.rank() :: group.size()]
        step = self.args.per_device_train_batch_size
        sums: dict[str, float] = {}
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for first in range(0, len(own), step):
                indices = list(own[first : first + step])
                batch = self.train_dataset.__getitems__(indices)  # type: ignore[union-attr]
                terms = self.terms(self.model, send_to_device(batch, self.args.device))
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(term) * len(indices)
        self.model.train()
        parts = [part for part in group.gather(sums) if part]  # a process may have no records
        logs = {
            f"eval_loss_{name}": sum(part[name] for part in parts) / len(self.held_out)
            for name in parts[0]
        }
        logs["eval_loss"] = sum(logs.values())
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _measure_shares(self, terms: dict[str, Tensor], model: nn.Module) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        norms = {}
        for name, term in terms.items():
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            squares = [group.mean(g.float()).square().sum() for g in gradients if g is not None]
            norms[name] = float(torch.stack(squares).sum().sqrt())
        total = sum(norms.values()) or 1.0
        self.window.shares = {name: norm / total for name, norm in norms.items()}
        for name, share in self.window.shares.items():
            if share < LOWEST_SHARE and name not in self.warned:
                self.warned.add(name)
                say(
                    f"warning: the {name} term carries {share:.2%} of the gradient at step "
                    f"{self.state.global_step}; at this weight it teaches next to nothing."
                )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        window = self.window
        if window.batches and "loss" in logs:
            for name, total in window.sums.items():
                logs["loss" if name == "loss" else f"loss_{name}"] = total / window.batches
            for name, share in window.shares.items():
                logs[f"gradient_share_{name}"] = share
            window.sums, window.batches = {}, 0
        super().log(logs, *args, **kwargs)


@contextmanager
def following(live_folder: Path, title: str, steps: int) -> Iterator[Progress]:
    """The progress bar of a run in other processes, from the metrics they write."""
    over = threading.Event()
    with progress() as display:
        task = display.add_task(title, total=steps, note="")

        def follow() -> None:
            last = False
            while not last:
                last = over.wait(FOLLOW_SECONDS)
                try:
                    text = (live_folder / "metrics.json").read_text(encoding="utf-8")
                    metrics = json.loads(text)
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


class _Display(TrainerCallback):
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


class _Live(TrainerCallback):
    """Loss curves in DVCLive's files. What a killed run wrote past its checkpoint is written anew,
    so that the files of a repeated run are those of an uninterrupted one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        from dvclive import Live

        self.live = Live(str(self.folder), save_dvc_exp=False, dvcyaml=None)
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
        if "loss" not in logs and "eval_loss" not in logs:
            return  # the Trainer's closing summary holds seconds, which no artefact may
        self.live.step = step
        # Sorted, as the entries of a checkpoint are: the order of the files' keys must not tell.
        for name, value in sorted(logs.items()):
            if name.startswith(LOGGED):
                self.live.log_metric(name, value)
        self.live.make_summary()


class _Stop(TrainerCallback):
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


class _Terminable:
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


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _printer() -> type[TrainerCallback]:
    """The Trainer's own callback that prints every log to stdout when there is no tqdm."""
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback

"""Fit a model with `transformers.Trainer`: resumable at any step, the same to the last bit.

Checkpoints, schedules, mixed precision, clipping and distribution are the Trainer's. What is ours
is the loss (`terms`, `trainer`), the order of the data, and that a killed run goes on where its
last whole checkpoint stands (`checkpoints`) and ends with the weights of a run that was never
killed.

In a process group (`kava_core.parallel.processes`) every process calls `fit`: each works on its
part of every batch, and what is logged, saved and decided is that of all of them together.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from kava_core.artefacts import ensure_folder
from kava_core.console import progress, say
from kava_core.distill.ahead import ReadAhead
from kava_core.distill.balance import Balance
from kava_core.distill.callbacks import (
    STOP_FILE,
    Curves,
    Epochs,
    ProgressBar,
    Stop,
    Termination,
    Window,
)
from kava_core.distill.checkpoints import last_whole_checkpoint, step_of
from kava_core.distill.curriculum import Stages
from kava_core.distill.exact_match import Asking, Questions
from kava_core.distill.terms import Batch, Terms
from kava_core.distill.tracking import Tracking
from kava_core.distill.trainer import TermsTrainer
from kava_core.errors import KavaError
from kava_core.models.recompute import recomputed
from kava_core.parallel import group
from kava_core.settings import Cadence, Training
from kava_core.store import ShardShuffleSampler


class Stopped(KavaError):
    """The run was told to end, by a signal or a file; its state is saved and it can be repeated."""

    def __init__(self, message: str, number: int | None = None) -> None:
        """number: of the signal, of which a command's status tells as a shell expects."""
        super().__init__(message)
        if number is not None:
            self.status = 128 + number


class OneDevice(TrainingArguments):
    """Those of a process that computes on one device, however many GPUs it sees.

    On several the Trainer would take all by `nn.DataParallel`, which multiplies the batch, repeats
    the order of the epochs and cannot gather what our models return.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def fit(
    model: PreTrainedModel,
    terms: Terms,
    dataset: Dataset[Any],
    sampler: ShardShuffleSampler,
    training: Training,
    cadence: Cadence,
    *,
    folder: Path,
    curves: Path,
    title: str,
    loader_workers: int = 0,
    held_out: Sequence[int] = (),
    balance: Balance | None = None,
    questions: Questions | None = None,
    tracking: Tracking | None = None,
    stages: Stages | None = None,
) -> None:
    """Train `model` in place.

    dataset: `dataset.__getitems__(indices)` returns a collated batch; the sampler's order is that
    of the run and depends on (seed, epoch) alone. training: a batch is `batch_size` records (of all
    processes together), `accumulation` of them make a step; its threads and adapters are the
    caller's. cadence: changes no weight. folder: where checkpoints live until the run is complete;
    a whole checkpoint found there is continued from. curves: a folder for the loss curves, in
    DVCLive's format. held_out: indices of the dataset that the sampler leaves out, on which the
    terms are measured every `training.held_out.every` steps. balance: what the terms are multiplied
    with; None: nothing. questions: what is asked every `training.exact_match.every` steps.
    tracking: who else is told of the run; None: nobody. stages: of a curriculum, at whose
    beginnings the optimiser begins anew, and with which the learning rate is constant.

    A file `stop` in `folder` does what SIGTERM does: the state is saved after the step at work.

    Raises KavaError on a loss that is not a number (naming the records), `Stopped` if told to end.
    """
    # The Trainer moves the model; initial states must not depend on what ran before.
    set_seed(training.seed)
    evaluate_every = training.held_out.every if training.held_out else None
    steps = training.total_steps(len(sampler))
    arguments = OneDevice(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size // group.size(),
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        warmup_steps=round(training.warmup * steps),
        lr_scheduler_type="constant_with_warmup" if stages else "cosine",
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused there
        logging_steps=cadence.log_every,
        save_steps=cadence.save_every,
        save_total_limit=None,  # by their clock; `TermsTrainer` keeps the last by their steps
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every,
        seed=training.seed,
        # Not persistent: only fresh loader processes draw from the random numbers as none do.
        dataloader_num_workers=loader_workers,
        # A fork of this process would inherit the locks of its threads (Ray's, a bucket's), held.
        dataloader_multiprocessing_context="forkserver" if loader_workers else None,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        remove_unused_columns=False,
        label_names=[],
        report_to=[],  # ours are told by callbacks of ours
        run_name=tracking.name if tracking else None,
        disable_tqdm=True,
        optim="adamw_torch",
    )
    multiprocessing.set_forkserver_preload(["__main__", __name__])  # imported once, not by each
    checkpoint = group.from_first(lambda: last_whole_checkpoint(ensure_folder(folder)))
    if checkpoint:
        say(f"{title}: continuing from {checkpoint.name}")
    window = Window()
    with progress() as display, Termination() as termination:
        task = display.add_task(title, total=steps, note="")
        stop = Stop(termination, folder / STOP_FILE)
        callbacks: list[TrainerCallback] = [Epochs(sampler, training), window, stop]
        callbacks += [stages] if stages else []
        if group.rank() == 0:
            callbacks += [ProgressBar(display, task), Curves(curves)]
            callbacks += tracking.callbacks() if tracking else []
        trainer = TermsTrainer(
            terms=terms,
            balance=balance or Balance(),
            sampler=sampler,
            window=window,
            shares_every=cadence.gradient_share_every,
            held_out=held_out,
            model=model,
            args=arguments,
            train_dataset=ReadAhead(dataset) if loader_workers else dataset,
            eval_dataset=dataset if evaluate_every else None,
            data_collator=_as_it_is,
            callbacks=callbacks,
        )
        asking = None
        if questions is not None and training.exact_match is not None:
            asking = Asking(questions, training.exact_match, folder)
            asking.trainer = trainer
            trainer.add_callback(asking)
        trainer.pop_callback(PrinterCallback)  # prints every log to stdout when there is no tqdm
        if group.size() > 1:
            set_seed(training.seed + group.rank())  # no two processes drop out the same units
        if checkpoint and step_of(checkpoint) >= steps:
            trainer.take_over(checkpoint)
        else:
            with recomputed(model) if training.gradient_checkpointing else nullcontext():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finished = trainer.state.global_step >= steps
        if asking is not None and finished:
            asking.settle(trainer.state, title)
        # Mixed precision wrapped the model's forward; the caller gets its own model back.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if stop.stopped and not finished:
        # Of several processes the one that started them makes the file when it gets the signal.
        told = termination.is_set() or group.size() > 1
        raise Stopped(
            f"{title}: stopped at step {trainer.state.global_step} of {steps} and saved. "
            "Run the same command again to go on.",
            signal.SIGTERM if told else None,
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch

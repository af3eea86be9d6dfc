"""Coconut's curriculum: latents take the place of one written step after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kava_core.console import say
from kava_core.distill.terms import Batch
from kava_core.errors import KavaError
from kava_core.models.batching import pad
from kava_core.parallel import group
from kava_core.record import Record
from kava_core.settings import Student


class Stages(TrainerCallback):
    """The stages of a run, and the one that it is in.

    In stage k, from 1 to `count`, k · `per_step` latents stand for the first k steps of a trace,
    and the student writes the other steps, the answer prompt and the answer. In the stage after
    these it thinks in all its latents and writes the answer alone, as when it is asked. A stage of
    `length` optimiser steps begins with an optimiser that remembers nothing.
    """

    def __init__(self, per_step: int, count: int, length: int) -> None:
        self.per_step, self.count, self.length = per_step, count, length
        self.stage = 1

    @classmethod
    def of(cls, settings: Student, latents: int, records: int, path: str) -> Stages | None:
        """Those of a student with so many latents, trained on so many records; None: it has none.

        KavaError where a stage has not `latents_per_step` latents, or the last no step of training.
        path: of the student's settings, for messages.
        """
        curriculum, training = settings.curriculum, settings.training
        if curriculum is None:
            return None
        per_step = curriculum.latents_per_step
        if latents % per_step:
            raise KavaError(
                f"{path}.curriculum: expected latents_per_step {per_step} to divide the number of "
                f"latents, found {latents}. Change it, or evict.budget."
            )
        length = curriculum.steps or 0
        if curriculum.epochs is not None:
            length = curriculum.epochs * training.steps_per_epoch(records)
        count, steps = latents // per_step, training.total_steps(records)
        if count * length >= steps:
            raise KavaError(
                f"{path}.curriculum: {count} stages of {length} steps take {count * length} steps, "
                f"and the training has {steps}: nothing is left for the last stage, in which only "
                f"the answer is written. Lengthen {path}.training, or shorten the stages."
            )
        return cls(per_step, count, length)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        done, into = divmod(state.global_step, self.length)
        self.stage = min(done, self.count) + 1
        if into or not 0 < done <= self.count:
            return
        assert optimizer is not None
        optimizer.state.clear()
        if group.rank() == 0:
            say(f"step {state.global_step}: latents stand for {self._what()} now")

    def _what(self) -> str:
        return "all steps" if self.stage > self.count else f"the first {self.stage} steps"

    def cut(self, batch: Batch) -> Batch:
        """The batch of a `TargetsDataset`, its records among it, as this stage teaches it."""
        if self.stage > self.count:
            return batch
        records: list[Record] = batch["records"]
        rests = [[*self._rest(record), *record.answer_prompt_ids] for record in records]
        device = batch["question_ids"].device
        written = [[*rest, *r.answer_ids] for rest, r in zip(rests, records, strict=True)]
        answer_ids, answer_mask = (x.to(device) for x in pad(written, "right"))
        return {
            **batch,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "prompt_lengths": torch.tensor([len(rest) for rest in rests], device=device),
            "latents": self.stage * self.per_step,
        }

    def _rest(self, record: Record) -> list[int]:
        """What is left of a trace when the steps of this stage are gone."""
        if not record.step_ends:
            raise KavaError(
                f"record {record.id} does not say where its steps end, and a curriculum goes by "
                "them. Make the targets again: `kava generate`, `kava evict`."
            )
        gone = record.step_ends[: self.stage][-1]
        return record.cot_ids[gone:]

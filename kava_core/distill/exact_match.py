"""Exact match while a model learns, and the weights that had most of it.

Held-out records are asked every so many steps, greedily, so that nothing random is drawn and a run
that was killed ends as one that was not. What was found is in the Trainer's log, which is part of
every checkpoint; which weights were best follows from it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kava_core.artefacts import clear
from kava_core.console import say
from kava_core.errors import KavaError
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.parallel import group
from kava_core.problems.judge import judge
from kava_core.record import Record
from kava_core.settings import ExactMatch

EXACT_MATCH = "exact_match"  # in the log, in per cent
BEST = "best-"  # and the step: a folder of weights beside the checkpoints


@dataclass(frozen=True)
class Questions:
    """Records that a model is asked; answer_prompt: the words that an answer stands behind."""

    records: Sequence[Record]
    tokenizer: PreTrainedTokenizerBase
    answer_prompt: str

    @torch.no_grad()
    def correct(
        self,
        model: PreTrainedModel,
        chosen: Sequence[int],
        *,
        batch_size: int,
        max_new_tokens: int,
    ) -> int:
        """How many of the `chosen` records the model answers right, in the state it is in.

        A student is asked as it answers, another model to write its chain of thought first.
        """
        if isinstance(model, LatentReasoner):
            system = model
        else:
            eos = self.records[0].answer_ids[-1]
            system = LatentReasoner.plain(model, answer_prompt_ids=[], eos_token_id=eos)
        records = [self.records[i] for i in chosen]
        right = 0
        for batch in by_length([len(record.question_ids) for record in records], batch_size):
            ids, mask = pad([records[i].question_ids for i in batch], "left")
            written = system.generate(
                ids.to(system.device),
                mask.to(system.device),
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
            ).tokens.tolist()
            prompted = bool(system.config.answer_prompt_ids)
            right += sum(
                self._is_right(records[i], row, prompted)
                for i, row in zip(batch, written, strict=True)
            )
        return right

    def _is_right(self, record: Record, written: list[int], prompted: bool) -> bool:
        eos = record.answer_ids[-1]
        if eos in written:
            written = written[: written.index(eos)]
        # A store keeps the ids of an answer, not its text.
        text, gold = (
            str(self.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (written, record.answer_ids[:-1])
        )
        verdict = judge(text, gold.strip(), prompted=prompted, answer_prompt=self.answer_prompt)
        return verdict.correct


class Asking(TrainerCallback):
    """Asks every `settings.every` steps and after the last one, and keeps the best weights.

    folder: of the checkpoints. `trainer` is the Trainer that it is a callback of: it logs, and
    writes and reads weights.
    """

    def __init__(self, questions: Questions, settings: ExactMatch, folder: Path) -> None:
        self.questions = questions
        self.settings = settings
        self.folder = folder
        self.trainer: Any = None
        self.saved: int | None = None  # the best step by the last checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.saved = best_step(state.log_history)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step = state.global_step
        if step % self.settings.every and step < state.max_steps:
            return
        due = control.should_log  # by the losses of this step, and a log says that it is done
        self.trainer.log({EXACT_MATCH: self._measure(args)})
        control.should_log = due
        if self.settings.keep == "best" and best_step(state.log_history) == step:
            self.trainer.write_weights(self._place(step))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What neither this checkpoint nor the one before would go on with is removed."""
        best = best_step(state.log_history)
        if group.rank() == 0:
            for path in self.folder.glob(f"{BEST}*"):
                if path not in [self._place(step) for step in (best, self.saved) if step]:
                    clear(path)
        self.saved = best

    def settle(self, state: TrainerState, title: str) -> None:
        """Give the model the weights that are kept; of an earlier step, which is said."""
        best = best_step(state.log_history)
        if self.settings.keep == "last" or best is None or best == state.max_steps:
            return
        place = self._place(best)
        if not place.is_dir():
            raise KavaError(
                f"{place} is missing: expected the weights of step {best}, which had the highest "
                f"exact match. Remove {self.folder} and train again."
            )
        self.trainer.read_weights(place)
        say(f"{title}: keeps the weights of step {best}, which had the highest exact match")

    def _measure(self, args: TrainingArguments) -> float:
        records = len(self.questions.records)
        model = self.trainer.model
        model.eval()
        right = self.questions.correct(
            model,
            range(records)[group.rank() :: group.size()],
            batch_size=args.per_device_train_batch_size,
            max_new_tokens=self.settings.max_new_tokens,
        )
        model.train()
        return 100 * sum(group.gather(right)) / records

    def _place(self, step: int) -> Path:
        return self.folder / f"{BEST}{step}"


def best_step(log: Iterable[Mapping[str, Any]]) -> int | None:
    """The first step with the highest exact match of a Trainer's log; None without any."""
    found = [(entry[EXACT_MATCH], -int(entry["step"])) for entry in log if EXACT_MATCH in entry]
    return -max(found)[1] if found else None

"""Records → padded tensors, and the datasets the trainer reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kava_core.models.batching import pad
from kava_core.problems.encoded import EncodedTraces
from kava_core.record import Record
from kava_core.settings import Student
from kava_core.store import TargetsStore

Reads = Literal["all", "endpoint", "none"]


@dataclass(frozen=True)
class Lengths:
    """Tokens of N records, [N] each; those of the answer count its prompt."""

    question: np.ndarray
    chain: np.ndarray
    answer: np.ndarray


def answer_batch(
    ids: Sequence[str],
    questions: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    chains: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    """The token part of a student's batch: questions left-padded, answers and chains right-padded.

    chains are `C A-prompt A`, given when w_cot > 0.
    """
    question_ids, question_mask = pad(questions, "left")
    answer_ids, answer_mask = pad(answers, "right")
    batch: dict[str, Any] = {
        "ids": list(ids),
        "question_ids": question_ids,
        "question_mask": question_mask,
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
    }
    if chains is not None:
        batch["chain_ids"], batch["chain_mask"] = pad(chains, "right")
    return batch


class AnswerDataset(Dataset[dict[str, Any]]):
    """Questions and answers (and chains, if asked for) of traces; what No-CoT learns from."""

    def __init__(self, traces: Sequence[Record], chains: bool) -> None:
        self.traces = traces
        self.chains = chains

    def __len__(self) -> int:
        return len(self.traces)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        chosen = [self.traces[i] for i in indices]
        return answer_batch(
            [t.id for t in chosen],
            [t.question_ids for t in chosen],
            [t.answer_ids for t in chosen],
            [t.cot_ids + t.answer_prompt_ids + t.answer_ids for t in chosen]
            if self.chains
            else None,
        )

    def lengths(self) -> Lengths:
        """Of all records."""
        question, chain, prompt, answer = (
            _counts(self.traces, name)
            for name in ("question_ids", "cot_ids", "answer_prompt_ids", "answer_ids")
        )
        return Lengths(question, chain, prompt + answer)

    def record(self, index: int) -> Record:
        """One record."""
        return self.traces[index]

    def name(self, index: int) -> str:
        """The id of a record."""
        return self.traces[index].id


def _counts(traces: Sequence[Record], name: str) -> np.ndarray:
    """[N]: how many tokens the field has in each record."""
    if isinstance(traces, EncodedTraces):
        return traces.counts(name)
    return np.array([len(getattr(trace, name)) for trace in traces])


def writes_rest(store: TargetsStore) -> bool:
    """Whether latents stand for a part of each trace only, and the student writes the rest."""
    return "latent_fraction" in store.manifest.settings


def what_is_read(settings: Student) -> Reads:
    """Of targets, by the terms of a student."""
    if settings.taught("alpha_kv") or settings.taught("alpha_readout"):
        return "all"
    return "endpoint" if settings.taught("alpha_codi") else "none"


class TargetsDataset(Dataset[dict[str, Any]]):
    """Batches of a targets store: token ids from its index, and of the targets what `reads`
    says: `all`, as `targets` (`TargetsBatch`); the `endpoint` alone, encoded; or `none`.

    online: instead of them `records`, from whose tokens the teacher makes the targets anew;
    records: beside them.
    `cot_ids` [B, N] are those of the chains of thought, right-padded, in which slots have places.
    Where the student writes the rest of the trace (`writes_rest`), the rest and the answer prompt
    belong to its answer, and `prompt_lengths` says where in it the endpoint is.

    Nothing is kept between batches. Codes are worked out on the trainer's device, not here.
    """

    def __init__(
        self,
        store: TargetsStore,
        chains: bool,
        online: bool = False,
        records: bool = False,
        reads: Reads = "all",
    ) -> None:
        self.store = store
        self.chains = chains
        self.reads: Reads = "none" if online else reads
        self.online = online
        self.records = records
        self.writes_rest = writes_rest(store)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        records = [self.store.index.record(i) for i in indices]
        batch = answer_batch(
            [r.id for r in records],
            [r.question_ids for r in records],
            [
                [*r.answer_prompt_ids, *r.answer_ids] if self.writes_rest else r.answer_ids
                for r in records
            ],
            [[*r.cot_ids, *r.answer_prompt_ids, *r.answer_ids] for r in records]
            if self.chains
            else None,
        )
        if self.writes_rest:
            batch["prompt_lengths"] = torch.tensor([len(r.answer_prompt_ids) for r in records])
        batch["cot_ids"], _ = pad([r.cot_ids for r in records], "right")
        if self.online or self.records:
            batch["records"] = records
        if self.reads == "all":
            batch["targets"] = self.store.batch(indices)
        if self.reads == "endpoint":
            batch["endpoint"] = self.store.endpoints(indices)
        return batch

    def lengths(self) -> Lengths:
        """Of all records."""
        index, shards = self.store.index, range(len(self.store.sizes))
        prompts = [np.diff(index.shard(k)["answer_prompt_ids"][0]) for k in shards]
        return Lengths(
            index.column("n_question"),
            index.column("n_cot"),
            np.concatenate(prompts) + index.column("n_answer"),
        )

    def record(self, index: int) -> Record:
        """One record, its answer in ids alone."""
        return self.store.index.record(index)

    def name(self, index: int) -> str:
        """The id of a record."""
        return self.record(index).id


class ChainDataset(Dataset[dict[str, Any]]):
    """Whole sequences `Q C A-prompt A`, supervised from the first token of C on: the teacher's.

    more: further tensors of a batch, from its records.
    """

    def __init__(
        self,
        traces: Sequence[Record],
        more: Callable[[Sequence[Record]], dict[str, Tensor]] | None = None,
    ) -> None:
        self.traces = traces
        self.more = more

    def __len__(self) -> int:
        return len(self.traces)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        chosen = [self.traces[i] for i in indices]
        chains = [t.cot_ids + t.answer_prompt_ids + t.answer_ids for t in chosen]
        ids, mask = pad([t.question_ids + c for t, c in zip(chosen, chains, strict=True)], "right")
        taught = mask.clone()
        for row, trace in enumerate(chosen):
            taught[row, : len(trace.question_ids)] = 0
        more = self.more(chosen) if self.more else {}
        ours = {"ids": [t.id for t in chosen], "input_ids": ids, "mask": mask, "taught": taught}
        return {**ours, **more}

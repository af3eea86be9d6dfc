"""The teacher answers a batch of problems from one kind of cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from kava_core.fidelity.examiner import Batch, Examiner, Outcome
from kava_core.fidelity.grid import Cell, Grid
from kava_core.findings.base import Finding
from kava_core.findings.fidelity import BatchCost, CachedAnswer
from kava_core.hardware import hardware
from kava_core.models.slot_cache import SlotCache
from kava_core.problems.judge import judge
from kava_core.problems.traces import TraceEncoder


@dataclass(frozen=True)
class Result:
    """A cell's answers, and what each batch of them cost."""

    cell: Cell
    answers: list[CachedAnswer] = field(default_factory=list)
    costs: list[BatchCost] = field(default_factory=list)


class Part(Finding):
    """The answers to one batch from one kind of cache, and what they cost."""

    answers: list[CachedAnswer]
    cost: BatchCost


def answer(
    grid: Grid,
    cell: Cell,
    examiner: Examiner,
    encoder: TraceEncoder,
    batch: Batch,
    reference: Outcome,
) -> Part:
    """The answers to a batch from one kind of cache; reference: those from the full one."""
    make, tokens, size = _cache(grid, cell, examiner, batch)
    outcome = examiner.examine(batch, make, reference)
    answers = []
    for i, trace in enumerate(batch.traces):
        text = str(encoder.tokenizer.decode(outcome.written[i], skip_special_tokens=True))
        verdict = judge(text, trace.answer, prompted=True, answer_prompt=encoder.prompt.answer)
        answers.append(
            CachedAnswer(
                id=trace.id,
                n_steps=trace.n_steps,
                topic=trace.topic,
                cot_tokens=len(trace.cot_ids),
                policy=cell.policy,
                budget=cell.budget,
                keys_bits=cell.keys_bits,
                values_bits=cell.values_bits,
                tokens_kept=tokens[i],
                bytes=size[i],
                text=text,
                answer=verdict.answer,
                gold=trace.answer,
                correct=verdict.correct,
                nll=outcome.nll[i],
                kl=outcome.kl[i],
                answer_tokens=len(trace.answer_ids),
            )
        )
    cost = BatchCost(
        problems=len(answers),
        n_steps=batch.traces[0].n_steps,
        seconds_per_problem=outcome.seconds,
        peak_memory_bytes=outcome.memory,
        hardware=dict(hardware()),
    )
    return Part(answers=answers, cost=cost)


def _cache(
    grid: Grid, cell: Cell, examiner: Examiner, batch: Batch
) -> tuple[Callable[[], SlotCache], list[float], list[int]]:
    """What makes a batch's cache of one kind; per record the tokens a head sees, stored bytes."""
    lengths = batch.slots.lengths
    if cell.policy == "full":
        tokens = [float(n) for n in lengths]
        return partial(examiner.full, batch), tokens, examiner.full_bytes(batch)
    if cell.keys_bits is None or cell.values_bits is None or cell.budget is None:
        return partial(examiner.none, batch), [0.0] * len(lengths), [0] * len(lengths)
    compressed = examiner.compress(
        batch,
        grid.policies[cell.policy],
        grid.budgets[cell.budget],
        grid.codecs[cell.keys_bits, cell.values_bits],
    )
    return partial(examiner.restore, batch, compressed), compressed.tokens, compressed.bytes

"""The teacher answers all problems from every kind of cache, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kava_core.artefacts import clear
from kava_core.console import progress, say, warn
from kava_core.errors import KavaError
from kava_core.fidelity.examiner import Batch, Examiner, Outcome
from kava_core.fidelity.grid import Cell, Grid
from kava_core.findings.base import Finding, read_finding, write_finding
from kava_core.findings.fidelity import BatchCost, CachedAnswer
from kava_core.models.slot_cache import SlotCache
from kava_core.problems.judge import judge
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record


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


def try_grid(
    grid: Grid,
    examiner: Examiner,
    encoder: TraceEncoder,
    batches: Sequence[Sequence[Record]],
    work: Path,
) -> list[Result]:
    """The teacher reads each batch once and answers it from every kind of cache.

    A batch's answers from one kind are a file in `work`, which is not made twice.
    """
    results = [Result(cell) for cell in grid.cells]
    parts = [
        [work / f"batch-{batch:05d}-cell-{cell:05d}.json" for cell in range(len(results))]
        for batch in range(len(batches))
    ]
    total = len(batches) * len(results)
    finished = {
        file: part
        for traces, files in zip(batches, parts, strict=True)
        for file in files
        if (part := _finished(file, traces)) is not None
    }
    if finished:
        say(f"fidelity: {len(finished)} of {total} parts are finished already")
    with progress() as display:
        task = display.add_task("fidelity", total=total, note="")
        for traces, files in zip(batches, parts, strict=True):
            if not all(file in finished for file in files):
                batch = examiner.read(traces)
                # Not the answers of cell `full`: the first forward of a shape is slow to start.
                reference = examiner.examine(batch, partial(examiner.full, batch))
            for result, file in zip(results, files, strict=True):
                display.update(task, note=f"{result.cell.series}, {result.cell.budget or ''}")
                if file not in finished:
                    part = _answer(grid, result.cell, examiner, encoder, batch, reference)
                    write_finding(file, part)
                # Read from the file, so that a continued run has what an uninterrupted one has.
                part = finished.get(file) or read_finding(Part, file, "fidelity")
                result.answers.extend(part.answers)
                result.costs.append(part.cost)
                display.advance(task)
    return results


def _finished(file: Path, traces: Sequence[Record]) -> Part | None:
    """The part that a run before made; what is torn, or of other problems, goes and is None."""
    if not file.exists():
        return None
    try:
        part = read_finding(Part, file, "fidelity")
        if [answer.id for answer in part.answers] == [trace.id for trace in traces]:
            return part
    except KavaError:
        pass
    warn(f"fidelity: {file} is damaged, and is made again")
    clear(file)
    return None


def _answer(
    grid: Grid,
    cell: Cell,
    examiner: Examiner,
    encoder: TraceEncoder,
    batch: Batch,
    reference: Outcome,
) -> Part:
    make, tokens, size = _cache(grid, cell, examiner, batch)
    outcome = examiner.examine(batch, make, reference.log_probs)
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

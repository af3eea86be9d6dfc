"""What a stage computes: decoder calls and floating-point operations.

A token costs two operations for each weight that it passes through, and four for each number of a
key that its queries look at (Kaplan et al., arXiv 2001.08361, appendix B); logits cost two for each
weight of the head. A training step costs three times its forward passes; with adapters twice, since
frozen weights get no gradient, and the adapters' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kava_core.planning.architecture import Architecture
from kava_core.planning.lengths import Lengths, longest
from kava_core.settings import Student, Training
from kava_core.settings.base import Processes


@dataclass(frozen=True)
class Call:
    """One decoder call on `rows` sequences: `columns` new tokens each behind `past` ones, of which
    `logits` are read out; gradient: whether what it computes is differentiated; pieced: whether its
    logits are made piece by piece, and again."""

    rows: float
    columns: float
    past: float = 0
    logits: float = 0
    gradient: bool = False
    pieced: bool = False


def flops(architecture: Architecture, calls: Sequence[Call], training: Training | None) -> float:
    """Of some calls; with `training`, of a step that differentiates those that ask for it."""
    adapters = 0
    if training is not None and training.lora is not None:
        adapters = architecture.trainable(training, "training")
    total = 0.0
    for call in calls:
        forward = _forward(architecture, call)
        own = 2.0 * adapters * call.rows * call.columns
        if not call.gradient:
            total += forward + own
        elif adapters:
            total += 2 * forward + 3 * own
        else:
            total += 3 * forward
    return total


def _forward(a: Architecture, call: Call) -> float:
    tokens = call.rows * call.columns
    attention = 4.0 * a.layers * a.heads * a.head_dim * tokens * (call.past + call.columns)
    head = 2.0 * a.vocabulary * a.hidden_size * call.rows * call.logits
    return 2.0 * a.body * tokens + attention + head


def parts(processes: Processes) -> int:
    """How many processes share a batch; `auto`, which the host decides, counts as one."""
    return 1 if processes == "auto" else processes


def teacher_step(training: Training, lengths: Lengths) -> list[Call]:
    """One batch of whole chains, of which what follows the question is read out."""
    width = longest(lengths.whole, training.batch_size)
    taught = float((lengths.trace + lengths.prompt + lengths.answer).mean())
    return [Call(training.batch_size, width, logits=taught, gradient=True, pieced=True)]


def student_step(
    student: Student, slots: int, prompt: int, lengths: Lengths, rows: float
) -> list[Call]:
    """One batch of a student with M = `slots` latents; prompt: tokens of the answer prompt."""
    batch = student.training.batch_size
    question, answer = longest(lengths.question, batch), longest(lengths.answer, batch)
    latents = slots if student.reads == "kv_targets" else 0
    rest = max(0.0, float(lengths.prompt.mean()) - prompt)
    if student.curriculum is not None:
        rest += longest(lengths.trace, batch)  # the most, as in its first stage
    tail = prompt + rest + answer + (1 if latents else 0)
    calls = [
        Call(rows, columns, past, gradient=True)
        for columns, past in _thinking(student, latents, question)
    ]
    start, past = (question, 0.0) if not latents else (0.0, question + 1)
    if latents and student.reasoning == "jacobi" and not student.iterations:
        start, past = question + 1 + latents, 0.0
    elif latents:
        last = latents if student.reasoning == "jacobi" else 1
        start, past = last, question + 1 + latents - last
    calls.append(Call(rows, start + tail, past, logits=rest + answer + 1, gradient=True))
    if student.taught("alpha_readout"):
        calls.append(Call(rows, 0, logits=latents, gradient=True))
    if student.taught("w_cot"):
        chain = longest(lengths.trace + lengths.prompt + lengths.answer, batch)
        kept = question - 1 if latents else 0.0
        columns = question + chain - 1 - kept
        calls.append(Call(rows, columns, kept, logits=chain, gradient=True, pieced=True))
    return calls


def _thinking(student: Student, latents: int, question: float) -> Iterator[tuple[float, float]]:
    """(columns, past) of the calls before the one that the answer goes with."""
    if not latents:
        return
    if student.reasoning == "sequential":
        yield question + 1, 0
        yield from ((1, question + 1 + i) for i in range(latents - 1))
    elif student.iterations:
        yield question + 1 + latents, 0
        yield from ((latents, question + 1) for _ in range(student.iterations - 1))


def read_batch(lengths: Lengths, batch: int) -> list[Call]:
    """The teacher's pass over a batch of traces of similar length."""
    return [Call(batch, float(lengths.whole.mean()))]


def answering_calls(
    student: Student | None, slots: int, lengths: Lengths, batch: int, new_tokens: int
) -> list[Call]:
    """A batch of questions answered: thinking, then a call a token. None: the teacher is asked."""
    question = longest(lengths.question, batch)
    latents = slots if student is not None and student.reads == "kv_targets" else 0
    calls: list[Call] = []
    if student is not None:
        calls = [Call(batch, c, past) for c, past in _thinking(student, latents, question)]
    first = question if not calls else latents
    calls.append(Call(batch, first + 5, question if calls else 0, logits=1))
    past = question + latents + 5
    calls += [Call(batch, 1, past + i, logits=1) for i in range(new_tokens - 1)]
    return calls


def batches(problems: int, batch: int) -> int:
    return math.ceil(problems / batch)

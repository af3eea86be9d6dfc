"""Ask a system every problem: what it writes, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kava_core.errors import KavaError
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.problems.judge import judge
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder


@dataclass(frozen=True)
class Reply:
    """What a system made of one problem.

    id: of the problem; written: the generated ids, the end of sequence included; text: the same as
    text; answer: what was read from it ("" if nothing could be); passes: decoder calls; seconds:
    the batch's wall-clock over its size.
    """

    id: str
    written: tuple[int, ...]
    text: str
    answer: str
    correct: bool
    passes: int
    seconds: float

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return len(self.written)


def ask(
    system: LatentReasoner,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Reply]:
    """Greedy answers of `system`, in the order of `problems`.

    Questions of similar length are asked together; padding changes no answer. `advance` is told
    how many problems were done.
    """
    if not problems:
        raise KavaError("there are no problems to evaluate on. Ask `prepare` for some.")
    questions = encoder.encode_questions([p.question for p in problems])
    done: dict[int, Reply] = {}
    device = system.device
    prompted = bool(system.config.answer_prompt_ids)
    for chosen in by_length([len(q) for q in questions], batch_size):
        began = time.perf_counter()
        ids, mask = pad([questions[i] for i in chosen], "left")
        result = system.generate(ids.to(device), mask.to(device), max_new_tokens=max_new_tokens)
        rows = result.tokens.tolist()
        seconds = (time.perf_counter() - began) / len(chosen)
        for i, row, passes in zip(chosen, rows, result.passes.tolist(), strict=True):
            end = row.index(encoder.eos) + 1 if encoder.eos in row else len(row)
            text = str(encoder.tokenizer.decode(row[:end], skip_special_tokens=True))
            verdict = judge(text, problems[i].answer, prompted=prompted)
            done[i] = Reply(
                id=problems[i].id,
                written=tuple(row[:end]),
                text=text,
                answer=verdict.answer,
                correct=verdict.correct,
                passes=passes,
                seconds=seconds,
            )
        advance(len(chosen))
    return [done[i] for i in range(len(problems))]


def exact_match(replies: Sequence[Reply]) -> float:
    """In per cent."""
    return 100 * sum(reply.correct for reply in replies) / len(replies)

"""Ask a system every problem, and count: exact match, passes, tokens, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kava_core.distill.batches import pad
from kava_core.errors import KavaError
from kava_core.evaluation.answers import extract_answer, same_answer
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Prediction:
    """One answered problem.

    text: all that was generated; answer: what was read from it ("" if nothing could be); passes:
    decoder calls; tokens: generated, the end of sequence included; seconds: the batch's wall-clock
    over its size.
    """

    id: str
    n_steps: int
    topic: str
    gold: str
    text: str
    answer: str
    correct: bool
    passes: int
    tokens: int
    seconds: float


def ask(
    system: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Prediction]:
    """Greedy answers of `system`, in the order of `problems`.

    Questions of similar length are asked together; padding changes no answer. `advance` is told
    how many problems were done.
    """
    if not problems:
        raise KavaError("there are no problems to evaluate on. Ask `prepare` for some.")
    questions = encoder.encode_questions([p.question for p in problems])
    order = sorted(range(len(problems)), key=lambda i: (len(questions[i]), i))
    done: dict[int, Prediction] = {}
    device = system.device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        began = time.perf_counter()
        ids, mask = pad([questions[i] for i in chosen], "left")
        result = system.generate(ids.to(device), mask.to(device), max_new_tokens=max_new_tokens)
        rows = result.tokens.tolist()
        seconds = (time.perf_counter() - began) / len(chosen)
        for i, row, passes in zip(chosen, rows, result.passes.tolist(), strict=True):
            end = row.index(encoder.eos) + 1 if encoder.eos in row else len(row)
            text = str(tokenizer.decode(row[:end], skip_special_tokens=True))
            problem = problems[i]
            answer = extract_answer(text) or ""
            done[i] = Prediction(
                id=problem.id,
                n_steps=len(problem.steps),
                topic=problem.topic,
                gold=problem.answer,
                text=text,
                answer=answer,
                correct=bool(answer) and same_answer(answer, problem.answer),
                passes=passes,
                tokens=end,
                seconds=seconds,
            )
        advance(len(chosen))
    return [done[i] for i in range(len(problems))]


def wilson(correct: int, n: int) -> list[float]:
    """The 95 % Wilson score interval of a proportion, in per cent (Wilson 1927)."""
    p = correct / n
    centre = p + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return [100 * max(0.0, (centre - spread) / scale), 100 * min(1.0, (centre + spread) / scale)]


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """exact_match and ci95 in per cent; forward_passes, tokens, seconds_per_problem are means."""
    n = len(predictions)
    correct = sum(p.correct for p in predictions)
    by_steps: dict[int, list[bool]] = {}
    for prediction in predictions:
        by_steps.setdefault(prediction.n_steps, []).append(prediction.correct)
    return {
        "exact_match": 100 * correct / n,
        "ci95": wilson(correct, n),
        "n": n,
        "forward_passes": sum(p.passes for p in predictions) / n,
        "tokens": sum(p.tokens for p in predictions) / n,
        "seconds_per_problem": sum(p.seconds for p in predictions) / n,
        "by_steps": {
            str(steps): {"exact_match": 100 * sum(marks) / len(marks), "n": len(marks)}
            for steps, marks in sorted(by_steps.items())
        },
    }

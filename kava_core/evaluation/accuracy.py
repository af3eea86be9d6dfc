"""Ask a system every problem, and count: exact match, passes, tokens, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kava_core.answers import extract_answer, same_answer
from kava_core.errors import KavaError
from kava_core.evaluation.breakdown import accuracy_by
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import ANSWER_PROMPT, TraceEncoder

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Prediction:
    """One answered problem.

    written: the generated ids, the end of sequence included; text: the same as text; answer: what
    was read from it ("" if nothing could be); passes: decoder calls; seconds: the batch's
    wall-clock over its size.
    """

    id: str
    n_steps: int
    topic: str
    gold: str
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
    done: dict[int, Prediction] = {}
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
            text = str(tokenizer.decode(row[:end], skip_special_tokens=True))
            problem = problems[i]
            answer = read_answer(text, prompted=prompted)
            done[i] = Prediction(
                id=problem.id,
                n_steps=len(problem.steps),
                topic=problem.topic,
                gold=problem.answer,
                written=tuple(row[:end]),
                text=text,
                answer=answer,
                correct=bool(answer) and same_answer(answer, problem.answer),
                passes=passes,
                seconds=seconds,
            )
        advance(len(chosen))
    return [done[i] for i in range(len(problems))]


def read_answer(text: str, *, prompted: bool) -> str:
    """The answer in a generated text, "" if there is none.

    prompted: the text was written behind the answer prompt. It is then read as if the system had
    written the prompt, so that all systems are read alike.
    """
    return extract_answer(ANSWER_PROMPT + text if prompted else text) or ""


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
    ordered = sorted(predictions, key=lambda p: p.n_steps)
    return {
        "exact_match": 100 * correct / n,
        "ci95": wilson(correct, n),
        "n": n,
        "forward_passes": sum(p.passes for p in predictions) / n,
        "tokens": sum(p.tokens for p in predictions) / n,
        "seconds_per_problem": sum(p.seconds for p in predictions) / n,
        "by_steps": accuracy_by([[str(p.n_steps)] for p in ordered], [p.correct for p in ordered]),
    }

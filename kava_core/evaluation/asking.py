"""Ask a system questions: what it writes, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kava_core.answers import same_answer
from kava_core.errors import KavaError
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.problems.judge import read_answer
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


@dataclass(frozen=True)
class Written:
    """What a system wrote for one question.

    tokens: the generated ids, the end of sequence included; text: the same as text; answer: what
    was read from it ("" if nothing could be); passes: decoder calls; seconds: the batch's
    wall-clock over its size; thoughts: the likeliest token of each latent, where asked for.
    """

    tokens: tuple[int, ...]
    text: str
    answer: str
    passes: int
    seconds: float
    thoughts: tuple[str, ...] = ()


def write(
    system: LatentReasoner,
    encoder: TraceEncoder,
    questions: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    thoughts: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Written]:
    """Greedy answers of `system`, in the order of `questions`.

    Questions of similar length are asked together; padding changes no answer. thoughts: whether to
    decode the latents: what the language-model head reads in the hidden states that became them,
    none where they are the initial ones. `advance` is told how many questions were done.
    """
    encoded = encoder.encode_questions(questions)
    tokenizer = encoder.tokenizer
    done: dict[int, Written] = {}
    device = system.device
    prompted = bool(system.config.answer_prompt_ids)
    for chosen in by_length([len(q) for q in encoded], batch_size):
        began = time.perf_counter()
        ids, mask = pad([encoded[i] for i in chosen], "left")
        result = system.generate(
            ids.to(device),
            mask.to(device),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
        )
        rows, passes = result.tokens.tolist(), result.passes.tolist()
        seconds = (time.perf_counter() - began) / len(chosen)
        decoded: list[list[int]] = [[] for _ in chosen]
        if thoughts and result.thoughts is not None:
            with torch.no_grad():
                decoded = system.read(result.thoughts).argmax(-1).tolist()
        for row, i in enumerate(chosen):
            ids_written = rows[row]
            if encoder.eos in ids_written:
                ids_written = ids_written[: ids_written.index(encoder.eos) + 1]
            text = str(tokenizer.decode(ids_written, skip_special_tokens=True))
            done[i] = Written(
                tokens=tuple(ids_written),
                text=text,
                answer=read_answer(text, prompted=prompted, answer_prompt=encoder.prompt.answer),
                passes=passes[row],
                seconds=seconds,
                thoughts=tuple(str(tokenizer.decode([token])) for token in decoded[row]),
            )
        advance(len(chosen))
    return [done[i] for i in range(len(questions))]


def ask(
    system: LatentReasoner,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Reply]:
    """What `system` makes of problems, in their order: `write`, judged."""
    if not problems:
        raise KavaError("there are no problems to evaluate on. Ask `prepare` for some.")
    written = write(
        system,
        encoder,
        [problem.question for problem in problems],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        advance=advance,
    )
    return [
        Reply(
            id=problem.id,
            written=found.tokens,
            text=found.text,
            answer=found.answer,
            correct=bool(found.answer) and same_answer(found.answer, problem.answer),
            passes=found.passes,
            seconds=found.seconds,
        )
        for problem, found in zip(problems, written, strict=True)
    ]


def exact_match(replies: Sequence[Reply]) -> float:
    """In per cent."""
    return 100 * sum(reply.correct for reply in replies) / len(replies)

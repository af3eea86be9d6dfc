"""Every problem is asked as if alone, and everything is counted as by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kava_core.errors import KavaError
from kava_core.evaluation.asking import Reply, ask, exact_match
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import problems, system

LONGEST = 7


def alone(asked: LatentReasoner, question: list[int], eos: int) -> list[int]:
    """Greedy tokens of one problem, everything computed anew for each of them."""
    written: list[int] = []
    while len(written) < LONGEST and eos not in written:
        answer = torch.tensor([written], dtype=torch.long).view(1, -1)
        ids = torch.tensor([question])
        logits = asked(ids, torch.ones_like(ids), answer, torch.ones_like(answer)).logits
        written.append(int(logits[0, -1].argmax()))
    return written


KINDS = {"latent": 3, "at once": 1, "with a chain": 1}  # passes up to the first answer token


@pytest.mark.parametrize("kind", KINDS)
def test_everyone_is_asked_alone_in_the_order_given(
    talker: LatentReasoner, encoder: TraceEncoder, kind: str
) -> None:
    asked, tokenizer = system(talker, encoder, kind), encoder.tokenizer
    todo = problems()
    expected = [alone(asked, ids, encoder.eos)
                for ids in encoder.encode_questions([p.question for p in todo])]  # fmt: skip
    lengths = {len(tokens) for tokens in expected}
    assert len(lengths) > 1, "the example should have answers of several lengths"
    told: list[int] = []
    found = ask(
        asked,
        encoder,
        todo,
        batch_size=5,
        max_new_tokens=LONGEST,
        advance=told.append,
    )
    assert told == [5, 5, 2]
    assert [p.id for p in found] == [p.id for p in todo]
    for reply, problem, tokens in zip(found, todo, expected, strict=True):
        text = tokenizer.decode([t for t in tokens if t != encoder.eos])
        assert reply.text == text
        assert reply.written == tuple(tokens)
        assert reply.tokens == len(tokens)  # the end of sequence included
        assert reply.passes == KINDS[kind] + len(tokens) - 1
        assert reply.answer == text.strip()
        assert reply.correct == (text.strip() == problem.answer)
        assert reply.seconds > 0


@pytest.mark.parametrize("batch_size", [1, 2, 12, 100])
def test_the_batch_changes_nothing_but_the_time(
    talker: LatentReasoner, encoder: TraceEncoder, batch_size: int
) -> None:
    def timeless(size: int) -> list[Reply]:
        found = ask(
            talker,
            encoder,
            problems(),
            batch_size=size,
            max_new_tokens=LONGEST,
        )
        return [replace(p, seconds=0.0) for p in found]

    assert timeless(batch_size) == timeless(5)


def test_an_answer_is_right_if_it_is_the_gold_one(
    talker: LatentReasoner, encoder: TraceEncoder
) -> None:
    def marks(todo: list[Problem]) -> list[Reply]:
        return ask(talker, encoder, todo, batch_size=4, max_new_tokens=LONGEST)

    first = marks(problems())
    golds = [p.answer or "5" for p in first]
    told = [replace(p, answer=gold) for p, gold in zip(problems(), golds, strict=True)]
    wrong = [replace(p, answer=gold + "1") for p, gold in zip(problems(), golds, strict=True)]
    assert [p.correct for p in marks(told)] == [bool(p.answer) for p in first]
    assert not any(p.correct for p in marks(wrong))


def test_no_problems_are_refused(talker: LatentReasoner, encoder: TraceEncoder) -> None:
    with pytest.raises(KavaError, match="no problems to evaluate on"):
        ask(talker, encoder, [], batch_size=4, max_new_tokens=4)


def test_exact_match_is_the_share_of_right_answers() -> None:
    marks = [True, False, False, True, False, False, False, False]
    replies = [Reply("i", (1,), "5", "5", mark, 1, 0.1) for mark in marks]
    assert exact_match(replies) == 25.0

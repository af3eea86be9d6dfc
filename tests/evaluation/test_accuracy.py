"""Every problem is asked as if alone, and everything is counted as by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from kava_core.errors import KavaError
from kava_core.evaluation.accuracy import Prediction, ask, read_answer, summarise, wilson
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
        tokenizer,
        encoder,
        todo,
        batch_size=5,
        max_new_tokens=LONGEST,
        advance=told.append,
    )
    assert told == [5, 5, 2]
    assert [p.id for p in found] == [p.id for p in todo]
    for prediction, problem, tokens in zip(found, todo, expected, strict=True):
        text = tokenizer.decode([t for t in tokens if t != encoder.eos])
        assert prediction.text == text
        assert prediction.written == tuple(tokens)
        assert prediction.tokens == len(tokens)  # the end of sequence included
        assert prediction.passes == KINDS[kind] + len(tokens) - 1
        assert prediction.answer == text.strip()
        assert prediction.correct == (text.strip() == problem.answer)
        assert (prediction.n_steps, prediction.topic) == (len(problem.steps), problem.topic)
        assert prediction.gold == problem.answer and prediction.seconds > 0


@pytest.mark.parametrize("batch_size", [1, 2, 12, 100])
def test_the_batch_changes_nothing_but_the_time(
    talker: LatentReasoner, encoder: TraceEncoder, batch_size: int
) -> None:
    def timeless(size: int) -> list[Prediction]:
        found = ask(
            talker,
            encoder.tokenizer,
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
    def marks(todo: list[Problem]) -> list[Prediction]:
        return ask(talker, encoder.tokenizer, encoder, todo, batch_size=4, max_new_tokens=LONGEST)

    first = marks(problems())
    golds = [p.answer or "5" for p in first]
    told = [replace(p, answer=gold) for p, gold in zip(problems(), golds, strict=True)]
    wrong = [replace(p, answer=gold + "1") for p, gold in zip(problems(), golds, strict=True)]
    assert [p.correct for p in marks(told)] == [bool(p.answer) for p in first]
    assert not any(p.correct for p in marks(wrong))


@pytest.mark.parametrize(
    ("text", "prompted", "chained"),
    [
        (" 72", "72", "72"),
        (" x^2 + 1", "x^2 + 1", "1"),
        (" 3 of 5\n7", "3 of 5", "7"),
        (" yes", "yes", ""),
        ("", "", ""),
        ("<<3+4=7>>The answer is: x^2", "x^2", "x^2"),
    ],
)
def test_a_prompted_answer_is_the_line_behind_the_prompt(
    text: str, prompted: str, chained: str
) -> None:
    """As where a system wrote the prompt itself: of an expression not only the last number."""
    assert read_answer(text, prompted=True) == prompted
    assert read_answer(text, prompted=False) == chained


def test_no_problems_are_refused(talker: LatentReasoner, encoder: TraceEncoder) -> None:
    tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
    with pytest.raises(KavaError, match="no problems to evaluate on"):
        ask(talker, tokenizer, encoder, [], batch_size=4, max_new_tokens=4)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
        # symmetric, and z² / (n + z²) where nothing was right
        (50, 100, 40.38, 59.62),
        (0, 10, 0.0, 100 * 3.841459 / 13.841459),
        (10, 10, 100 * 10 / 13.841459, 100.0),
    ],
)
def test_wilson_against_published_intervals(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == [pytest.approx(low, abs=5e-3), pytest.approx(high, abs=5e-3)]


@pytest.mark.parametrize("n", [1, 3, 500])
def test_wilson_holds_the_proportion_and_stays_within_0_and_100(n: int) -> None:
    for correct in range(n + 1):
        low, high = wilson(correct, n)
        proportion = 100 * correct / n
        assert 0 <= low <= proportion + 1e-9 and proportion - 1e-9 <= high <= 100


def prediction(n_steps: int, correct: bool, passes: int, tokens: int, seconds: float) -> Prediction:
    written = (1,) * tokens
    return Prediction("i", n_steps, "t", "5", written, "5", "5", correct, passes, seconds)


def test_a_summary_computed_by_hand() -> None:
    summary = summarise(
        [
            prediction(10, True, 4, 2, 0.1),
            prediction(2, False, 6, 4, 0.2),
            prediction(2, True, 5, 3, 0.3),
            prediction(2, True, 9, 7, 0.6),
        ]
    )
    assert summary == {
        "exact_match": 75.0,
        "ci95": wilson(3, 4),
        "n": 4,
        "forward_passes": 6.0,
        "tokens": 4.0,
        "seconds_per_problem": pytest.approx(0.3),
        "by_steps": {
            "2": {"exact_match": pytest.approx(200 / 3), "n": 3},
            "10": {"exact_match": 100.0, "n": 1},
        },
    }
    assert list(summary["by_steps"]) == ["2", "10"]  # by number, not by letter

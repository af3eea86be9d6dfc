"""The generator's promises, for any settings."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.problems.records import Problem, TraceForm, normalise_question
from kava_core.problems.sources.synthetic import OPERATIONS, Operation, Synthetic
from kava_core.problems.splits import ProblemSplits

EQUATION = re.compile(r"(\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)")
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}

ranges = st.tuples(st.integers(2, 8), st.integers(2, 8)).map(lambda pair: (min(pair), max(pair)))
# Adding and subtracting always leave a next step; multiplying and dividing alone may not.
operations = st.sets(st.sampled_from(OPERATIONS)).map(
    lambda names: tuple(sorted(names | {"add", "subtract"}))
)


def build(operations: tuple[Operation, ...], factors: set[int], **settings: Any) -> Synthetic:
    """Factors are only taken where they are multiplied or divided by."""
    used = {"multiply", "divide"} & set(operations)
    given = {"factors": tuple(sorted(factors))} if used else {}
    return Synthetic(operations=operations, **given, **settings)


sources = st.builds(
    build,
    steps=ranges,
    operations=operations,
    max_value=st.integers(50, 500),
    max_operand=st.integers(5, 100),
    factors=st.sets(st.integers(2, 9), min_size=1),
    style=st.sampled_from(("compact", "prose")),
    distractors=st.sampled_from((0.0, 0.5, 1.0)),
)
forms: st.SearchStrategy[TraceForm] = st.sampled_from(("equations", "sentences"))


def everything(splits: ProblemSplits) -> list[Problem]:
    return splits.train + splits.validation + splits.test


def read(step: str) -> tuple[int, str, int, int]:
    match = EQUATION.search(step)
    assert match is not None, step
    return int(match[1]), match[2], int(match[3]), int(match[4])


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(0, 2**32), forms)
def test_every_trace_is_true_dependent_and_within_bounds(
    source: Synthetic, seed: int, traces: TraceForm
) -> None:
    signs = {SIGNS[name] for name in source.operations}
    for problem in everything(source.splits(20, 5, 5, seed=seed, traces=traces)):
        assert source.steps[0] <= len(problem.steps) <= source.steps[1]
        previous = None
        for step in problem.steps:
            left, sign, right, result = read(step)
            exact = {
                "+": Fraction(left + right),
                "-": Fraction(left - right),
                "*": Fraction(left * right),
                "/": Fraction(left, right),
            }[sign]
            assert exact == result
            assert sign in signs
            assert 1 <= left <= source.max_value
            assert 1 <= result <= source.max_value
            assert previous is None or left == previous
            bound = source.max_operand if sign in "+-" else max(source.factors)
            assert 1 <= right <= bound
            previous = result
        assert problem.answer == str(previous)


@settings(max_examples=30, deadline=None)
@given(sources, st.integers(0, 2**32), forms)
def test_splits_share_no_question_and_no_held_out_chain(
    source: Synthetic, seed: int, traces: TraceForm
) -> None:
    splits = source.splits(40, 15, 15, seed=seed, traces=traces)
    questions = [normalise_question(problem.question) for problem in everything(splits)]
    assert len(set(questions)) == len(questions) == 70
    chains = {
        name: {tuple(read(step) for step in problem.steps) for problem in problems}
        for name, problems in (splits.taught() | splits.asked()).items()
    }
    assert not chains["test"] & chains["validation"]
    assert not (chains["test"] | chains["validation"]) & chains["train"]


@settings(max_examples=20, deadline=None)
@given(sources, st.integers(0, 2**32), forms)
def test_a_seed_determines_the_problems(source: Synthetic, seed: int, traces: TraceForm) -> None:
    splits = source.splits(10, 5, 5, seed=seed, traces=traces)
    assert source.splits(10, 5, 5, seed=seed, traces=traces) == splits
    assert source.splits(10, 5, 5, seed=seed + 1, traces=traces) != splits
    more = source.splits(30, 5, 5, seed=seed, traces=traces)
    assert (more.test, more.validation) == (splits.test, splits.validation)
    assert more.train[:10] == splits.train


@settings(max_examples=20, deadline=None)
@given(sources, st.integers(0, 2**32))
def test_the_form_of_the_traces_does_not_change_the_questions(source: Synthetic, seed: int) -> None:
    equations = source.splits(10, 0, 0, seed=seed, traces="equations").train
    sentences = source.splits(10, 0, 0, seed=seed, traces="sentences").train
    assert [p.question for p in equations] == [p.question for p in sentences]
    assert [p.answer for p in equations] == [p.answer for p in sentences]


def test_the_problems_do_not_depend_on_pythons_hash_seed() -> None:
    script = (
        "from kava_core.problems.sources.synthetic import Synthetic\n"
        "for style in ('compact', 'prose'):\n"
        "    print(Synthetic(style=style, distractors=0.5).splits(30, 5, 5, seed=3))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("style", ["compact", "prose"])
def test_the_question_tells_every_number_of_the_chain_in_order(style: str) -> None:
    source = Synthetic(style=style, operations=("add", "subtract"))  # type: ignore[arg-type]
    for problem in source.splits(50, 0, 0, seed=0).train:
        steps = [read(step) for step in problem.steps]
        numbers = [steps[0][0], *(right for _, _, right, _ in steps)]
        assert [int(number) for number in re.findall(r"\d+", problem.question)] == numbers


def test_a_distractor_adds_one_number_that_the_trace_does_not_use() -> None:
    without = Synthetic(operations=("add", "subtract"), style="prose")
    for problem in replace(without, distractors=1.0).splits(50, 0, 0, seed=0).train:
        assert len(re.findall(r"\d+", problem.question)) == len(problem.steps) + 2


def test_each_length_is_equally_likely_and_each_scenario_is_told() -> None:
    train = Synthetic(steps=(2, 5)).splits(4000, 0, 0, seed=0).train
    lengths = [len(problem.steps) for problem in train]
    assert all(abs(lengths.count(length) - 1000) < 120 for length in (2, 3, 4, 5))
    assert len({problem.topic for problem in train}) >= 5
    assert train[12].id == "synthetic-train-000012"


def test_compact_questions_use_few_words() -> None:
    train = Synthetic().splits(2000, 0, 0, seed=0).train
    words = {word for p in train for word in p.question.split() if not word.isdigit()}
    assert len(words) < 60


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": (1, 3)}, "`steps`"),
        ({"steps": (4, 3)}, "`steps`"),
        ({"steps": (2, 9)}, "`steps`"),
        ({"operations": ()}, "`operations`"),
        ({"operations": ("power",)}, "`operations`.*power"),
        ({"max_value": 1}, "`max_value`"),
        ({"max_operand": 0}, "`max_operand`"),
        ({"operations": ("multiply",), "max_operand": 9}, "`max_operand` only beside"),
        ({"factors": (1,)}, "`factors`"),
        ({"operations": ("add", "subtract"), "factors": (2,)}, "`factors` only beside"),
        ({"style": "verse"}, "`style`.*verse"),
        ({"distractors": 1.5}, "`distractors`"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(KavaError, match=words):
        Synthetic(**wrong)  # type: ignore[arg-type]


def test_too_many_problems_for_the_space_are_refused() -> None:
    small = Synthetic(steps=(2, 2), operations=("multiply",), max_value=8)
    with pytest.raises(KavaError, match="different problems of 2 steps"):
        small.splits(5000, 0, 0, seed=0)
    with pytest.raises(KavaError, match="different problems of 8 steps"):
        replace(small, steps=(8, 8)).splits(1, 0, 0, seed=0)

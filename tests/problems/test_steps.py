"""Where steps end in a trace, and which of its tokens are results."""

from __future__ import annotations

import pytest

from kava_core.errors import KavaError
from kava_core.problems.load import Reading, check_form
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources.gsm8k import GSM8K
from kava_core.problems.sources.gsm8k_aug_nl import GSM8kAugNL
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record

STEPS: dict[TraceForm, tuple[str, ...]] = {
    "equations": ("<<12+3=15>>", "<<15*2=30>>", "<<30-7=23>>"),
    "sentences": ("Ann has 12 + 3 = 15.", "Twice that is 30.", "So 23 stay"),
    "results": ("15", "30", "23"),
    "checked": ("15: 12+3 = 15", "30: 15*2 = 30", "23: 30-7 = 23"),
}
TOKENIZER = train_tokenizer(
    [text for steps in STEPS.values() for text in (*steps, "".join(steps))] * 3, 340
)


def encode(traces: TraceForm, fraction: float = 1.0) -> Record:
    problem = Problem("p", "How many?", STEPS[traces], "23", "test", "any")
    return TraceEncoder(TOKENIZER, traces, fraction).encode(problem)


@pytest.mark.parametrize("traces", STEPS)
def test_steps_end_where_their_text_does(traces: TraceForm) -> None:
    record = encode(traces)
    assert len(record.step_ends) == 3 and record.step_ends[-1] == len(record.cot_ids)
    assert record.step_ends == sorted(set(record.step_ends))
    read = [TOKENIZER.decode(record.cot_ids[:end]) for end in record.step_ends]
    for text, upto in zip(STEPS[traces], read, strict=True):
        # A token that reaches over the end belongs to the step that it begins in.
        assert text in upto and len(upto[upto.index(text) + len(text) :].strip()) <= 2


@pytest.mark.parametrize(
    ("traces", "stated"),
    [("equations", "153023"), ("results", "153023"), ("checked", "153023"), ("sentences", "")],
)
def test_results_are_marked_token_by_token(traces: TraceForm, stated: str) -> None:
    record = encode(traces)
    text = "".join(TOKENIZER.decode([record.cot_ids[i]]) for i in record.results)
    assert text.replace(" ", "") == stated


def test_a_part_of_the_trace_has_its_own_steps_only() -> None:
    record = encode("equations", 0.5)
    assert len(record.step_ends) == 2 and record.step_ends[-1] == len(record.cot_ids)


def test_results_come_from_equations() -> None:
    row = Row({"question": "q", "answer": "a <<1+2=3>>3\nb <<3*4=12>>12\n#### 12"}, "r:1", 0)
    (problem,), left_out = Reading("results").problems(GSM8K(), [row], "train", taught=True)
    assert problem.steps == ("3", "12") and not left_out


def test_checked_results_come_from_equations() -> None:
    row = Row({"question": "q", "answer": "a <<1+2=3>>3\nb <<3*4=12>>12\n#### 12"}, "r:1", 0)
    (problem,), left_out = Reading("checked").problems(GSM8K(), [row], "train", taught=True)
    assert problem.steps == ("3: 1+2 = 3", "12: 3*4 = 12") and not left_out


def test_a_checked_step_begins_and_ends_in_the_same_tokens() -> None:
    """What the last token of a step foretells is the token that the next step ends in."""
    record = encode("checked")
    stated = [
        [i for i in record.results if first <= i < last]
        for first, last in zip([0, *record.step_ends], record.step_ends, strict=False)
    ]
    for first, places in zip([0, *record.step_ends], stated, strict=False):
        claim = record.cot_ids[first : first + len(places)]
        assert claim == [record.cot_ids[i] for i in places]


def test_a_source_of_sentences_has_no_results() -> None:
    with pytest.raises(KavaError, match=r"gsm8k-aug-nl has sentences, found results"):
        check_form(GSM8kAugNL(), "results")

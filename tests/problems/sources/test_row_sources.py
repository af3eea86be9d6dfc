"""Every source that is read: what a row of it becomes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.problems.records import TraceForm
from kava_core.problems.rows import Row
from kava_core.problems.sources import SOURCES, RowSource, sources_of
from kava_core.problems.sources.base import NOTE, Draft, UnusableRow, sentences
from kava_core.problems.sources.table import Table

TABLE = Table(question="q", answer="a", steps="s", topic="t", separator=" ; ")


def row(**fields: Any) -> Row:
    return Row(fields, "rows.jsonl:7", 6)


def aug(line: str) -> Row:
    return row(text=line)


# source, form, row, question, steps, answer, topic
READ = [
    (
        "gsm8k",
        "equations",
        row(question="How many?", answer="It is 48/2 = <<48 / 2=24>>24.\nAll.\n#### 1,024"),
        Draft("How many?", ("<<48/2=24>>",), "1024", "word problem"),
    ),
    (
        "gsm8k",
        "sentences",
        row(question="How many?", answer="It is  48/2 = <<48/2=24>>24. Yes.\n\nAll.\n#### -24"),
        Draft("How many?", ("It is 48/2 = 24. Yes.", "All."), "-24", "word problem"),
    ),
    (
        "gsm8k-aug",
        "equations",
        aug("A robe | takes 2?||<<2/2=1>> <<2+1=3>> #### 3"),
        Draft("A robe | takes 2?", ("<<2/2=1>>", "<<2+1=3>>"), "3", "word problem"),
    ),
    (
        "gsm8k-aug",
        "equations",
        aug("No steps?|| #### 1,080.50"),
        Draft("No steps?", (), "1080.50", "word problem"),
    ),
    (
        "gsm8k-aug",
        "equations",
        row(question="How many?", steps=["<<2/2=1>>", "<<2+1=3>>"], answer="3"),
        Draft("How many?", ("<<2/2=1>>", "<<2+1=3>>"), "3", "word problem"),
    ),
    (
        "gsm8k-aug",
        "equations",
        row(question="How many?", steps="<<2/2=1>> <<2+.5=2.5>>", answer=2.5),
        Draft("How many?", ("<<2/2=1>>", "<<2+.5=2.5>>"), "2.5", "word problem"),
    ),
    (
        "gsm8k-aug",
        "equations",
        row(question="How many?", cot="<<2/2=1>> <<2+1=3>>", answer="3"),  # zen-E/GSM8k-Aug
        Draft("How many?", ("<<2/2=1>>", "<<2+1=3>>"), "3", "word problem"),
    ),
    (
        "gsm8k-aug",
        "equations",
        row(question="How many?", cot=["<<2/2=1>>", "<<2+1=3>>"], answer="3"),
        Draft("How many?", ("<<2/2=1>>", "<<2+1=3>>"), "3", "word problem"),
    ),
    (
        "gsm8k-aug-nl",
        "sentences",
        row(  # whynlp/gsm8k-aug-nl
            question="How many?", steps=["He has 2. He buys 1.", " ", "So he has  3."], answer="3"
        ),
        Draft("How many?", ("He has 2. He buys 1.", "So he has 3."), "3", "word problem"),
    ),
    (
        "gsm8k-aug-nl",
        "sentences",
        row(question="How many?", cot="Mr. A has 2.5 kg. He buys 1. So 3.5.", answer="#### 3.5"),
        Draft("How many?", ("Mr. A has 2.5 kg.", "He buys 1.", "So 3.5."), "3.5", "word problem"),
    ),
    (
        "gsm-hard",
        "equations",
        row(input="How many?", code="def solution():\n    return 1", target=64944670.0),
        Draft("How many?", (), "64944670", "word problem"),
    ),
    (
        "gsm-hard",
        "sentences",
        row(input="How many?", code="", target=-0.1),
        Draft("How many?", (), "-0.1", "word problem"),
    ),
    (
        "svamp",
        "equations",
        row(
            Body="Dan has 8 cats.",
            Question="How many?",
            Equation="( 8.0 - 2.50 )",
            Answer=5.5,
            Type="Subtraction",
        ),
        Draft("Dan has 8 cats. How many?", ("<<8-2.50=5.5>>",), "5.5", "Subtraction"),
    ),
    (
        "svamp",
        "equations",
        row(
            Body="B",
            Question="Q?",
            Equation="( ( 8.0 - 2.0 ) * ( 3.0 + 10.0 ) )",
            Answer="78.0",
            Type="Multiplication",
        ),
        Draft("B Q?", ("<<(8-2)*(3+10)=78>>",), "78", "Multiplication"),
    ),
    (
        "svamp",
        "equations",
        row(  # ChilleD/SVAMP
            ID="chal-7",
            Body="Dan has 8 cats",
            Question="How many?",
            Equation="( 290.0 / 2.0 )",
            Answer="145",
            Type="Common-Division",
            question_concat="Dan has 8 cats How many?",
        ),
        Draft("Dan has 8 cats How many?", ("<<290/2=145>>",), "145", "Common-Division"),
    ),
    (
        "multiarith",
        "equations",
        row(  # MultiArith.json
            iIndex=1,
            sQuestion=" A pet store had 13 siamese cats . How many are left ? ",
            lEquations=["X=((13.0+5.0)-10.0)"],
            lSolutions=[8.0],
        ),
        Draft(
            " A pet store had 13 siamese cats . How many are left ? ",
            ("<<(13+5)-10=8>>",),
            "8",
            "word problem",
        ),
    ),
    (
        "multiarith",
        "sentences",
        row(question="How many?", final_ans="1,008"),  # ChilleD/MultiArith
        Draft("How many?", (), "1008", "word problem"),
    ),
    (
        "metamath",
        "sentences",
        row(  # meta-math/MetaMathQA
            query="What is $x$?",
            response="We add.\nSo $x = 110$. Done.\n#### 110\nThe answer is: 110",
            type="GSM_Rephrased",
            original_question="How many?",
        ),
        Draft("What is $x$?", ("We add.", "So $x = 110$.", "Done."), "110", "GSM_Rephrased"),
    ),
    (
        "metamath",
        "sentences",
        row(query="Q?", response="The answer is: no. Look again. The answer is: \\frac{1}{2}\n"),
        Draft("Q?", ("The answer is: no.", "Look again."), "\\frac{1}{2}", "mathematics"),
    ),
    (
        "math",
        "sentences",
        row(
            problem="What is $x$?",
            solution="First \\boxed{1}.\nThen $x = \\boxed{\\frac{a_{1}}{\\sqrt{b}}}$.",
            type="Algebra",
            level="Level 1",
        ),
        Draft(
            "What is $x$?",
            ("First \\boxed{1}.", "Then $x = \\boxed{\\frac{a_{1}}{\\sqrt{b}}}$."),
            "\\frac{a_{1}}{\\sqrt{b}}",
            "Algebra",
        ),
    ),
    (
        "table",
        "sentences",
        row(q="Q?", a=" 7 ", s="one ; two  words ; ", t="sums"),
        Draft("Q?", ("one", "two words"), "7", "sums"),
    ),
    (
        "table",
        "equations",
        row(q="Q?", a=7, s=["<<3+4=7>>"], t="sums"),
        Draft("Q?", ("<<3+4=7>>",), "7", "sums"),
    ),
]

UNUSABLE = [
    ("gsm8k-aug", aug("Q?||<<1+1=2>> #### two"), "answer is no number"),
    ("gsm8k-aug", aug("Q?||<<1+1=2>> ####"), "no answer"),
    ("gsm8k-aug", aug("Q?||add 1 <<1+1=2>> #### 2"), "steps that are no <<equations>>"),
    ("gsm8k-aug", row(question="Q?", steps=[], answer=None), "no answer"),
    ("gsm8k-aug-nl", row(question="Q?", cot="Add.", answer=None), "no answer"),
    ("gsm8k-aug-nl", row(question="Q?", cot="Add.", answer="some"), "answer is no number"),
    ("gsm-hard", row(input="Q?", target=None), "no answer"),
    ("multiarith", row(question="Q?", final_ans=" "), "no answer"),
    ("multiarith", row(question="Q?", final_ans="some"), "answer is no number"),
    ("metamath", row(query="Q?", response="We add."), "no answer"),
    ("metamath", row(query="Q?", response="The answer is: "), "no answer"),
    ("math", row(problem="Q?", solution="It is 2."), "no answer in a"),
    ("math", row(problem="Q?", solution="It is \\boxed{2."), "no answer in a"),
    ("table", row(q="Q?", a="", s="", t="sums"), "no answer"),
]

MALFORMED = [
    ("gsm8k", row(question="Q?", answer="2"), "expected `answer` to end in a line '#### number'"),
    ("gsm8k-aug", aug("Q? <<1+1=2>> #### 2"), r"expected 'question\|\|"),
    ("gsm8k-aug", aug("Q?||<<1+1=2>> 2"), r"expected 'question\|\|"),
    ("gsm8k-aug", row(question="Q?", answer="2"), "`steps` or `cot`, found no such field beside"),
    ("gsm8k-aug", row(question="Q?", steps=[1], answer="2"), r"`steps`, found list \[1\]"),
    ("gsm8k-aug-nl", row(question="Q?", cot=None, answer="2"), "`cot`, found NoneType"),
    ("gsm-hard", row(input="Q?", target=[2]), "`target`, found list"),
    ("gsm-hard", row(input="Q?"), "`target`, found no such field"),
    ("svamp", row(Body="B", Question="Q?", Answer=1, Type="T"), "`Equation`, found no such"),
    (
        "svamp",
        row(Body="B", Question="Q?", Equation="x=1", Answer=1, Type="T"),
        "an equation of numbers in `Equation`, found str 'x=1'",
    ),
    ("multiarith", row(a=1), "`sQuestion` or `question`, found no such field beside `a`"),
    ("multiarith", row(sQuestion="Q?", lEquations=["X=1"], lSolutions=[1, 2]), "of one item in"),
    (
        "multiarith",
        row(sQuestion="Q?", lEquations=["X=Y"], lSolutions=[1]),
        "an equation of numbers in `lEquations`, found str 'X=Y'",
    ),
    ("metamath", row(query="Q?"), "`response`, found no such field"),
    ("math", row(problem="", solution="\\boxed{1}"), "`problem`, found str ''"),
    ("table", row(q="Q?", a="1", s=3, t="sums"), "`s`, found int 3"),
    ("table", row(a="1", s="x", t="sums"), "`q`, found no such field"),
]


def source(name: str) -> RowSource:
    made = TABLE if name == "table" else SOURCES[name]()
    assert isinstance(made, RowSource)
    return made


@pytest.mark.parametrize(("name", "traces", "found", "draft"), READ)
def test_a_row_becomes_a_problem(name: str, traces: TraceForm, found: Row, draft: Draft) -> None:
    assert source(name).read(found, traces) == draft


@pytest.mark.parametrize(("name", "found", "reason"), UNUSABLE)
def test_a_row_without_a_usable_answer_says_why(name: str, found: Row, reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        source(name).read(found, "equations")


@pytest.mark.parametrize(("name", "found", "words"), MALFORMED)
def test_a_malformed_row_names_its_place(name: str, found: Row, words: str) -> None:
    with pytest.raises(KavaError, match=f"^rows.jsonl:7: .*{words}"):
        source(name).read(found, "equations")


def test_every_source_that_reads_rows_is_tried() -> None:
    assert {case[0] for case in READ} == {
        name for name, kind in SOURCES.items() if issubclass(kind, RowSource)
    }


@pytest.mark.parametrize(("name", "found"), [(case[0], case[2]) for case in READ])
def test_a_published_row_is_known_by_its_fields(name: str, found: Row) -> None:
    assert name in sources_of(found.fields) or name == "table"


def test_fields_of_no_source_and_of_one_field_less() -> None:
    assert sources_of({"q", "a"}) == []
    assert sources_of({"question", "answer"}) == ["gsm8k"]
    assert sources_of({"question", "cot", "answer", "id"}) == ["gsm8k-aug", "gsm8k-aug-nl"]
    assert sources_of({"input", "code"}) == []


@given(st.text(st.sampled_from("Aab 1.3?!\n<>=$\\x"), max_size=60))
def test_sentences_lose_nothing_but_notes_and_spacing(text: str) -> None:
    parts = sentences(text)
    assert " ".join(parts).split() == NOTE.sub("", text).split()
    assert all(part and "\n" not in part for part in parts)


def test_sentences_end_where_a_reader_would_say_so() -> None:
    assert sentences("Dr. B. Lee has 3.5 kg. He sold 2! Why? $x$ is 1. and on.") == (
        "Dr. B. Lee has 3.5 kg.",
        "He sold 2!",
        "Why?",
        "$x$ is 1. and on.",
    )


def test_no_source_evaluates_anything() -> None:
    code = "__import__('os').abort()"
    draft = source("gsm-hard").read(row(input="Q?", code=code, target=1.0), "equations")
    assert "abort" not in repr(draft)

"""Records that cannot be used: all of them named at once, or left out; every row is counted."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from kava_core.errors import KavaError
from kava_core.problems.bad import BadRecords
from kava_core.problems.load import Limits, Reading, load_splits
from kava_core.problems.prepare import FurtherSet, Sizes, prepare_problems
from kava_core.problems.readers import Location
from kava_core.problems.records import Problem
from kava_core.problems.sources.gsm8k_aug import GSM8kAug
from kava_core.problems.sources.gsm_hard import GSMHard
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.splits import ProblemSplits
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.tokens import TokenRules
from kava_core.problems.traces import TraceEncoder

TEXTS = [p.question for p in Synthetic().splits(50, 0, 0, seed=0).train]
TOKENIZER = train_tokenizer(TEXTS, 300)


def composing() -> PreTrainedTokenizerFast:
    """A tokenizer that writes NFC, as Qwen2's does."""
    backend = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


def row(n: int, **changed: Any) -> dict[str, Any]:
    return {"question": f"{n} and 1?", "cot": f"<<{n}+1={n + 1}>>", "answer": str(n + 1)} | changed


def write(path: Path, rows: list[Any]) -> Location:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Location(str(path))


def load(location: Location, reading: Reading, **sizes: Any) -> ProblemSplits:
    return load_splits(GSM8kAug(), location, reading, **({"validation": 1, "test": 1} | sizes))


ODD = [
    row(1),
    "no json",
    row(2),
    row(3, question=7),
    row(4, cot=None),
    "[1]",
    row(5, question=8),
    row(6, answer="some"),
    row(7),
    row(8, question="half \ud83d of it?"),
]


def test_everything_that_is_wrong_is_named_at_once_with_its_place_and_reason(
    tmp_path: Path,
) -> None:
    location = write(tmp_path / "train.jsonl", ODD)
    with pytest.raises(BadRecords) as caught:
        load(location, Reading("equations"))
    said = str(caught.value)
    assert "6 of 10 of train" in said
    place = f"{tmp_path}/train.jsonl"
    for words in (
        f"1 expected JSON ({place}:2)",
        f"2 expected a text in `question` ({place}:4, {place}:7)",
        f"1 expected a text or a list of texts in `cot` ({place}:5)",
        f"1 expected a JSON object ({place}:6)",
        f"1 expected Unicode text ({place}:10)",
        "`prepare.on_bad_record: drop`",
    ):
        assert words in said


def test_bad_records_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    location = write(tmp_path / "train.jsonl", ODD)
    splits = load(location, Reading("equations", on_bad_record="drop"))
    assert splits.counts("train") == {
        "in": 8,  # ten, without one for validation and one for test
        "kept": 1,
        "dropped": {
            "answer is no number": 1,
            "bad: expected JSON": 1,
            "bad: expected Unicode text": 1,
            "bad: expected a JSON object": 1,
            "bad: expected a text in `question`": 2,
            "bad: expected a text or a list of texts in `cot`": 1,
        },
    }
    kept = [*splits.train, *splits.validation, *splits.test]
    assert {problem.id[-6:] for problem in kept} == {"000000", "000002", "000008"}
    assert [bad.place[-2:] for bad in splits.bad["train"]] == [":2", ":4", ":5", ":6", ":7", "10"]
    with pytest.raises(
        KavaError, match=r"No usable train row .*3 with bad: expected JSON.*The first"
    ):
        load(
            write(tmp_path / "none.jsonl", ["x", "y", "z"]),
            Reading("equations", on_bad_record="drop"),
        )


def test_many_of_one_kind_are_a_number_and_the_first_few(tmp_path: Path) -> None:
    location = write(tmp_path / "train.jsonl", [row(n, question=n) for n in range(9)])
    with pytest.raises(BadRecords, match=r"9 expected a text in `question` \(.*:5 and 4 more\)"):
        load(location, Reading("equations"))


def test_bad_rows_of_all_splits_and_test_sets_are_one_error(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row(n) for n in range(5)] + ["x"])
    write(tmp_path / "test.jsonl", [row(9), "y", "z"])
    hard = write(tmp_path / "hard.jsonl", [{"input": "Q?", "target": 1.0}, {"input": "Q?"}])
    with pytest.raises(BadRecords, match="1 of 2 of hard, 1 of 6 of train, 2 of 3 of test"):
        prepare_problems(
            GSM8kAug(),
            Location(str(tmp_path)),
            Reading("equations"),
            Sizes(None, 1, None),
            test_sets={"hard": FurtherSet(GSMHard(), hard)},
        )


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"query": "Q?", "response": "R"}, "Its fields are those of source metamath."),
        (
            {"question": "Q?", "answer": "Add.\n#### 2"},
            "no such field beside `question`, `answer`. Mend the row. Its fields are those of "
            "source gsm8k.",
        ),
        ({"q": "Q?", "a": "2"}, "Source table takes any fields by their names."),
    ],
)
def test_a_missing_field_names_those_that_are_there_and_who_would_take_them(
    tmp_path: Path, fields: dict[str, str], hint: str
) -> None:
    with pytest.raises(KavaError) as caught:
        load(write(tmp_path / "train.jsonl", [fields]), Reading("equations"))
    assert hint in str(caught.value)


def test_texts_are_composed_so_that_tokenizers_can_write_them(tmp_path: Path) -> None:
    question = unicodedata.normalize("NFD", "Has André 3 cafés?")
    tokens = TokenRules(TraceEncoder(composing()))
    raw = Problem("p", question, ("<<1+1=2>>",), "2", "hand", "any")
    assert "does not survive the tokenizer" in str(tokens.encoder.measure([raw])[0].fault)
    with pytest.raises(KavaError, match="Problem p does not survive the tokenizer"):
        tokens.encoder.encode(raw)
    location = write(tmp_path / "train.jsonl", [row(1, question=question), row(2), row(3)])
    splits = load(location, Reading("equations", tokens=tokens), seed=1)
    questions = {p.question for p in [*splits.train, *splits.validation, *splits.test]}
    assert "Has André 3 cafés?" in questions


def test_what_the_tokenizer_cannot_write_is_a_bad_record(tmp_path: Path) -> None:
    rows = [row(1), row(2, question="a <|eos|>?"), row(3), row(4, question="b <|pad|>?"), row(5)]
    location = write(tmp_path / "train.jsonl", rows)
    tokens = TokenRules(TraceEncoder(TOKENIZER))
    with pytest.raises(
        BadRecords, match=r"2 of 5 of train.* 2 expected a text that the token"
    ) as c:
        load(location, Reading("equations", tokens=tokens))
    assert "train.jsonl:2, " in str(c.value) and "special tokens ['<|eos|>']" in str(c.value)
    splits = load(location, Reading("equations", tokens=tokens, on_bad_record="drop"))
    assert splits.dropped["train"] == {"bad: expected a text that the tokenizer can write": 2}


def test_limits_in_tokens_count_as_the_encoder_does(tmp_path: Path) -> None:
    rows = [
        row(1),
        row(2),
        row(3),
        row(10**9),
        row(5, question="How many is that in all, 5 and 1?"),
    ]
    write(tmp_path / "train.jsonl", rows)
    write(
        tmp_path / "test.jsonl",
        [row(7), row(10**9 + 1), row(8, question="And 8, in all the world?")],
    )
    encoder = TraceEncoder(TOKENIZER)
    (usual,) = encoder.encode_all([Problem("p", "1 and 1?", ("<<1+1=2>>",), "2", "hand", "any")])
    tokens = TokenRules(encoder, len(usual.question_ids) + 9, len(usual.cot_ids))
    location = Location(str(tmp_path))
    splits = load_splits(GSM8kAug(), location, Reading("equations", tokens=tokens), validation=1)
    question = f"question longer than {tokens.max_question_tokens} tokens"
    trace = f"trace longer than {tokens.max_trace_tokens} tokens"
    assert splits.dropped == {"train": {question: 1, trace: 1}, "test": {question: 1}}
    assert len(splits.test) == 2  # one with a longer trace
    lengths = tokens.lengths(splits.train)
    records = encoder.encode_all(splits.train)
    assert lengths == ([len(r.question_ids) for r in records], [len(r.cot_ids) for r in records])


odd_rows = st.one_of(
    st.integers(0, 20).map(row),  # repeated questions among them
    st.integers(0, 20).map(row),
    st.integers(0, 3).map(lambda n: row(n, question="How many is that in all of it, now?" * n)),
    st.sampled_from(
        [
            "no json",
            "[1]",
            row(1, question=3),
            row(1, answer=None),
            row(1, answer="two"),
            row(1, cot=""),
            row(1, cot="add"),
            row(2, cot="<<1+1=2>>" * 20, question="Long?"),
            row(2, question="<|eos|>?"),
        ]
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(odd_rows, min_size=8, max_size=24),
    st.none() | st.lists(odd_rows, min_size=2, max_size=8),
    st.none() | st.lists(odd_rows, min_size=2, max_size=8),
    st.lists(odd_rows, min_size=2, max_size=8),
    st.booleans(),
    st.sampled_from([None, TokenRules(TraceEncoder(TOKENIZER), 30, 60)]),
    st.none() | st.integers(1, 3),
)
def test_every_row_is_in_exactly_one_count(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[Any],
    validation: list[Any] | None,
    test: list[Any] | None,
    more: list[Any],
    deduplicate: bool,
    tokens: TokenRules | None,
    train_size: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    given_rows = {"train": train, "validation": validation, "test": test}
    files = {name: rows for name, rows in given_rows.items() if rows is not None}
    for name, rows in files.items():
        write(folder / f"{name}.jsonl", rows)
    reading = Reading(
        "equations", limits=Limits(max_question_characters=60), tokens=tokens, on_bad_record="drop"
    )
    try:
        splits = prepare_problems(
            GSM8kAug(),
            Location(str(folder)),
            reading,
            Sizes(train_size, 1, None if test else 1),
            deduplicate=deduplicate,
            allow_leakage=not deduplicate,
            test_sets={"more": FurtherSet(GSM8kAug(), write(folder / "more.jsonl", more))},
        )
    except KavaError:  # too few of them are left: nothing is written, and nothing to be counted
        event("refused")
        return
    event("read")
    counts = {name: splits.counts(name) for name in (*splits.taught(), *splits.asked())}
    for name, count in counts.items():
        assert count["in"] == count["kept"] + sum(count["dropped"].values()), name
        assert all(count["dropped"].values())
    own = [counts[name]["in"] for name in ("train", "validation", "test")]
    assert sum(own) == sum(map(len, files.values()))
    assert counts["more"]["in"] == len(more)

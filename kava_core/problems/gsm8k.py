"""GSM8K: `question`, and an `answer` of sentences with `<<a=b>>` notes and a last line `#### n`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from kava_core.errors import KavaError
from kava_core.problems.files import Row, read_source
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.splits import ProblemSplits, cut_splits

SOURCE = "gsm8k"
_HUB_CONFIG = "main"
_NOTE = re.compile(r"<<([^<>\n]*=[^<>\n]*)>>")
_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def load_gsm8k(
    location: str,
    *,
    traces: TraceForm,
    train: int | None = None,
    validation: int = 500,
    test: int | None = None,
    seed: int = 0,
    allow_leakage: bool = False,
) -> ProblemSplits:
    """The problems of GSM8K from a file, a folder or the Hub (`openai/gsm8k`).

    `traces` chooses the notes ("equations") or the sentences without them. Sizes of None take all;
    validation is cut from train by `seed`, and so is test where the source has none. Rows that
    cannot be used are counted by reason in `dropped`. KavaError for a malformed row (with its
    place), for too few rows, and for test questions that stand in train unless `allow_leakage`.
    """
    if traces not in ("equations", "sentences"):
        raise KavaError(f"Expected `traces` to be equations or sentences, found {traces!r}.")
    dropped: dict[str, dict[str, int]] = {}
    problems: dict[str, list[Problem]] = {"train": [], "test": []}
    for split, rows in read_source(location, _HUB_CONFIG).items():
        problems[split], reasons = _problems(rows, split, traces)
        if not problems[split]:
            raise KavaError(
                f"No usable {split} row in {location} (left out: {dict(reasons) or 'none'}). "
                "Check that it is GSM8K, and the form of the traces."
            )
        if reasons:
            dropped[split] = dict(reasons)
    return cut_splits(
        problems["train"],
        problems["test"],
        train_size=train,
        validation_size=validation,
        test_size=test,
        seed=seed,
        allow_leakage=allow_leakage,
        dropped=dropped,
    )


def _problems(
    rows: Iterable[Row], split: str, traces: TraceForm
) -> tuple[list[Problem], Counter[str]]:
    problems = []
    reasons: Counter[str] = Counter()
    for row in rows:
        question = " ".join(row.text("question").split())
        body, mark, last = row.text("answer").rpartition(_MARK)
        answer = last.strip()
        if not mark or not _NUMBER.fullmatch(answer):
            raise KavaError(
                f"{row.place}: expected `answer` to end in a line '{_MARK} number', found "
                f"{(mark + last)[-60:]!r}. Mend the row."
            )
        steps = equations(body) if traces == "equations" else sentences(body)
        if not steps:
            reasons["no notes" if traces == "equations" else "no sentences"] += 1
            continue
        problems.append(
            Problem(
                id=f"{SOURCE}-{split}-{row.number:06d}",
                question=question,
                steps=steps,
                answer=answer.replace(",", ""),
                source=SOURCE,
                topic="word problem",
            )
        )
    return problems, reasons


def equations(body: str) -> tuple[str, ...]:
    """The notes of a solution without spaces: ("<<48/2=24>>", …)."""
    return tuple(f"<<{''.join(note.split())}>>" for note in _NOTE.findall(body))


def sentences(body: str) -> tuple[str, ...]:
    """The lines of a solution without its notes."""
    lines = (" ".join(line.split()) for line in _NOTE.sub("", body).splitlines())
    return tuple(line for line in lines if line)

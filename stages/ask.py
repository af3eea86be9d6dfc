"""`kava ask`: put questions to a trained student."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import click

from kava_core.artefacts import disk_errors, make_folders, sync
from kava_core.console import complain, printable, progress, warn
from kava_core.errors import KavaError
from kava_core.wording import shown

BESIDE = "beside"  # the teacher's folder, where --compare names none
BATCH_SIZE = 32
TOGETHER = 8  # batches whose answers are kept at once: each is of questions of similar length


@click.command("ask")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("question", required=False)
@click.option("--interactive", is_flag=True, help="Read questions one after the other.")
@click.option(
    "--file",
    "source",
    type=click.Path(path_type=Path),
    help="Read questions from a file: one a line, or in .jsonl an object with a `question` each.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the answers to --file here, as JSONL."
)
@click.option(
    "--batch-size", type=click.IntRange(1), help=f"Of --file, asked at once ({BATCH_SIZE})."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--compare",
    is_flag=False,
    flag_value=BESIDE,
    metavar="[TEACHER]",
    help="Let the student's teacher write its chain as well; its folder, if not in ../../teacher.",
)
@click.option("--base", help="Of a student kept as adapters: its model, if not where they say.")
@click.option("--write-steps", is_flag=True, help="Let the student write its steps (w_cot > 0).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per question.")
def ask(
    student: Path,
    question: str | None,
    interactive: bool,
    source: Path | None,
    out: Path | None,
    batch_size: int | None,
    max_new_tokens: int,
    compare: str | None,
    base: str | None,
    write_steps: bool,
    as_json: bool,
) -> None:
    """Let the student in folder STUDENT answer QUESTION, or those of --interactive or --file.

    Prints the answer; the passes through the decoder that it took to think, and those that it took
    in all, the written answer included; the seconds; and what each latent decodes to: the token
    that the language-model head reads in the hidden state that became it.
    """
    if sum((question is not None, interactive, source is not None)) != 1:
        some = question is not None or interactive or source is not None
        taken = compare not in (None, BESIDE) and not some
        raise KavaError(
            f"expected one of QUESTION, --interactive and --file, found "
            f"{'several' if some else 'none'}. "
            + (f"--compare took {shown(compare)} for the teacher's folder. " if taken else "")
            + "Put a question in quotes behind the student."
        )
    if question is not None and not question.strip():
        raise KavaError("expected a question, found nothing. Put it in quotes behind the student.")
    if question is not None:
        _check_text(question)
    if source is None and (out is not None or batch_size is not None):
        name = "--out" if out is not None else "--batch-size"
        raise KavaError(f"{name} is for the questions of --file, and there is none. Leave it out.")
    if source is not None and out is not None and source.resolve() == out.resolve():
        raise KavaError(
            f"--out {out}: expected another file than --file, whose questions would be lost, found "
            "the same. Name another one."
        )
    if source is not None and as_json:
        raise KavaError("--json says nothing with --file, which gives JSON lines. Leave it out.")

    from kava_core.evaluation.questions import Question, Respondents, read_questions

    teacher = None
    if compare is not None:
        teacher = student.resolve().parents[1] / "teacher" if compare == BESIDE else Path(compare)

    if source is not None:
        asked = read_questions(source)
        with _kept(out) as keep:
            respondents = Respondents.of(student, steps=write_steps, teacher=teacher, base=base)
            respondents.check(asked)
            respondents.warm_up(asked[0].text)
            size = batch_size or BATCH_SIZE
            total = len(asked) * len(list(respondents))
            with progress() as display:
                task = display.add_task("questions", total=total, note="")
                for first in range(0, len(asked), TOGETHER * size):
                    rows = respondents.answer(
                        asked[first : first + TOGETHER * size],
                        batch_size=size,
                        max_new_tokens=max_new_tokens,
                        advance=lambda n: display.advance(task, n),
                    )
                    keep(rows)
        return

    respondents = Respondents.of(student, steps=write_steps, teacher=teacher, base=base)
    respondents.warm_up(question or "How many?")

    def answer(text: str) -> None:
        (found,) = respondents.answer([Question(text)], batch_size=1, max_new_tokens=max_new_tokens)
        said = json.dumps(found, ensure_ascii=False) if as_json else printable(_readable(found))
        click.echo(said)

    if question is not None:
        answer(question)
        return
    for text in _typed():
        try:
            _check_text(text)
            answer(text)
        except KavaError as error:  # of this question; the next one may be another matter
            complain(f"error: {error}", error)


def _check_text(question: str) -> None:
    """KavaError if it is no UTF-8: Python puts half of a character for each byte that is none."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise KavaError(
            f"expected a question in UTF-8, found other bytes behind {error.start} characters "
            f"({shown(question)}). Write it in UTF-8."
        ) from None


@contextmanager
def _kept(out: Path | None) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
    """What takes rows as they are made: the lines of `out`, or of stdout, once all are there.

    Until then they lie beside `out`, and stay there if the others cannot be made. KavaError, before
    any is made, if `out` cannot be written.
    """
    try:
        if out is None:
            rows: list[dict[str, Any]] = []
            yield rows.extend
            click.echo(_lines(rows), nl=False)
        else:
            with _Partial(out) as partial:
                yield partial.keep
    except BaseException as error:
        error.add_note("the same command begins with the first question again")
        raise


class _Partial:
    """The file beside `out` that becomes `out` when all has gone well."""

    def __init__(self, out: Path) -> None:
        if out.exists() and not out.is_file():
            raise KavaError(f"--out {out}: expected a file or nothing, found something else.")
        self.out, self.path = out, out.with_name(f"{out.name}.{os.getpid()}.partial")
        self.count = 0
        with disk_errors(out):
            make_folders(out.parent)
            self.file = self.path.open("w", encoding="utf-8")

    def keep(self, rows: Sequence[dict[str, Any]]) -> None:
        with disk_errors(self.out):
            self.file.write(_lines(rows))
            self.file.flush()
        self.count += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with disk_errors(self.out):
            self.file.close()
            if kind is None:
                sync(self.path)
                self.path.replace(self.out)
                sync(self.out.parent)
            elif not self.count:
                self.path.unlink()
        if kind is not None and self.count:
            warn(f"ask: {self.count} answers were written, and are in {self.path}")


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _typed() -> Iterator[str]:
    """Questions until the end of the input, or an empty one; the prompt is for people only."""
    # Else bytes that are no UTF-8 would end it, where the locale has it so.
    cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="surrogateescape")
    while True:
        try:
            text = click.prompt("question", default="", show_default=False, err=True)
        except click.Abort:
            return
        if not text.strip():
            return
        yield text


def _readable(found: dict[str, Any]) -> str:
    lines = [
        found["answer"] or f"(no answer in {found['text']!r})",
        f"{found['reasoning_passes']} passes to read the question and think in {found['latents']} "
        f"latents, {found['passes']} in all, {found['seconds']:.3f} s",
    ]
    if found["written_steps"]:
        lines[1] = f"{found['passes']} passes to write its steps, {found['seconds']:.3f} s"
        lines.append(f"steps: {found['text'].strip()}")
    if found["thoughts"]:
        lines.append(f"latents decode to: {' '.join(repr(token) for token in found['thoughts'])}")
    for origin in {"teacher", "base"} & found.keys():
        other = found[origin]
        lines.append(
            f"{origin}: {other['answer'] or '(no answer)'}, {other['passes']} passes, "
            f"{other['seconds']:.3f} s: {other['text'].strip()}"
        )
    return "\n".join(lines)

"""`kava ask`: put questions to a trained student."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from kava_core.artefacts import atomic_path
from kava_core.errors import KavaError

BESIDE = "beside"  # the teacher's folder, where --compare names none
BATCH_SIZE = 32


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
    write_steps: bool,
    as_json: bool,
) -> None:
    """Let the student in folder STUDENT answer QUESTION, or those of --interactive or --file.

    Prints the answer; the passes through the decoder that it took to think, and those that it took
    in all, the written answer included; the seconds; and what each latent decodes to: the token
    that the language-model head reads in the hidden state that became it.
    """
    if sum((question is not None, interactive, source is not None)) != 1:
        raise KavaError(
            "expected one of QUESTION, --interactive and --file, found "
            + ("none." if question is None and not interactive and source is None else "several.")
            + " Put a question in quotes behind the student."
        )
    if question is not None and not question.strip():
        raise KavaError("expected a question, found nothing. Put it in quotes behind the student.")
    if source is None and (out is not None or batch_size is not None):
        name = "--out" if out is not None else "--batch-size"
        raise KavaError(f"{name} is for the questions of --file, and there is none. Leave it out.")
    if source is not None and as_json:
        raise KavaError("--json says nothing with --file, which gives JSON lines. Leave it out.")

    from kava_core.console import printable, progress
    from kava_core.evaluation.questions import Question, Respondents, read_questions

    asked = [] if source is None else read_questions(source)
    teacher = None
    if compare is not None:
        teacher = student.resolve().parents[1] / "teacher" if compare == BESIDE else Path(compare)
    respondents = Respondents.of(student, steps=write_steps, teacher=teacher)
    respondents.warm_up(asked[0].text if asked else question or "How many?")

    def answer(text: str) -> None:
        (found,) = respondents.answer([Question(text)], batch_size=1, max_new_tokens=max_new_tokens)
        said = json.dumps(found, ensure_ascii=False) if as_json else printable(_readable(found))
        click.echo(said)

    if question is not None:
        answer(question)
        return
    if interactive:
        for text in _typed():
            answer(text)
        return
    with progress() as display:
        task = display.add_task("questions", total=len(asked) * len(list(respondents)), note="")
        rows = respondents.answer(
            asked,
            batch_size=batch_size or BATCH_SIZE,
            max_new_tokens=max_new_tokens,
            advance=lambda n: display.advance(task, n),
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        click.echo(lines, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        temporary.write_text(lines, encoding="utf-8")


def _typed() -> Iterator[str]:
    """Questions until the end of the input, or an empty one; the prompt is for people only."""
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
    if "teacher" in found:
        teacher = found["teacher"]
        lines.append(
            f"teacher: {teacher['answer'] or '(no answer)'}, {teacher['passes']} passes, "
            f"{teacher['seconds']:.3f} s: {teacher['text'].strip()}"
        )
    return "\n".join(lines)

"""`kava ask`: put a question to a trained student."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kava_core.errors import KavaError

LONGEST = 256


@click.command("ask")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ask(student: Path, question: str, as_json: bool) -> None:
    """Let the student in folder STUDENT answer QUESTION.

    Prints the answer, the passes through the decoder that it took to think, and those that it took
    in all, the written answer included.
    """
    if not question.strip():
        raise KavaError("expected a question, found nothing. Put it in quotes behind the student.")
    import torch

    from kava_core.models.loading import load_tokenizer, to_device
    from kava_core.models.students import open_student
    from kava_core.problems.judge import read_answer
    from kava_core.problems.traces import TraceEncoder

    model = to_device(open_student(student))
    encoder = TraceEncoder(load_tokenizer(str(student)))
    ids = torch.tensor(encoder.encode_questions([question]), device=model.device)
    written = model.generate(ids, max_new_tokens=LONGEST)
    text = str(encoder.tokenizer.decode(written.tokens[0], skip_special_tokens=True))
    found = {
        "question": question,
        "answer": read_answer(text, prompted=bool(model.config.answer_prompt_ids)),
        "text": text,
        "latents": model.config.latents,
        "reasoning_passes": model.latent_passes,
        "passes": int(written.passes[0]),
    }
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    click.echo(found["answer"] or f"(no answer in {text!r})")
    click.echo(
        f"{found['reasoning_passes']} passes to read the question and think in {found['latents']} "
        f"latents, {found['passes']} in all"
    )

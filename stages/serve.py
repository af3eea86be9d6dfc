"""`kava serve`: an OpenAI-compatible server for a student, or for its teacher."""

from __future__ import annotations

import os
from pathlib import Path

import click

from kava_core.errors import KavaError

TOKEN = "KAVA_SERVE_TOKEN"


@click.command("serve")
@click.argument("student", type=click.Path(path_type=Path))
@click.option("--base", help="Of a student kept as adapters: its model, if not where they say.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Who may reach it.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any."
)
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Answers that are written together.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Answers that wait; more are refused (429).",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of an answer."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds of a request.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=256_000,
    show_default=True,
    help="Bytes of a request.",
)
def serve(
    student: Path,
    base: str | None,
    host: str,
    port: int,
    max_batch: int,
    queue: int,
    max_tokens: int,
    timeout: float,
    max_body: int,
) -> None:
    """Serve the student in folder STUDENT, or a teacher, to clients of OpenAI's API.

    It has /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. Answers are
    those of `kava ask`, whatever is asked beside them. Where KAVA_SERVE_TOKEN is set, requests must
    bear it. SIGTERM ends it once all that was asked is answered.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not (token.isascii() and token.isprintable() and token.split()):
        raise KavaError(
            f"expected a secret of ASCII characters in {TOKEN}, found "
            + ("another. Choose one" if token.split() else "nothing. Set it")
            + ", or unset it to serve whoever asks."
        )
    try:
        from kava_core.serving import run
        from kava_core.serving.app import Limits
    except ModuleNotFoundError as error:
        raise KavaError(
            f"serving needs {error.name}, which is not installed. Run `pip install 'kava[serve]'`."
        ) from None
    run.serve(
        student,
        base=base,
        host=host,
        port=port,
        limits=Limits(max_batch, queue, max_tokens, timeout, max_body),
        token=None if token is None else token.strip(),
    )

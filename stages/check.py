"""`kava check`: whether a pipeline, or a model, can work, before anything runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from kava_core.console import warn
from kava_core.errors import KavaError

from .run import data_option, pipelines_option

SECONDS = 5  # that the Hub may take to answer


@click.command("check")
@click.argument("names", metavar="[PIPELINE]...", nargs=-1)
@pipelines_option
@data_option
@click.option("--model", help="Instead: folder or Hub id of a causal language model.")
@click.option("--revision", help="Branch, tag or commit of a Hub id; default: its main branch.")
@click.option("--json", "as_json", is_flag=True, help="Of a model: print one JSON object.")
def check(
    names: tuple[str, ...],
    pipelines: Path,
    data: Path,
    model: str | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Check each PIPELINE (default: all of the file), or a model, before it costs days.

    A pipeline: reads its settings, builds its models from their published shapes without memory for
    weights, prints its plan, and runs two steps of every stage on tiny random models of the same
    families with drawn problems. Needs neither weights, nor data, nor a network.

    With --model: says whether it can be a teacher and a student. From its configuration a small
    model of its kind, with random weights, goes through the proofs that the stages make of the
    model itself. Weights that are on this machine are compared with the model by the headers of
    their files. Exit status 1 if something is wrong with the files, or the model can be neither.
    """
    if model is not None:
        if names:
            raise KavaError(f"--model checks a model, and {names[0]} is a pipeline: name one kind.")
        _check_model(model, revision, as_json)
        return
    if revision is not None or as_json:
        raise KavaError("--revision and --json belong to --model. Leave them out, or name a model.")
    from .rehearsal import check_pipelines

    check_pipelines(pipelines, names, data)


def _check_model(model: str, revision: str | None, as_json: bool) -> None:
    on_hub = not Path(model).is_dir() and "HF_HUB_OFFLINE" not in os.environ
    if on_hub and (hub := _unreachable_hub()) is not None:
        warn(f"check: {hub} cannot be reached: only what this machine's cache has is checked")
        os.environ["HF_HUB_OFFLINE"] = "1"  # its library would try again for half a minute
    from kava_core.models.check import Shape, judge_config
    from kava_core.models.loading import check_weights, load_tokenizer, on_disk, whole_config

    config = whole_config(model, revision)
    files: dict[str, str | None] = {}
    files["tokenizer"] = _why_not(load_tokenizer, model, revision)
    if on_disk(model, revision):
        files["weights"] = _why_not(check_weights, model, revision)
    verdict = judge_config(config)
    try:
        shape = asdict(Shape.of(config.get_text_config()))
    except KavaError:
        shape = {"model_type": config.model_type}
    uses = asdict(verdict)
    failed = any(files.values()) or bool(verdict.teacher and verdict.student)
    if as_json:
        found = {"model": model, "shape": shape, "files": files, "uses": uses}
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        click.echo(f"{model}: " + ", ".join(f"{k} {v}" for k, v in shape.items() if v is not None))
        for name, why in {**files, **uses}.items():
            good = "whole" if name in files else "yes"
            click.echo(f"{name.replace('_', ' ')}: {good if why is None else f'no. {why}'}")
    if failed:
        raise SystemExit(1)


def _unreachable_hub() -> str | None:
    """The Hub's address, if nothing there takes a connection."""
    import ssl
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, getproxies, urlopen

    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if "all" in getproxies():
        return None  # which the Hub's library goes through, and this does not
    try:
        urlopen(Request(hub, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:
        return None
    except URLError as error:
        # Certificates are that library's own.
        return None if isinstance(error.reason, ssl.SSLError) else hub
    except (OSError, HTTPException, ValueError):
        return None  # a late answer, a strange one, or no address: whoever loads the model says so
    return None


def _why_not(
    load: Callable[[str, str | None], object], model: str, revision: str | None
) -> str | None:
    try:
        load(model, revision)
    except KavaError as error:
        return str(error)
    return None

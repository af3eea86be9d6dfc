"""What every stage command does the same way: find its settings, its folders, and log its run."""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from kava_core.artefacts import WORK, data_folder, fingerprint
from kava_core.console import reporting, say
from kava_core.lock import alone
from kava_core.settings import Pipeline, load_pipeline

from .graph import check_tracked


@dataclass(frozen=True)
class Run:
    """A stage's view of its pipeline.

    project: the folder of pipelines.yaml; data: the folder of the artefacts.
    """

    name: str
    settings: Pipeline
    project: Path
    data: Path

    def path(self, *parts: str) -> Path:
        """data/<pipeline>/<parts…>, absolute."""
        return (self.data / self.name).joinpath(*parts).absolute()

    @property
    def taught(self) -> Path:
        """The problems with the chains of thought that are taught: the teacher's own, or given."""
        return self.path("problems" if self.settings.traces is None else "traces")


pipelines_option = click.option(
    "--pipelines",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("pipelines.yaml"),
    show_default=True,
    help="File with the settings of all pipelines.",
)
data_option = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Folder of the artefacts.",
)


def stage(function: Callable[..., None]) -> click.Command:
    """Make a click command of `function(run, …)`: options, settings, lock, run log.

    Where DVC tracks the pipeline, what it tracks must be what the stage is made from. Of the runs
    that make one artefact only one is at work.
    """

    @functools.wraps(function)
    def logged(run: Run, **options: Any) -> None:
        check_tracked(run.project, run.name, run.settings, function.__name__)
        what = " ".join([function.__name__, *map(str, options.values())])
        with _alone(run, what), reporting(run.name, what), _logged(run, what):
            function(run, **options)

    return tool(logged)


def tool(function: Callable[..., None]) -> click.Command:
    """Make a click command of `function(run, …)` that makes no artefact: options and settings."""

    @click.option("--pipeline", help="Name of the pipeline; default: the active one of the file.")
    @pipelines_option
    @data_option
    @functools.wraps(function)
    def command(pipeline: str | None, pipelines: Path, data: Path, **options: Any) -> None:
        name, settings = load_pipeline(pipelines, pipeline)
        if settings.resources.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU
        function(Run(name, settings, pipelines.parent, data), **options)

    return click.command(function.__name__)(command)


@contextmanager
def _alone(run: Run, what: str) -> Iterator[None]:
    data = data_folder(run.path())
    folder = run.path().relative_to(data).as_posix()
    name = f"{what.replace(' ', '-')[:100]}-{fingerprint([folder, what])[:24]}.lock"
    with alone(data / WORK / name, what, folder):
        yield


@contextmanager
def _logged(run: Run, what: str) -> Iterator[None]:
    """Times and hosts go to a log outside the artefacts, which must not depend on them."""
    started, began = datetime.now(UTC), time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    log = run.data / ".runs" / f"{run.name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "stage": what,
        "seconds": round(seconds, 1),
        "started": started.isoformat(timespec="seconds"),
        "host": platform.node(),
    }
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    say(f"{what}: done in {seconds:.0f} s")

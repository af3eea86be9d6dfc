"""What every stage command does the same way: find its settings, its folders, and log its run."""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from kava_core.artefacts import WORK, data_folder, fingerprint
from kava_core.console import reporting, say, warn
from kava_core.errors import KavaError
from kava_core.lock import alone
from kava_core.settings import Imported, Imports, Pipeline, load_any_pipeline, load_pipeline

from .graph import check_tracked, command_for


@dataclass(frozen=True)
class AnyRun:
    """A stage's view of its pipeline, which may import its targets.

    project: the folder of pipelines.yaml; data: the folder of the artefacts.
    """

    name: str
    settings: Pipeline | Imported
    project: Path
    data: Path

    def path(self, *parts: str) -> Path:
        """data/<pipeline>/<parts…>, absolute; of targets and teacher, where they are imported
        from."""
        first, *rest = parts or ("",)
        start = self.data / self.name / first
        if (elsewhere := self.imported(first)) is not None:
            start = self.project / elsewhere
        return start.joinpath(*rest).absolute()

    def made(self, *parts: str) -> Path:
        """`path` of an artefact that an earlier stage makes; KavaError that names its command if it
        is not there."""
        path = self.path(*parts)
        command = command_for(self.name, self.settings, "/".join(parts))
        if command is not None and not path.exists():
            raise KavaError(f"{path} is missing. Run `{command}` first.")
        return path

    @property
    def taught(self) -> Path:
        """The problems with the chains of thought that are taught: the teacher's own, or given."""
        written = isinstance(self.settings, Pipeline) and self.settings.traces is not None
        return self.made("traces" if written else "problems")

    @property
    def lacking(self) -> Path | None:
        """The store that names what the teacher could not read, if the settings allow for such."""
        if not isinstance(self.settings, Pipeline):
            return None
        store = self.settings.generate.lacking
        return None if store is None else self.made(store)

    def imported(self, artefact: str) -> Path | None:
        """Where the settings say that `kv_targets` or `teacher` is; None: in its own place."""
        if not isinstance(self.settings, Imported):
            return None
        imports = self.settings.imports
        place = {"kv_targets": imports.targets, "teacher": imports.teacher}.get(artefact)
        return None if place is None else Path(place).expanduser()

    def check_asks(self) -> None:
        """KavaError if the pipeline has no problems that its systems could be asked."""
        if self.settings.prepare is None:
            raise KavaError(
                f"pipeline {self.name} imports its targets and has no problems: it has no stages "
                "prepare, evaluate and report. Add a section `prepare` to it, for problems of your "
                "own."
            )

    def check_imports(self) -> None:
        """KavaError if the pipeline imports its targets, and they or the teacher are not there."""
        if not isinstance(self.settings, Imported):
            return
        for artefact, setting in (("kv_targets", "targets"), ("teacher", "teacher")):
            if not self.path(artefact).is_dir():
                raise KavaError(
                    f"{self.path(artefact)} is no folder, and pipeline {self.name} imports "
                    f"{artefact} from there. Set imports.{setting} to its folder, or put it there "
                    "with `kava store import`."
                )

    def reading(self, imports: Imports) -> AnyRun:
        """This run with targets and teacher from other places, as far as `imports` names them.

        KavaError if the pipeline makes its own, or DVC tracks others.
        """
        if not isinstance(self.settings, Imported):
            raise KavaError(
                f"pipeline {self.name} makes its own targets and teacher, and --targets and "
                "--teacher name others. Leave them out, or name a pipeline that has students alone."
            )
        given = imports.model_dump(exclude_none=True)
        changed = self.settings.imports.model_copy(update=given)
        settings = self.settings.model_copy(update={"imports": changed})
        check_tracked(self.project, self.name, settings, "distill")
        return replace(self, settings=settings)


@dataclass(frozen=True)
class Run(AnyRun):
    """The view of a stage that only pipelines have which make their targets."""

    settings: Pipeline


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
    that make one artefact only one is at work. A pipeline that imports its targets has no such
    stage, and is an error.
    """
    return _command(_guarded(function), imports=False)


def any_stage(function: Callable[..., None]) -> click.Command:
    """`stage`, of one that pipelines have which import their targets, too."""
    return _command(_guarded(function), imports=True)


def tool(function: Callable[..., None]) -> click.Command:
    """Make a click command of `function(run, …)` that makes no artefact: options and settings."""
    return _command(function, imports=True)


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(run: AnyRun, **options: Any) -> None:
        check_tracked(run.project, run.name, run.settings, function.__name__)
        parameters = click.get_current_context().command.params
        named = [p.name for p in parameters if isinstance(p, click.Argument)]
        what = " ".join([function.__name__, *(str(options[name]) for name in named if name)])
        with _alone(run, what), reporting(run.name, what), _logged(run, what):
            function(run, **options)

    return guarded


def _command(function: Callable[..., None], *, imports: bool) -> click.Command:

    @click.option("--pipeline", help="Name of the pipeline; default: the active one of the file.")
    @pipelines_option
    @data_option
    @functools.wraps(function)
    def command(pipeline: str | None, pipelines: Path, data: Path, **options: Any) -> None:
        name, settings = load_any_pipeline(pipelines, pipeline)
        if settings.resources.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU
        if imports:
            function(AnyRun(name, settings, pipelines.parent, data), **options)
            return
        _, settings = load_pipeline(pipelines, name)
        function(Run(name, settings, pipelines.parent, data), **options)

    return click.command(function.__name__)(command)


@contextmanager
def _alone(run: AnyRun, what: str) -> Iterator[None]:
    data = data_folder(run.path())
    folder = run.path().relative_to(data).as_posix()
    name = f"{what.replace(' ', '-')[:100]}-{fingerprint([folder, what])[:24]}.lock"
    with alone(data / WORK / name, what, folder):
        yield


@contextmanager
def _logged(run: AnyRun, what: str) -> Iterator[None]:
    """Times and hosts go to a log outside the artefacts, which must not depend on them."""
    started, began = datetime.now(UTC), time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    log = run.data / ".runs" / f"{run.name}.jsonl"
    entry = {
        "stage": what,
        "seconds": round(seconds, 1),
        "started": started.isoformat(timespec="seconds"),
        "host": platform.node(),
    }
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:  # what the stage made stands: DVC would remove it after a failure
        warn(
            f"{what}: {log} cannot be written ({error.strerror}), and lacks this run. What was "
            "made is in its place; check that disk, and who may write there."
        )
    say(f"{what}: done in {seconds:.0f} s")

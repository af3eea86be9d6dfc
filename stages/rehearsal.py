"""Pipelines tried without weights, data or a network: planned, and run to the end in the small."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

from kava_core.console import console, say
from kava_core.errors import KavaError
from kava_core.settings import Imported, Pipeline, load_any_pipeline, read_document

from .cli import COMMANDS, kava
from .run import AnyRun

if TYPE_CHECKING:
    from kava_core.planning.forecast import Forecast

STAGES = ("prepare", "teacher", "generate", "evict", "fidelity", "distill", "evaluate", "report")


def check_pipelines(pipelines: Path, names: tuple[str, ...], data: Path) -> None:
    """Plan and rehearse the pipelines called `names` (none: all of the file), and say so.

    KavaError names the pipeline, and what is wrong with it.
    """
    from .plan import show

    for name in names or tuple(read_document(pipelines)["pipelines"]):
        _, settings = load_any_pipeline(pipelines, name)
        if isinstance(settings, Imported):
            check_imported(AnyRun(name, settings, pipelines.parent, data))
            say(f"{name}: checked; its targets and teacher belong together")
            continue
        show(planned(name, settings, data / name))
        rehearse(name, settings, data / name)
        say(f"{name}: checked; two steps of every stage run")


def check_imported(run: AnyRun) -> None:
    """KavaError unless targets and teacher are there, belong together, and serve every student
    that reads them."""
    from kava_core.distill.inputs import StudentInputs

    with _named(run.name):
        run.check_imports()
        teacher, source = run.path("teacher"), run.path("kv_targets")
        for name, student in run.settings.students.items():
            if student.reads == "kv_targets":
                StudentInputs.checked(name, student, None, teacher=teacher, source=source)


def planned(name: str, settings: Pipeline, folder: Path) -> Forecast:
    """The plan of a pipeline, after the checks that need no model; KavaError if it cannot work."""
    from kava_core.planning.forecast import forecast
    from kava_core.problems.load import check_form

    with _named(name):
        check_form(settings.prepare.source, settings.prepare.traces)
        return forecast(name, settings, folder)


def rehearse(name: str, settings: Pipeline, folder: Path) -> None:
    """Run two steps of every stage on tiny models of the same families, in a folder of its own."""
    from kava_core.planning.forecast import Shapes
    from kava_core.planning.lengths import lengths_of
    from kava_core.planning.rehearsal import rehearsed

    with _named(name), tempfile.TemporaryDirectory() as place:
        shapes = Shapes.of(settings, lengths_of(settings, folder))
        small = rehearsed(settings, shapes, Path(place) / "models")
        file = Path(place) / "pipelines.yaml"
        file.write_text(
            yaml.safe_dump({"pipeline": name, "pipelines": {name: small}}), encoding="utf-8"
        )
        for stage in stages_of(settings):
            _run(stage, ["--pipelines", str(file), "--data", str(Path(place) / "data")])


def stages_of(settings: Pipeline) -> list[list[str]]:
    """The commands of a pipeline, in order."""
    there = {
        "evict": settings.generate.keep == "caches",
        "fidelity": settings.fidelity is not None,
    }
    return [
        [stage, *more]
        for stage in STAGES
        if there.get(stage, True)
        for more in ([[name] for name in settings.students] if stage == "distill" else [[]])
    ]


def _run(stage: list[str], options: list[str]) -> None:
    """A stage, in this process, without what it says."""
    assert stage[0] in COMMANDS
    silent = console.quiet
    console.quiet = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            kava.main([*stage, *options], standalone_mode=False)
    except KavaError as error:
        raise KavaError(f"stage {' '.join(stage)}, in the small: {error}") from None
    except click.ClickException as error:
        raise KavaError(f"stage {' '.join(stage)}: {error.format_message()}") from None
    finally:
        console.quiet = silent


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except KavaError as error:
        raise KavaError(f"pipeline {name}: {error}") from None

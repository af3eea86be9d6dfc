"""`kava repro`: what `dvc repro` does, with students side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kava_core.errors import KavaError

from .together import together

if TYPE_CHECKING:
    import psutil

AFTER_STUDENTS = ("evaluate", "report")


@click.command("repro")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many students are trained at once.",
)
@click.option("--pipeline", help="Name of the pipeline; default: the active one of pipelines.yaml.")
def repro(jobs: int, pipeline: str | None) -> None:
    """Let DVC do what is out of date, as `dvc repro` does, but several students at once.

    DVC runs one stage after the other, and students need nothing of one another: here a DVC of its
    own trains each. What comes out is the same, and so is what DVC then knows. Each student takes
    `training.threads` threads. Killed and run again, it does what is missing.
    """
    from kava_core.settings import load_any_pipeline

    from .graph import FOLDER, dvc_file

    name, settings = load_any_pipeline(Path("pipelines.yaml"), pipeline)
    file = FOLDER / name / "dvc.yaml"
    try:
        if jobs > 1 and len(settings.students) > 1:
            stages = dvc_file(name, settings)["stages"]
            before = [f"{file}:{s}" for s in stages if s not in ("distill", *AFTER_STUDENTS)]
            if before:
                _dvc("repro", *before)
            students = [f"{file}:distill@{student}" for student in settings.students]
            together(jobs, _train, students, _end_stages)
        _dvc("repro", *([] if pipeline is None else [str(file)]))
    except SystemExit:
        _end_stages()
        raise


def _train(stage: str) -> None:
    """Run that stage alone; what it says comes in whole lines, since others speak too."""
    command = _command("--wait-for-lock", "repro", "--single-item", stage)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            click.echo(line, nl=False)
    _check(command, process.returncode)


def _dvc(*arguments: str) -> None:
    command = _command(*arguments)
    # Not `run`, which kills a DVC that we leave, and so leaves its stage to nobody.
    _check(command, subprocess.Popen(command).wait())


def _end_stages() -> None:
    """On SIGTERM. A stage ends in good order once it is told, and the DVC that waits for it then
    does; DVC itself, or the shell in which it starts a stage, would leave the stage at work."""
    import psutil

    dvcs = psutil.Process().children()
    told: set[psutil.Process] = set()
    while dvcs:
        for dvc in dvcs:
            with suppress(psutil.Error):
                for stage in set(_stages(dvc)) - told:  # one that DVC was about to start, too
                    told.add(stage)
                    stage.terminate()
        _, dvcs = psutil.wait_procs(dvcs, timeout=0.2)


def _stages(dvc: psutil.Process) -> Iterator[psutil.Process]:
    """What a DVC waits for: some shells become the stage, others stay and wait as well."""
    import psutil

    for child in dvc.children():
        with suppress(psutil.Error):  # it has ended
            command = child.cmdline()
            if "-c" in command:
                yield from _stages(child)
            elif command != dvc.cmdline():  # the same: it has yet to become a shell
                yield child


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _check(command: list[str], status: int) -> None:
    if status:
        raise KavaError(
            f"`{' '.join(['dvc', *command[3:]])}` ended with status {status}; why stands above. "
            "Run the same command again once it is mended: what is done is kept."
        )

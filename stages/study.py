"""`kava study`: students × seeds × settings, run through the stages and summed up."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kava_core.console import say
from kava_core.errors import KavaError

from .run import data_option, pipelines_option
from .together import end_children, together

if TYPE_CHECKING:
    from kava_core.studies.asked import AskedLog
    from kava_core.studies.plan import Piece, StudyCell, StudyPlan


@click.command()
@click.argument("name")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many stages run at once.",
)
@pipelines_option
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def study(name: str, jobs: int, pipelines: Path, data: Path, as_json: bool) -> None:
    """Run the study called NAME in the settings' `studies`, and sum up what it found.

    Trains every student with every seed at every point of the grid and asks it the problems of the
    study's split. Writes DATA/studies/NAME/: results.csv, answers.parquet, summary.json and
    index.html, and with `interventions` and `fidelity` their .csv; when test problems were asked is
    in asked.jsonl. Killed and run again, or with more seeds or values, it does what is missing.
    """
    from rich.console import Console

    from kava_core.artefacts import atomic_path
    from kava_core.findings.base import read_finding
    from kava_core.findings.latents import InterventionScores
    from kava_core.findings.study import CellAnswers, StoreFidelity
    from kava_core.reporting.study import as_page, as_table
    from kava_core.settings import load_study
    from kava_core.studies.asked import AskedLog
    from kava_core.studies.plan import plan_study
    from kava_core.studies.summary import summarise, write_study

    plan = plan_study(pipelines, name, load_study(pipelines, name))
    folder = data / "studies" / name
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        asked = AskedLog(folder)
        Bench(folder.absolute(), plan, lock, asked).run(jobs)
        found = {
            cell: read_finding(CellAnswers, _answers(folder, cell), f"study {name}")
            for cell in plan.cells
        }
        changes = {
            cell: read_finding(InterventionScores, _changes(folder, cell), f"study {name}")
            for cell in plan.cells
            if cell.changed
        }
        stores = {
            cell: read_finding(StoreFidelity, _store(folder, cell.fidelity), f"study {name}")
            for cell in plan.cells
            if cell.fidelity
        }
        summary = summarise(plan, found, changes, stores)
        write_study(folder, plan, found, changes, stores, summary)
        with atomic_path(folder / "index.html") as temporary:
            temporary.write_text(as_page(summary), encoding="utf-8")
    if as_json:
        click.echo(summary.model_dump_json(indent=2))
    else:
        Console().print(as_table(summary))
    _say_when_asked(asked, plan)
    say(f"Page: {folder / 'index.html'}")


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """A lock that this run and the stages it starts hold: some may outlive it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KavaError(
                f"{folder} is in use: this study is running, or a stage that it started still is. "
                "Wait for its end."
            ) from None
        yield file.fileno()


class Bench:
    """Where a study is run: every stage is a process of its own, in the folder of its piece."""

    def __init__(self, folder: Path, plan: StudyPlan, lock: int, asked: AskedLog) -> None:
        self.folder = folder
        self.plan = plan
        self.lock = lock
        self.asked = asked
        self.asking = threading.Lock()  # in this process, so one after another

    def run(self, jobs: int) -> None:
        """Do what is missing; KavaError if a stage fails, with what it said last."""
        cells = self.plan.cells
        missing = tuple(cell for cell in cells if not _done(self.folder, cell))
        say(f"study {self.plan.name}: {len(cells)} cells, {len(missing)} to do")
        self._say_asked_before()
        stages = self.plan.pieces(missing)
        students = stages.pop("distill", ())
        for pieces in stages.values():
            together(jobs, self._make, pieces, end_children)
        for cell in missing:
            if cell.piece not in students:
                self._ask(cell)

        def make_and_ask(piece: Piece) -> None:
            self._make(piece)
            for cell in missing:
                if cell.piece == piece:
                    self._ask(cell)

        together(jobs, make_and_ask, students, end_children)

    def _make(self, piece: Piece) -> None:
        import yaml

        from kava_core.artefacts import atomic_path

        place = self.folder / "made" / piece.name
        if (place / piece.makes[-1]).is_dir():
            return
        place.mkdir(parents=True, exist_ok=True)
        for earlier in piece.before:
            for artefact in earlier.makes:
                if not (place / artefact).is_symlink():
                    (place / artefact).symlink_to(Path("..", earlier.name, artefact))
        settings = {"pipeline": piece.name, "pipelines": {piece.name: dict(piece.settings)}}
        with atomic_path(place / "pipelines.yaml") as temporary:
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
        options = ["--pipelines", str(place / "pipelines.yaml"), "--data", str(place.parent)]
        with (place / "log.txt").open("a", encoding="utf-8") as log:
            done = subprocess.run(
                [sys.executable, "-m", __package__, *piece.stage, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
                check=False,
            )
        if done.returncode:
            said = (place / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-5:]
            raise KavaError(
                f"`kava {' '.join(piece.stage)}` ended with status {done.returncode}. "
                f"{place / 'log.txt'} ends with:\n" + "\n".join(said)
            )
        say(f"made {piece.name}")

    def _ask(self, cell: StudyCell) -> None:
        from kava_core.findings.base import write_finding
        from kava_core.findings.study import Asking
        from kava_core.studies.cells import ask_cell

        with self.asking:
            self._change(cell)
            self._note_fidelity(cell)
            if _answers(self.folder, cell).is_file():
                return  # asked as a cell of another point of the grid
            found = ask_cell(cell, self.folder / "made" / cell.piece.name)
            if self.plan.study.split == "test":
                asking = Asking(
                    at=datetime.now(UTC).isoformat(timespec="seconds"),
                    system=cell.system,
                    variant=cell.variant,
                    seed=cell.seed,
                    problems=len(found.ids),
                    key=cell.key,
                )
                self.asked.add(asking)
            write_finding(_answers(self.folder, cell), found, spaced=False)
        words = f"{cell.system} {cell.variant}".rstrip()
        seed = "" if cell.seed is None else f", seed {cell.seed}"
        say(f"{words}{seed}: {100 * sum(found.correct) / len(found.correct):.1f} %")

    def _change(self, cell: StudyCell) -> None:
        from kava_core.findings.base import write_finding
        from kava_core.studies.cells import change_cell

        if cell.changed and not _changes(self.folder, cell).is_file():
            found = change_cell(cell, self.folder / "made" / cell.piece.name)
            write_finding(_changes(self.folder, cell), found, spaced=False)

    def _note_fidelity(self, cell: StudyCell) -> None:
        from kava_core.findings.base import read_finding, write_finding
        from kava_core.findings.fidelity import METRICS, CacheScores
        from kava_core.findings.study import StoreFidelity

        if cell.fidelity is None or _store(self.folder, cell.fidelity).is_file():
            return
        made = self.folder / "made" / cell.fidelity.name / "fidelity"
        scores = read_finding(CacheScores, made / METRICS, "kava fidelity")
        (found,) = (
            score
            for budgets in scores.policies.values()
            for by_bits in budgets.values()
            for score in by_bits.values()
        )
        write_finding(
            _store(self.folder, cell.fidelity),
            StoreFidelity(
                n=found.n,
                exact_match=found.exact_match,
                kl=found.kl,
                full=scores.full.exact_match,
                none=scores.none.exact_match,
            ),
            spaced=False,
        )

    def _say_asked_before(self) -> None:
        keys = {cell.key for cell in self.plan.cells}
        others = [asking for asking in self.asked.askings if asking.key not in keys]
        if others and self.plan.study.split == "test":
            say(
                f"test problems were asked before with other settings ({len(others)} times, last "
                f"{others[-1].at}): what was chosen since then was chosen on test problems"
            )


def _answers(folder: Path, cell: StudyCell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _changes(folder: Path, cell: StudyCell) -> Path:
    return folder / "cells" / f"{cell.changed_name}.json"


def _store(folder: Path, fidelity: Piece) -> Path:
    return folder / "cells" / f"{fidelity.name}.json"


def _done(folder: Path, cell: StudyCell) -> bool:
    changed = not cell.changed or _changes(folder, cell).is_file()
    store = cell.fidelity is None or _store(folder, cell.fidelity).is_file()
    return changed and store and _answers(folder, cell).is_file()


def _say_when_asked(asked: AskedLog, plan: StudyPlan) -> None:
    keys = {cell.key for cell in plan.cells}
    times = [asking.at for asking in asked.askings if asking.key in keys]
    if times and plan.study.split == "test":
        say(f"Test problems were asked {len(times)} times, {min(times)} to {max(times)}.")

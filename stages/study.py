"""`kava study`: students × seeds × settings, run through the stages and summed up."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kava_core.console import say, warn
from kava_core.errors import KavaError
from kava_core.wording import shorten

from .run import data_option, pipelines_option
from .together import end_children, together

if TYPE_CHECKING:
    from kava_core.findings.latents import InterventionScores
    from kava_core.findings.study import Asking, CellAnswers, Kind, StoreFidelity
    from kava_core.studies.asked import AskedLog
    from kava_core.studies.plan import Piece, StudyCell, StudyPlan

T = TypeVar("T")
LONGEST_LIST = 300  # characters


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
    Where a stage fails, what does not need it goes on, and is summed up.
    """
    from rich.console import Console

    from kava_core.artefacts import atomic_path
    from kava_core.reporting.study import as_page, as_table
    from kava_core.settings import load_study
    from kava_core.studies.asked import AskedLog, asked_otherwise
    from kava_core.studies.plan import plan_study
    from kava_core.studies.summary import summarise, write_study

    settings = load_study(pipelines, name)
    plan = plan_study(pipelines, name, settings)
    folder = data / "studies" / name
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with _alone(folder) as lock:
        asked = AskedLog(folder)
        _say_asked_before(asked_otherwise(pipelines, name, settings, asked.askings))
        bench = Bench(folder.absolute(), plan, lock, asked)
        bench.run(jobs)
        there = plan.only({cell for cell in plan.cells if bench.is_done(cell)})
        if not there.cells:
            raise bench.failure()
        cells = there.cells
        found = {cell: own for cell in cells if (own := bench.answers(cell))}
        changes = {cell: way for cell in cells if cell.changed and (way := bench.changes(cell))}
        stores = {cell: its for cell in cells if cell.fidelity and (its := bench.store(cell))}
        summary = summarise(there, found, changes, stores)
        write_study(folder, there, found, changes, stores, summary)
        with atomic_path(folder / "index.html") as temporary:
            temporary.write_text(as_page(summary), encoding="utf-8")
    if as_json:
        click.echo(summary.model_dump_json(indent=2))
    else:
        Console().print(as_table(summary))
    _say_when_asked(asked)
    say(f"Page: {folder / 'index.html'}")
    if bench.failed:
        raise bench.failure()


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
    """Where a study is run: every stage is a process of its own, in the folder of its piece.

    failed: why a piece could not be made, or a cell not be asked; what needs it is left out.
    """

    def __init__(self, folder: Path, plan: StudyPlan, lock: int, asked: AskedLog) -> None:
        self.folder = folder
        self.plan = plan
        self.lock = lock
        self.asked = asked
        self.failed: dict[Piece | StudyCell, str] = {}
        self.asking = threading.Lock()  # in this process, so one after another
        self._found: dict[Path, Any] = {}

    def run(self, jobs: int) -> None:
        """Do what is missing, as far as nothing fails that it needs."""
        cells = self.plan.cells
        missing = tuple(cell for cell in cells if not self.is_done(cell))
        stages = self.plan.pieces(missing)
        counts = {
            stage: len([piece for piece in pieces if not self._is_made(piece)])
            for stage, pieces in stages.items()
        }
        to_run = ", ".join(f"{count} {stage}" for stage, count in counts.items() if count)
        say(
            f"study {self.plan.name}: {len(cells)} cells, {len(missing)} to do"
            f"{f'; stages to run: {to_run}' if to_run else ''}"
        )
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

    def is_done(self, cell: StudyCell) -> bool:
        """Whether all that is asked of the cell is there, and can be read."""
        return (
            self.answers(cell) is not None
            and (not cell.changed or self.changes(cell) is not None)
            and (cell.fidelity is None or self.store(cell) is not None)
        )

    def answers(self, cell: StudyCell) -> CellAnswers | None:
        """What it answered, if it was asked."""
        from kava_core.findings.study import CellAnswers

        return self._read(CellAnswers, self._file(cell.name))

    def changes(self, cell: StudyCell) -> InterventionScores | None:
        """What it answered with its latents changed, if it was asked that."""
        from kava_core.findings.latents import InterventionScores

        return self._read(InterventionScores, self._file(cell.changed_name))

    def store(self, cell: StudyCell) -> StoreFidelity | None:
        """What the teacher answered from the slots that it is taught from, if it was asked."""
        from kava_core.findings.study import StoreFidelity

        assert cell.fidelity is not None
        return self._read(StoreFidelity, self._file(cell.fidelity.name))

    def failure(self) -> KavaError:
        """What failed, and how many cells are missing for it."""
        missing = [cell for cell in self.plan.cells if not self.is_done(cell)]
        names = shorten(", ".join(what.name for what in self.failed), LONGEST_LIST)
        first = next(iter(self.failed.values()))
        return KavaError(
            f"study {self.plan.name} lacks {len(missing)} of its {len(self.plan.cells)} cells, "
            f"since these failed: {names}. Mend what is wrong, and run the same command again. "
            f"The first of them: {first}"
        )

    def _file(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"

    def _read(self, kind: type[T], path: Path) -> T | None:
        """What is in the file; None where there is none, or it cannot be read."""
        from kava_core.findings.base import read_finding

        if path not in self._found:
            self._found[path] = None
            if path.exists():
                try:
                    self._found[path] = read_finding(kind, path, f"study {self.plan.name}")
                except KavaError:
                    warn(f"{path} cannot be read, and counts as missing: it is asked again")
        found: T | None = self._found[path]
        return found

    def _write(self, path: Path, found: object) -> None:
        from kava_core.findings.base import write_finding

        write_finding(path, found, spaced=False)
        self._found.pop(path)

    def _is_made(self, piece: Piece) -> bool:
        return (self.folder / "made" / piece.name / piece.makes[-1]).is_dir()

    def _make(self, piece: Piece) -> None:
        """Run its stage, unless there is nothing to make it from."""
        if self._is_made(piece) or self.failed.keys() & set(piece.before):
            return
        try:
            self._run_stage(piece)
        except KavaError as error:
            self.failed[piece] = str(error)
            warn(f"{piece.name} failed")

    def _run_stage(self, piece: Piece) -> None:
        import yaml

        from kava_core.artefacts import atomic_path

        place = self.folder / "made" / piece.name
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
        """Ask all of it that is missing, unless what it needs failed."""
        if self.failed.keys() & set(cell.pieces):
            return
        with self.asking:
            try:
                self._answer(cell)
                self._change(cell)
                self._note_fidelity(cell)
            except KavaError as error:
                self.failed[cell] = str(error)
                warn(f"{cell.name} failed")

    def _answer(self, cell: StudyCell) -> None:
        from kava_core.studies.cells import CellExam

        if self.answers(cell) is not None:
            return  # asked as a cell of another point of the grid
        exam = CellExam(cell, self.folder / "made" / cell.piece.name)
        self._note_asking(cell, "answers", len(exam.problems))
        found = exam.answers()
        self._write(self._file(cell.name), found)
        words = f"{cell.system} {cell.variant}".rstrip()
        seed = "" if cell.seed is None else f", seed {cell.seed}"
        say(f"{words}{seed}: {100 * sum(found.correct) / len(found.correct):.1f} %")

    def _change(self, cell: StudyCell) -> None:
        from kava_core.studies.cells import CellExam

        if not cell.changed or self.changes(cell) is not None:
            return
        exam = CellExam(cell, self.folder / "made" / cell.piece.name, cell.changed)
        self._note_asking(cell, "interventions", len(exam.problems))
        self._write(self._file(cell.changed_name), exam.interventions())

    def _note_asking(self, cell: StudyCell, kind: Kind, problems: int) -> None:
        """Before they are asked: what is killed then has asked them, too."""
        from kava_core.findings.study import Asking

        if cell.asked == "validation":
            return
        self.asked.add(
            Asking(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                kind=kind,
                system=cell.system,
                variant=cell.variant,
                seed=cell.seed,
                problems=problems,
                key=cell.key,
            )
        )

    def _note_fidelity(self, cell: StudyCell) -> None:
        from kava_core.findings.base import read_finding
        from kava_core.findings.fidelity import METRICS, CacheScores
        from kava_core.findings.study import StoreFidelity

        if cell.fidelity is None or self.store(cell) is not None:
            return
        made = self.folder / "made" / cell.fidelity.name / "fidelity"
        scores = read_finding(CacheScores, made / METRICS, "kava fidelity")
        (found,) = (
            score
            for budgets in scores.policies.values()
            for by_bits in budgets.values()
            for score in by_bits.values()
        )
        self._write(
            self._file(cell.fidelity.name),
            StoreFidelity(
                n=found.n,
                exact_match=found.exact_match,
                kl=found.kl,
                full=scores.full.exact_match,
                none=scores.none.exact_match,
            ),
        )


def _say_asked_before(others: Sequence[Asking]) -> None:
    if others:
        say(
            f"test problems were asked before with other settings ({len(others)} times, last "
            f"{others[-1].at}), or of other versions of the stages: settings chosen since then "
            "were chosen on test problems"
        )


def _say_when_asked(asked: AskedLog) -> None:
    times = [asking.at for asking in asked.askings]
    if times:
        say(f"Test problems were asked {len(times)} times, {min(times)} to {max(times)}.")

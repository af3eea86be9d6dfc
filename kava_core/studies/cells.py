"""One cell: a system that is asked the problems of a study's split, or of a further test set."""

from __future__ import annotations

from pathlib import Path

from kava_core.evaluation.asking import ask
from kava_core.evaluation.systems import Systems
from kava_core.findings.latents import InterventionScores
from kava_core.findings.study import CellAnswers
from kava_core.latents.interventions import interventions
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_tokenizer
from kava_core.parallel.threads import torch_threads
from kava_core.problems.folder import AskedFolder, ProblemFolder, open_problems, open_test_sets
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from kava_core.studies.plan import StudyCell


def ask_cell(cell: StudyCell, folder: Path) -> CellAnswers:
    """Ask the cell's system, in the folder of its piece, the first problems of what it is asked."""
    problems, encoder = _asked(cell, folder)
    with torch_threads(cell.evaluate.threads):
        replies = ask(
            _opened(cell, folder, encoder),
            encoder,
            problems,
            batch_size=cell.evaluate.batch_size,
            max_new_tokens=cell.evaluate.max_new_tokens,
        )
    return CellAnswers(
        ids=[reply.id for reply in replies],
        correct=[reply.correct for reply in replies],
        passes=[reply.passes for reply in replies],
    )


def change_cell(cell: StudyCell, folder: Path) -> InterventionScores:
    """Ask the cell's student the first `cell.changed` problems with its latents changed."""
    problems, encoder = _asked(cell, folder)
    with torch_threads(cell.evaluate.threads):
        return interventions(
            _opened(cell, folder, encoder),
            encoder,
            problems[: cell.changed],
            batch_size=cell.evaluate.batch_size,
            max_new_tokens=cell.evaluate.max_new_tokens,
        )


def _asked(cell: StudyCell, folder: Path) -> tuple[list[Problem], TraceEncoder]:
    source: ProblemFolder | AskedFolder
    if cell.asked == "validation":
        source = open_problems(folder / "problems")
    else:
        source = open_test_sets(folder / "test_sets")
    tokenizer = load_tokenizer(str(folder / "teacher"))
    encoder = TraceEncoder(tokenizer, source.traces, prompt=source.prompt)
    return source.load(cell.asked)[: cell.evaluate.limit], encoder


def _opened(cell: StudyCell, folder: Path, encoder: TraceEncoder) -> LatentReasoner:
    students = {cell.system: folder / "students" / cell.system}
    trained = cell.piece.stage[0] == "distill"
    systems = Systems(folder / "teacher", students if trained else {}, frozenset())
    return systems.open(cell.system, encoder)

"""One cell: a system that is asked the problems of a study's split, or of a further test set."""

from __future__ import annotations

from pathlib import Path

from kava_core.evaluation.asking import ask
from kava_core.evaluation.systems import Systems
from kava_core.findings.latents import InterventionScores
from kava_core.findings.scores import CommonestAnswer
from kava_core.findings.study import CellAnswers
from kava_core.latents.interventions import interventions
from kava_core.models.loading import load_tokenizer
from kava_core.parallel.threads import torch_threads
from kava_core.problems.folder import AskedFolder, ProblemFolder, open_problems, open_test_sets
from kava_core.problems.traces import TraceEncoder
from kava_core.studies.plan import StudyCell


class CellExam:
    """A cell's system, and the first problems of what it is asked; most: how many at the most.

    folder: of the cell's piece. Nothing is asked before it is told to.
    """

    def __init__(self, cell: StudyCell, folder: Path, most: int | None = None) -> None:
        source: ProblemFolder | AskedFolder
        if cell.asked == "validation":
            source = open_problems(folder / "problems")
        else:
            source = open_test_sets(folder / "test_sets")
        tokenizer = load_tokenizer(str(folder / "teacher"))
        self.evaluate = cell.evaluate
        self.encoder = TraceEncoder(tokenizer, source.traces, prompt=source.prompt)
        self.problems = source.load(cell.asked)[: cell.evaluate.limit][:most]
        students = {cell.system: folder / "students" / cell.system}
        trained = cell.piece.stage[0] == "distill"
        systems = Systems(folder / "teacher", students if trained else {}, frozenset())
        self.system = systems.open(cell.system, self.encoder)

    def answers(self) -> CellAnswers:
        """Ask the system as it is."""
        with torch_threads(self.evaluate.threads):
            replies = ask(
                self.system,
                self.encoder,
                self.problems,
                batch_size=self.evaluate.batch_size,
                max_new_tokens=self.evaluate.max_new_tokens,
            )
        return CellAnswers(
            ids=[reply.id for reply in replies],
            correct=[reply.correct for reply in replies],
            passes=[reply.passes for reply in replies],
            commonest_answer=CommonestAnswer.of(
                [reply.answer for reply in replies], [problem.answer for problem in self.problems]
            ),
        )

    def interventions(self) -> InterventionScores:
        """Ask the student with its latents changed."""
        with torch_threads(self.evaluate.threads):
            return interventions(
                self.system,
                self.encoder,
                self.problems,
                batch_size=self.evaluate.batch_size,
                max_new_tokens=self.evaluate.max_new_tokens,
            )

"""One cell: a system that is asked the problems of a study's split."""

from __future__ import annotations

from pathlib import Path

from kava_core.evaluation.asking import ask
from kava_core.evaluation.systems import Systems
from kava_core.findings.study import CellAnswers
from kava_core.models.loading import load_tokenizer, to_device
from kava_core.parallel.threads import torch_threads
from kava_core.problems.folder import AskedFolder, ProblemFolder, open_problems, open_test_sets
from kava_core.problems.traces import TraceEncoder
from kava_core.studies.plan import StudyCell


def ask_cell(cell: StudyCell, folder: Path, split: str) -> CellAnswers:
    """Ask the cell's system, in the folder of its piece, the first problems of `split`."""
    source: ProblemFolder | AskedFolder
    if split == "test":
        source = open_test_sets(folder / "test_sets")
    else:
        source = open_problems(folder / "problems")
    problems = source.load(split)[: cell.evaluate.limit]
    teacher = folder / "teacher"
    encoder = TraceEncoder(load_tokenizer(str(teacher)), source.traces, prompt=source.prompt)
    students = {cell.system: folder / "students" / cell.system}
    trained = cell.piece.stage[0] == "distill"
    systems = Systems(teacher, students if trained else {}, frozenset())
    with torch_threads(cell.evaluate.threads):
        replies = ask(
            to_device(systems.open(cell.system, encoder)),
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

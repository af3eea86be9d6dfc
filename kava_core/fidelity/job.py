"""What a worker does with a shard of the trial: some kinds of cache for one batch of problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from kava_core.artefacts import clear, disk_errors
from kava_core.console import warn
from kava_core.errors import KavaError
from kava_core.fidelity.examiner import Batch, Examiner, Layers, Outcome, alike
from kava_core.fidelity.grid import Grid
from kava_core.fidelity.trial import Part, answer
from kava_core.findings.base import read_finding, write_finding
from kava_core.models.loading import DTYPES, load_config, load_model, load_tokenizer
from kava_core.models.placing import place_frozen
from kava_core.models.teacher_pass import check_lengths
from kava_core.problems.folder import AskedFolder, ProblemFolder, open_problems, open_test_sets
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.settings import Fidelity

# Kinds of cache in a shard. A worker that has not the batch at hand reads it first, which takes as
# long as a few of them.
CELLS = 16


def open_source(path: Path, settings: Fidelity) -> ProblemFolder | AskedFolder:
    """The problems, or the test sets, in a folder; as `settings.split` says."""
    return open_test_sets(path) if settings.split == "test" else open_problems(path)


@dataclass(frozen=True)
class Material:
    """The grid, and the problems in batches."""

    grid: Grid
    encoder: TraceEncoder
    batches: list[list[Record]]

    @classmethod
    def of(cls, source: ProblemFolder | AskedFolder, teacher: Path, settings: Fidelity) -> Self:
        """KavaError if there are no problems, if the teacher cannot hold one, and for a setting
        that its layers do not meet."""
        config, tokenizer = load_config(str(teacher)), load_tokenizer(str(teacher))
        plain = settings.model_dump(mode="json", by_alias=True)
        grid = Grid.of(
            settings.policies,
            settings.budgets,
            [(bits.keys, bits.values) for bits in settings.bits],
            Layers.of(
                plain["layers"],
                settings.share,
                settings.share_size,
                settings.select,
                config.num_hidden_layers,
            ),
            budget_shape=settings.budget_shape,
            half=settings.half,
        )
        # Without steps there is no cache to compress.
        problems = [p for p in source.load(settings.split) if p.steps][: settings.limit]
        if not problems:
            raise KavaError(
                f"{source.path} has no {settings.split} problems with steps. Ask `prepare` for "
                "some."
            )
        encoder = TraceEncoder(tokenizer, source.traces, prompt=source.prompt)
        traces = encoder.encode_all(problems)
        check_lengths(traces, config)
        batches = [[traces[i] for i in chosen] for chosen in alike(traces, settings.batch_size)]
        return cls(grid, encoder, batches)

    @property
    def slices(self) -> int:
        """Shards per batch."""
        return -(-len(self.grid.cells) // CELLS)

    @property
    def shards(self) -> int:
        return len(self.batches) * self.slices

    def place(self, shard: int) -> tuple[int, range]:
        """The batch of a shard and its cells, by their numbers; a batch's shards are neighbours."""
        batch, piece = divmod(shard, self.slices)
        return batch, range(piece * CELLS, min((piece + 1) * CELLS, len(self.grid.cells)))


@dataclass(frozen=True)
class FidelityJob:
    """The answers to a batch from some kinds of cache, each a file in `work`.

    source: the folder that `open_source` opens.
    """

    source: Path
    teacher: Path
    settings: Fidelity
    work: Path

    @property
    def threads(self) -> int:
        return self.settings.threads

    def file(self, batch: int, cell: int) -> Path:
        """Of the answers to a batch from one kind of cache, both by their numbers."""
        return self.work / f"batch-{batch:05d}-cell-{cell:05d}.json"

    def read(self, batch: int, cell: int) -> Part:
        """What is in that file."""
        return read_finding(Part, self.file(batch, cell), "fidelity")

    def is_finished(self, batch: int, cell: int, traces: Sequence[Record]) -> bool:
        """Whether a run before made it; what is torn, or of other problems, goes."""
        file = self.file(batch, cell)
        if not file.exists():
            return False
        try:
            part = self.read(batch, cell)
            if [answer.id for answer in part.answers] == [trace.id for trace in traces]:
                return True
        except KavaError:
            pass
        warn(f"fidelity: {file} is damaged, and is made again")
        clear(file)
        return False

    def open(self) -> Callable[[int], int]:
        settings = self.settings
        material = Material.of(open_source(self.source, settings), self.teacher, settings)
        examiner = Examiner(
            place_frozen(load_model(str(self.teacher), DTYPES[settings.model_dtype])),
            material.grid.layers,
            eos=material.encoder.eos,
            max_new_tokens=settings.max_new_tokens,
        )
        at_hand: dict[int, _Read] = {}

        def work(shard: int) -> int:
            number, cells = material.place(shard)
            traces = material.batches[number]
            if number not in at_hand:
                at_hand.clear()
                at_hand[number] = _Read.of(examiner, traces)
            read = at_hand[number]
            made = 0
            for cell in cells:
                if not self.is_finished(number, cell, traces):
                    part = answer(
                        material.grid,
                        material.grid.cells[cell],
                        examiner,
                        material.encoder,
                        read.batch,
                        read.reference,
                    )
                    with disk_errors(self.work):
                        write_finding(self.file(number, cell), part)
                    made += 1
            return made

        return work


@dataclass(frozen=True)
class _Read:
    """A batch as the teacher has read it, and its answers from the full cache."""

    batch: Batch
    reference: Outcome

    @classmethod
    def of(cls, examiner: Examiner, traces: Sequence[Record]) -> Self:
        batch = examiner.read(traces)
        # Not the answers of cell `full`: the first forward of a shape is slow to start.
        return cls(batch, examiner.examine(batch, partial(examiner.full, batch)))

"""`generate.batch_size: auto`: the largest batch that the memory of a worker holds.

It is looked for once, before the first shard: on a worker, over the longest traces there are, as
many as a shard has. What is found is noted beside the unfinished work, so that restarts and other
numbers of workers go on with it, and the store says it in its settings: the same number, set by
hand, makes the same bytes.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kava_core.artefacts import clear, read_json, write_json
from kava_core.console import say
from kava_core.errors import KavaError, is_out_of_memory
from kava_core.models.teacher_pass import TeacherPass, over, too_long, whole_length
from kava_core.parallel.shards import run_shards
from kava_core.record import Record
from kava_core.settings import Resources
from kava_core.targets.reading import Reading

# Where it begins. A system without a GPU promises memory that it has not, and kills whoever uses
# it: there no more is tried than is set by default.
MOST, MOST_ON_CPU = 512, 64
FILE = "batch_size.json"


def longest(parts: Iterable[Sequence[Record]], count: int) -> list[int]:
    """The places of the `count` longest of all traces, the longest first."""
    lengths = (whole_length(t) for part in parts for t in part)
    places = ((length, -place) for place, length in enumerate(lengths))
    return [-place for _, place in heapq.nlargest(count, places)]


@dataclass(frozen=True)
class FitJob:
    """The largest batch in which the problems at `places` can be read as one shard is."""

    reading: Reading
    places: Sequence[int]

    @property
    def threads(self) -> int:
        return self.reading.settings.threads

    def open(self) -> Callable[[int], int]:
        teacher, traces = self.reading.teacher_and_traces(self.places)
        long = {place for place, _ in too_long(traces, teacher.model.config.get_text_config())}
        held = [trace for place, trace in enumerate(traces) if place not in long]

        def work(_: int) -> int:
            size = MOST if teacher.model.device.type == "cuda" else MOST_ON_CPU
            while held and not _fits(teacher, held, size):
                if size == 1:
                    raise KavaError(
                        "generate.batch_size: auto found no batch that fits the memory of a "
                        f"worker, not even one of the problem {held[0].id!r}. Give a worker more, "
                        "lower generate.shard_size, or set generate.model_dtype to bfloat16."
                    )
                size //= 2
            return size

        return work


def _fits(teacher: TeacherPass, traces: Sequence[Record], size: int) -> bool:
    try:
        over(teacher, traces[:size], size)  # the largest batch first: most that fail, fail here
        over(teacher, traces, size)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of it, where the error holds nothing any more of what there was no room for.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def fitting_batch(
    reading: Reading, places: Callable[[], Sequence[int]], work: Path, resources: Resources
) -> int:
    """What `auto` stands for; noted in `work`. places: of the longest problems."""
    file = work / FILE
    noted = _noted(file)
    if noted is None:
        job = FitJob(reading, places())
        ((_, noted),) = run_shards(
            job,
            [0],
            resources,
            folder=work,
            examples=lambda *_: len(job.places),
        )
        write_json(file, noted)
        say(f"generate: batches of {noted}, the largest that fit")
    return noted


def _noted(file: Path) -> int | None:
    try:
        found = read_json(file) if file.exists() else None
    except KavaError:
        clear(file)
        return None
    return found if isinstance(found, int) and found > 0 else None

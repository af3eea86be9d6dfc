"""The traces that a model learns from problems, encoded once for all processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kava_core.models.teacher_pass import check_lengths
from kava_core.parallel import group
from kava_core.problems.encoded import PART, EncodedTraces, write_traces
from kava_core.problems.folder import ProblemFolder
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record


def encoded_traces(
    work: Path,
    encoder: TraceEncoder,
    problems: ProblemFolder,
    config: Any = None,
    left_out: Collection[str] = (),
) -> EncodedTraces:
    """The training problems' traces, in a file in `work` that all processes map.

    config: of a model that must be able to hold them, if one must. left_out: ids of problems that
    are not taught. KavaErrors are those of the encoder and of `check_lengths`.
    """

    def traces() -> Iterator[Record]:
        for part in encoder.encode_parts(problems.open("train")):
            if config is not None:
                check_lengths(part, config)
            yield from (trace for trace in part if trace.id not in left_out)

    def parts() -> Iterator[list[Record]]:
        taught = traces()
        while part := list(islice(taught, PART)):
            yield part

    return group.from_first(lambda: write_traces(work / "traces.arrow", parts()))

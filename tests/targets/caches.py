"""A tiny teacher's store, for the tests of what is made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from kava_core.models.teacher_pass import TeacherPass, over
from kava_core.record import Record
from kava_core.settings import Generate
from kava_core.store import TeacherStore, finalise, write_teacher_shard
from kava_core.targets.generate import teacher_spec
from tests.tiny import tiny_model

FINGERPRINTS = {"problems": "p", "teacher": "t", "tokenizer": "k"}


def with_steps(traces: list[Record]) -> list[Record]:
    """The same traces in steps of three tokens, the last of each its result."""
    found = []
    for trace in traces:
        ends = [*range(3, len(trace.cot_ids), 3), len(trace.cot_ids)]
        found.append(replace(trace, step_ends=ends, results=[end - 1 for end in ends]))
    return found


def write_caches(
    folder: Path, architecture: str, traces: list[Record], generate: Generate, shard_size: int = 6
) -> TeacherStore:
    """The caches of a tiny teacher over `traces`, kept as `generate` says."""
    folder.mkdir(parents=True)
    teacher = TeacherPass(tiny_model(architecture, torch.float32))
    spec = teacher_spec(teacher.model, generate)
    parts = range(0, len(traces), shard_size)
    for shard, first in enumerate(parts):
        records = traces[first : first + shard_size]
        cache = over(teacher, records, batch_size=2)
        write_teacher_shard(
            folder, spec, shard, records, keys=cache.keys, values=cache.values,
            importance=cache.importance, endpoint=cache.endpoint,
        )  # fmt: skip
    finalise(
        folder, spec, shards=len(parts), fingerprints=FINGERPRINTS,
        settings={"generate": generate.model_dump(mode="json")},
    )  # fmt: skip
    return TeacherStore.open(folder)

"""Whether the disk has room for what a stage writes, before hours go into it."""

from __future__ import annotations

import shutil
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.planning.architecture import (
    Architecture,
    model_architecture,
    teacher_architecture,
)
from kava_core.planning.lengths import lengths_of
from kava_core.planning.sizes import (
    checkpoint_count,
    kv_targets_size,
    model_bytes,
    run_bytes,
    teacher_kv_size,
)
from kava_core.problems.folder import open_problems
from kava_core.settings import Cadence, Pipeline, Student, Training
from kava_core.store import load_manifest


def free_bytes(folder: Path) -> int:
    """Of the disk that `folder` is on, or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def lacking_room(settings: Pipeline, folder: Path, artefact: str) -> str | None:
    """A sentence if `artefact` of the pipeline in `folder` will not fit; None if it will.

    None, too, where problems or teacher are not there or are wrong, which the stage itself says,
    and where a store is sent elsewhere while it is made.
    artefact: `teacher_kv`, `kv_targets`, or `teacher`, with the checkpoints of its training. What a
    run before has left in `.work/` takes room too.
    """
    sent = {
        "teacher_kv": settings.resources.caches_to,
        "kv_targets": settings.resources.targets_to,
    }
    if sent.get(artefact) is not None:
        return None
    place = folder / artefact
    try:
        if artefact == "teacher":
            records = open_problems(folder / "problems").count("train")
            model = teacher_architecture(settings.teacher)
            return _to_train(place, model, settings.teacher.training, settings.cadence, records)
        size = teacher_kv_size if artefact == "teacher_kv" else kv_targets_size
        teacher = model_architecture(str(folder / "teacher"), None, "teacher")
        needed = size(settings, teacher, lengths_of(settings, folder)).bytes
    except KavaError:
        return None
    better = "`kava plan` says what would make it smaller; finished shards of this run are kept."
    return _lacking(place, needed, better)


def student_lacking_room(
    settings: Student, cadence: Cadence, model: str, source: Path, output: Path
) -> str | None:
    """As `lacking_room`, of the student in `output`, with the checkpoints of its training.

    model: what it begins as, a folder or Hub id; source: the folder of what it reads.
    """
    try:
        if settings.reads == "kv_targets":
            records = load_manifest(str(source)).records
        else:
            records = open_problems(source).count("train")
        begins = model_architecture(model, settings.revision, "model")
        return _to_train(output, begins, settings.training, cadence, records)
    except KavaError:
        return None


def _to_train(
    place: Path, a: Architecture, training: Training | None, cadence: Cadence, records: int
) -> str | None:
    """Of a model that learns from so many records; training: None for one taken as it is."""
    needed = model_bytes(a, training, "training")
    if training is None:
        return _lacking(place, needed, "Make room there.")
    needed += run_bytes(a, training, "training", checkpoint_count(training, cadence, records))
    better = "Make room there; the last whole checkpoint of this run is kept."
    return _lacking(place, needed, better, " with the checkpoints of its training")


def _lacking(place: Path, needed: int, better: str, beside: str = "") -> str | None:
    free = free_bytes(place)
    if needed <= free:
        return None
    return (
        f"{place} will take about {needed / 1e9:.1f} GB{beside}, and its disk has "
        f"{free / 1e9:.1f} GB free. {better}"
    )

"""Whether the disk has room for a store, before hours go into one."""

from __future__ import annotations

import shutil
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.planning.architecture import model_architecture
from kava_core.planning.lengths import lengths_of
from kava_core.planning.sizes import kv_targets_size, teacher_kv_size
from kava_core.settings import Pipeline


def free_bytes(folder: Path) -> int:
    """Of the disk that `folder` is on, or will be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def lacking_room(settings: Pipeline, folder: Path, artefact: str) -> str | None:
    """A sentence if the store `artefact` of the pipeline in `folder` will not fit; None if it will.

    None, too, where problems or teacher are not there or are wrong, which the stage itself says,
    and where the store is sent elsewhere while it is made.
    artefact: `teacher_kv` or `kv_targets`. What a run before has left in `.work/` takes room too.
    """
    sent = {
        "teacher_kv": settings.resources.caches_to,
        "kv_targets": settings.resources.targets_to,
    }
    if sent[artefact] is not None:
        return None
    size = teacher_kv_size if artefact == "teacher_kv" else kv_targets_size
    try:
        teacher = model_architecture(str(folder / "teacher"), None, "teacher")
        needed = size(settings, teacher, lengths_of(settings, folder)).bytes
    except KavaError:
        return None
    free = free_bytes(folder)
    if needed <= free:
        return None
    return (
        f"{folder / artefact} will take about {needed / 1e9:.1f} GB, and its disk has "
        f"{free / 1e9:.1f} GB free. `kava plan` says what would make it smaller; finished shards "
        "of this run are kept."
    )

"""Finishing a store: what its shards left beside them becomes one index and one manifest.

The side records are read in the order of the shards, so one worker or twenty leave the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kava_core.artefacts import (
    atomic_path,
    clear,
    read_json,
    sync,
    write_json,
)
from kava_core.console import say, warn
from kava_core.distinct import Distinct
from kava_core.errors import KavaError
from kava_core.store.checksum import file_checksum
from kava_core.store.counts import EvictionCounts
from kava_core.store.drift import merge_drift
from kava_core.store.index import write_index
from kava_core.store.layout import (
    CALIBRATION_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    shard_name,
)
from kava_core.store.manifest import FileInfo, Manifest, RotaryInfo, load_manifest
from kava_core.store.spec import StoreSpec
from kava_core.store.statistics import deviations
from kava_core.store.summary import drift_facts
from kava_core.store.tensor_file import serialise, write_pieces
from kava_core.store.write import side_path

SIDE_RECORD = re.compile(r"shard-(\d{5,})\.json")


def finished_shards(folder: Path, elsewhere: Collection[int] = ()) -> set[int]:
    """The shards in a working folder that are complete and need no redoing.

    elsewhere: those whose tensors lie, whole, in another place. What is there by name but torn (no
    file, of another length than its side record says, a side record or manifest that cannot be
    read) is removed and said to be made again.
    """
    if _is_whole(folder):
        return set(range(len(load_manifest(folder).shards)))
    done = set()
    for side in sorted(folder.glob("shard-*.json")):
        match = SIDE_RECORD.fullmatch(side.name)
        if not match:
            continue
        shard = int(match[1])
        file = folder / shard_name(shard)
        if shard in elsewhere or _is_finished(side, file):
            done.add(shard)
        else:
            warn(f"{file} is damaged, and is made again")
            clear(side)
            clear(file)
    return done


def noted_shards(folder: Path) -> set[int]:
    """The shards that a working folder has a note of, with or without their tensors."""
    found = (SIDE_RECORD.fullmatch(side.name) for side in folder.glob("shard-*.json"))
    return {int(match[1]) for match in found if match}


def _is_whole(folder: Path) -> bool:
    """Whether the folder is a store already; a manifest that is wrong goes."""
    if not (folder / MANIFEST_FILE).exists():
        return False
    try:
        manifest = load_manifest(folder)
    except KavaError as error:
        warn(f"{error} What of it is whole is used.")
        clear(folder / MANIFEST_FILE)
        return False
    return bool(manifest.shards)


def _is_finished(side: Path, file: Path) -> bool:
    try:
        return bool(read_json(side)["bytes"] == file.lstat().st_size and file.is_file())
    except (KavaError, KeyError, TypeError, OSError):
        return False


def finalise(
    folder: Path,
    spec: StoreSpec,
    *,
    shards: int,
    settings: dict[str, Any],
    fingerprints: dict[str, str],
) -> Manifest:
    """Turn a working folder with shards 0 … shards − 1 into a store; returns its manifest.

    settings: those that shaped the content, as plain JSON. fingerprints: name → content hash of
    what the store was made from (`problems`, `teacher`, `tokenizer`, `teacher_kv`).

    Says what quantisation changed. A killed run may call it again. KavaError names shards that are
    missing or were written with another spec, ids that occur twice, and a store without records.
    """
    if _is_whole(folder):  # the manifest is written last: only the tidying is left
        _tidy(folder)
        return _complete(folder, spec)
    check_all_there(folder, shards, finished_shards(folder))
    manifest = merged_manifest(
        folder, spec, shards=shards, settings=settings, fingerprints=fingerprints
    )
    write_json(folder / MANIFEST_FILE, manifest.to_json())
    say_drift(manifest)
    _tidy(folder)
    return _complete(folder, spec)


def check_all_there(folder: Path, shards: int, finished: Collection[int]) -> None:
    """KavaError if not all shards that a store in a working folder has are finished, or it has
    none."""
    if shards < 1:
        raise KavaError(f"{folder}: a store needs records, found none. Check what went in.")
    missing = sorted(set(range(shards)) - set(finished))
    if missing:
        raise KavaError(
            f"{folder} lacks {len(missing)} of {shards} shards, first {shard_name(missing[0])}. "
            "Run the stage again: it writes what is missing."
        )


def say_drift(manifest: Manifest) -> None:
    """Say what quantisation changed, if anything is quantised."""
    for fact, value in drift_facts(manifest):
        say(f"{manifest.kind}: {fact} by quantisation: {value}")


def counted(folder: Path, shards: int) -> EvictionCounts | None:
    """What eviction did, as it was noted beside shards 0 … shards − 1 of targets in a working
    folder; None where that is not to be had any more."""
    try:
        noted = [read_json(side_path(folder, shard))["eviction"] for shard in range(shards)]
        return EvictionCounts.sum(EvictionCounts(*each) for each in noted)
    except (KavaError, KeyError, TypeError):
        return None


def _complete(folder: Path, spec: StoreSpec) -> Manifest:
    """The manifest of the store; KavaError if a file is missing, or there is one that is not its.

    Another process may have been at work in the folder, or the disk be damaged.
    """
    manifest = load_manifest(folder, spec.kind)
    more = sorted({path.name for path in folder.iterdir()} - {*manifest.files, MANIFEST_FILE})
    if more:
        raise KavaError(
            f"{folder / more[0]} does not belong to the store that was made there. See that "
            "nothing else writes into that folder, delete it and run the stage again."
        )
    return manifest


def merged_manifest(
    folder: Path,
    spec: StoreSpec,
    *,
    shards: int,
    settings: dict[str, Any],
    fingerprints: dict[str, str],
) -> Manifest:
    """The manifest of shards 0 … shards − 1, from what was noted of each; writes the index.

    The shards' tensors are not looked at, and may be none (`write_teacher_shard(keep=False)`).
    Arguments and errors as in `finalise`.
    """
    sides: list[dict[str, Any]] = []

    def columns() -> Iterator[dict[str, list[Any]]]:
        ids = Distinct()
        for shard in range(shards):
            side = _side_record(folder, shard, spec.fingerprint)
            rows = side.pop("columns")  # the bulk of it: one shard's at a time
            ids.add(rows["id"])
            sides.append(side)
            yield rows
        again = ids.repeated(
            name
            for shard in range(shards)
            for name in _side_record(folder, shard, spec.fingerprint)["columns"]["id"]
        )
        if again is not None:
            raise KavaError(f"{folder}: two records have the id {again!r}. Make ids unique.")

    write_index(folder / INDEX_FILE, columns())
    files = {shard_name(side["shard"]): _info(side) for side in sides}
    names = [INDEX_FILE]
    if spec.calibration:
        with atomic_path(folder / CALIBRATION_FILE) as temporary:
            write_pieces(temporary, serialise(spec.calibration))
        names.append(CALIBRATION_FILE)
    for name in names:
        file = folder / name
        files[name] = FileInfo(blake3=file_checksum(file), bytes=file.stat().st_size)
    return Manifest.build(
        kind=spec.kind,
        geometry=spec.geometry,
        codec=spec.codec,
        rotary=RotaryInfo.of(spec.phase, spec.rotary),
        settings=settings,
        fingerprints=fingerprints,
        statistics={
            f"{name}_std": deviations([side["sums"][name] for side in sides])
            for name in ("keys", "values", "endpoint")
        },
        drift=merge_drift([side["drift"] for side in sides]),
        records=sum(side["records"] for side in sides),
        trace_tokens=sum(side["trace_tokens"] for side in sides),
        shards=tuple(side["records"] for side in sides),
        files=files,
    )


def _side_record(folder: Path, shard: int, spec: str) -> dict[str, Any]:
    side = read_json(side_path(folder, shard))
    if side.get("spec") != spec:
        raise KavaError(
            f"{folder / shard_name(shard)} was written with another geometry or codec, other "
            f"ranges or another rotation than this run's. Delete {folder} and run the stage again."
        )
    return side


def _info(side: dict[str, Any]) -> FileInfo:
    return FileInfo(blake3=side["blake3"], bytes=side["bytes"])


def _tidy(folder: Path) -> None:
    """Remove side records and what a killed writer left behind."""
    for path in [*folder.glob("shard-*.json"), *folder.glob(".*.tmp")]:
        clear(path)
    sync(folder)

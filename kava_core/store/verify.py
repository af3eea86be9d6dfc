"""Is a store whole? Every damage found, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.store.layout import CALIBRATION_FILE, INDEX_FILE, MANIFEST_FILE
from kava_core.store.manifest import REMAKE, Manifest, read_manifest
from kava_core.store.read import TargetsStore, TeacherStore
from kava_core.store.statistics import Sums, deviations

TOLERANCE = 1e-4  # of a standard deviation: other writers may have summed in another order


def open_store(path: Path, *, checksums: bool = True) -> TeacherStore | TargetsStore:
    """The store in folder `path`, of whichever kind it is."""
    return _reader(read_manifest(path)).open(path, checksums=checksums)


def verify(path: Path, *, full: bool = False) -> list[str]:
    """What is wrong with the store in folder `path`; empty if nothing is.

    Looks at the manifest, file lengths, headers, the index, and whether they agree; with `full` at
    every checksum, and at the numbers that the manifest's statistics are of, which reads the whole
    store.
    """
    return [problem for _, problem in verify_files(path, full=full) if problem is not None]


def verify_files(path: Path, *, full: bool = False) -> Iterator[tuple[str, str | None]]:
    """`verify`, file by file: its name and what is wrong with it, or None."""
    try:
        manifest = read_manifest(path)
    except KavaError as error:
        yield MANIFEST_FILE, str(error)
        return
    yield MANIFEST_FILE, None
    store = _reader(manifest)(path, manifest, checksums=full)
    yield from _extra_files(path, manifest)
    damage = _problem(store.index.check)
    yield INDEX_FILE, damage
    whole, sums = damage is None, []
    if manifest.codec.calibrated:
        found = _problem(store.check_calibration)
        yield CALIBRATION_FILE, found
        whole &= found is None
    for shard, name in enumerate(manifest.shard_files()):
        if damage is None:
            found = _problem(partial(store.check_shard, shard))
        else:  # the index tells what a shard must be like
            found = _problem(partial(store.check_content, name))
        yield name, found
        whole &= found is None
        if full and whole:
            sums.append(store.sums(shard))
    if full and whole and (found := _problem(partial(_check_statistics, store, sums))):
        yield MANIFEST_FILE, found


def _check_statistics(store: TeacherStore | TargetsStore, sums: Sequence[dict[str, Sums]]) -> None:
    """KavaError if the manifest's standard deviations are not those of the shards."""
    for name in ("keys", "values", "endpoint"):
        said = getattr(store.manifest.statistics, f"{name}_std")
        found = deviations([shard[name] for shard in sums])
        for row, (expected, value) in enumerate(zip(said, found, strict=True)):
            if not math.isclose(expected, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                raise KavaError(
                    f"{store.path / MANIFEST_FILE}: statistics.{name}_std says {expected:.6g} for "
                    f"row {row}, the shards have {value:.6g}. {REMAKE}"
                )


def _reader(manifest: Manifest) -> type[TeacherStore] | type[TargetsStore]:
    return TeacherStore if manifest.kind == TeacherStore.kind else TargetsStore


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except KavaError as error:
        return str(error)
    return None


def _extra_files(path: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    for file in sorted(path.iterdir()):
        if file.name not in manifest.files and file.name != MANIFEST_FILE:
            yield (
                file.name,
                f"{file} does not belong to the store: its manifest does not list it. Delete it "
                "or move it out of the folder.",
            )

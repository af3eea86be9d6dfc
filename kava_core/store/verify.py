"""Is a store whole? Every damage found, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from kava_core.errors import KavaError
from kava_core.store.layout import CALIBRATION_FILE, INDEX_FILE, MANIFEST_FILE
from kava_core.store.manifest import REMAKE, Manifest
from kava_core.store.place import Folder, Place
from kava_core.store.read import TargetsStore, TeacherStore
from kava_core.store.statistics import Sums, deviations
from kava_core.store.url import StorePath
from kava_core.store.where import place_of

AHEAD = 8  # shards of a remote store
TOLERANCE = 1e-4  # of a standard deviation: other writers may have summed in another order


def open_store(path: str | StorePath, *, checksums: bool = True) -> TeacherStore | TargetsStore:
    """The store in folder `path` or at a URL, of whichever kind it is."""
    place = place_of(path)
    manifest = place.load_manifest()
    return _reader(manifest)(place, manifest, checksums=checksums)


def verify(path: str | StorePath, *, full: bool = False) -> list[str]:
    """What is wrong with the store in folder `path` or at a URL; empty if nothing is.

    Looks at the manifest, file lengths, headers, the index, and whether they agree; with `full` at
    every checksum, and at the numbers that the manifest's statistics are of, which reads the whole
    store. Of a remote store without `full` the shards are not fetched, and their slots not looked
    at.
    """
    return [problem for _, problem in verify_files(path, full=full) if problem is not None]


def verify_files(path: str | StorePath, *, full: bool = False) -> Iterator[tuple[str, str | None]]:
    """`verify`, file by file: its name and what is wrong with it, or None."""
    place = place_of(path)
    try:
        manifest = place.read_manifest()
    except KavaError as error:
        yield MANIFEST_FILE, str(error)
        return
    yield MANIFEST_FILE, None
    store = _reader(manifest)(place, manifest, checksums=full)
    yield from _other_files(place, manifest)
    damage = _problem(store.index.check)
    yield INDEX_FILE, damage
    whole, sums = damage is None, []
    if manifest.codec.calibrated:
        found = _problem(store.check_calibration)
        yield CALIBRATION_FILE, found
        whole &= found is None
    for shard, name in enumerate(manifest.shard_files()):
        if full:
            store.fetch_ahead([shard], range(shard + 1, min(shard + AHEAD, len(manifest.shards))))
        if damage is None:
            found = _problem(partial(_check_shard, store, shard, full=full))
        else:  # the index tells what a shard must be like
            found = _problem(partial(store.check_content, name))
        yield name, found
        whole &= found is None
        if full and whole:
            sums.append(store.sums(shard))
    if full and whole and (found := _problem(partial(_check_statistics, store, sums))):
        yield MANIFEST_FILE, found


def _check_shard(store: TeacherStore | TargetsStore, shard: int, *, full: bool) -> None:
    here = isinstance(store.place, Folder)
    if not here:  # what is fetched has the length that it should: what is there may be longer
        store.check_header(shard)
    if here or full:
        store.check_shard(shard)


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


def _other_files(place: Place, manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name in place.other_files(manifest):
        yield (
            name,
            f"{place.path / name} does not belong to the store: its manifest does not list it. "
            "Delete it or move it out of the folder.",
        )

"""Numbers of a manifest that contradict one another, or cannot be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kava_core.errors import KavaError
from kava_core.store.layout import CALIBRATION_FILE, CODE_BITS, INDEX_FILE
from kava_core.store.url import StorePath

if TYPE_CHECKING:
    from kava_core.store.manifest import Manifest

REMAKE = "Fetch the store again, or run the stage that makes it."
# Positions are turned by an angle each: one more than a whole turn says nothing.
LARGEST_ANGLE, LARGEST_SCALING = 2 * math.pi, 100.0


def check_counts(file: StorePath, manifest: Manifest) -> None:
    """Files, records and rows are as many as the rest of it says."""
    expected = {*manifest.shard_files(), INDEX_FILE}
    if manifest.codec.calibrated:
        expected.add(CALIBRATION_FILE)
    wrong = expected ^ manifest.files.keys()
    if wrong:
        raise KavaError(
            f"{file}: files lists wrongly or leaves out {sorted(wrong)[0]:.100}. {REMAKE}"
        )
    if sum(manifest.shards) != manifest.records:
        raise KavaError(
            f"{file}: the shards have {sum(manifest.shards)} records, records says "
            f"{manifest.records}. {REMAKE}"
        )
    geometry = manifest.geometry
    if (geometry.slots == 0) != (manifest.kind == "teacher_kv"):
        raise KavaError(f"{file}: {manifest.kind} cannot have {geometry.slots} slots. {REMAKE}")
    rows, levels = len(geometry.rows), geometry.model_layers + 1
    statistics = manifest.statistics
    lengths = [len(statistics.keys_std), len(statistics.values_std), len(statistics.endpoint_std)]
    if lengths != [rows, rows, levels]:
        raise KavaError(
            f"{file}: statistics have {lengths} entries, expected {[rows, rows, levels]}. {REMAKE}"
        )
    drift, quantised = (
        manifest.drift,
        {manifest.codec.keys, manifest.codec.values} & CODE_BITS.keys(),
    )
    if (drift is not None) != bool(quantised):
        raise KavaError(
            f"{file}: drift must be there exactly if keys or values are in codes. {REMAKE}"
        )
    for name, values in drift or ():
        if len(values) != rows or min(values) < 0 or ("changed" in name and max(values) > 1):
            raise KavaError(
                f"{file}: drift.{name} must be {rows} numbers, none negative, and no share above "
                f"1. {REMAKE}"
            )
    if min(statistics.keys_std + statistics.values_std + statistics.endpoint_std) < 0:
        raise KavaError(f"{file}: a standard deviation is negative. {REMAKE}")


def check_rotary(file: StorePath, manifest: Manifest) -> None:
    """A rotation of all layers or of none, of no more dimensions than there are."""
    rotary, geometry = manifest.rotary, manifest.geometry
    layers = geometry.model_layers if rotary.scaling or rotary.inv_freq else 0
    halves = {len(row) for row in rotary.inv_freq}
    right = (
        len(rotary.scaling) == len(rotary.inv_freq) == layers
        and len(halves) <= 1
        and all(2 * half <= geometry.head_dim for half in halves)
        and all(0 <= angle <= LARGEST_ANGLE for row in rotary.inv_freq for angle in row)
        and all(0 < factor <= LARGEST_SCALING for factor in rotary.scaling)
    )
    if not right:
        raise KavaError(
            f"{file}: rotary must have, for each of the {geometry.model_layers} layers, up to "
            f"{geometry.head_dim // 2} angles from 0 to {LARGEST_ANGLE:.2f} and a scaling above 0 "
            f"and at most {LARGEST_SCALING:g}, or none for any. {REMAKE}"
        )


def check_numbers(file: StorePath, manifest: Manifest) -> None:
    """What the settings say of the content, and how many tokens there can be."""
    evict, phase = manifest.settings.get("evict"), manifest.rotary.phase
    if isinstance(evict, dict) and evict.get("phase", phase) != phase:
        raise KavaError(
            f"{file}: settings.evict.phase is {evict['phase']!r:.60}, and rotary.phase is {phase}. "
            f"{REMAKE}"
        )
    fraction = manifest.settings.get("latent_fraction", 1)
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise KavaError(
            f"{file}: settings.latent_fraction must be above 0 and at most 1, found "
            f"{fraction!r:.60}. {REMAKE}"
        )
    # Every token of a trace takes four bytes of the index.
    most = manifest.files[INDEX_FILE].bytes // 4
    if not manifest.records <= manifest.trace_tokens <= most:
        raise KavaError(
            f"{file}: trace_tokens must be from {manifest.records} to {most}, by the records and "
            f"the length of the index, found {manifest.trace_tokens}. {REMAKE}"
        )

"""What a store is, in words and numbers for a person."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Self

import numpy as np

from kava_core.console import readable_size
from kava_core.findings.eviction import EvictionFindings
from kava_core.store.identity import identity_explained
from kava_core.store.layout import CODE_BITS
from kava_core.store.manifest import KIND_NAMES, Manifest
from kava_core.store.read import TargetsStore, TeacherStore

BARS = 10
QUARANTINED = "quarantined"  # in the settings of a manifest: reason → ids


@dataclass(frozen=True)
class EvictionCounts:
    """What eviction did to the traces of a whole store, counted per (record, cache row, head).

    places: how many of these there are; engaged: those from which a token was really dropped.
    tokens: of all traces, once per row and head; kept: those that fill a slot; agreeing: those of
    the kept that are the most common one of their record's slot over all rows and heads. judged:
    the kept tokens of records that say which tokens state results; results: those that do.
    """

    places: int
    engaged: int
    tokens: int
    kept: int
    agreeing: int
    judged: int
    results: int

    @classmethod
    def of(cls, store: TargetsStore) -> Self:
        """Those of `store`, whose tensors are read shard by shard."""
        shards = [_count(store, shard) for shard in range(len(store.sizes))]
        return cls(*(sum(column) for column in zip(*shards, strict=True)))

    @property
    def engaged_percent(self) -> float:
        return 100 * self.engaged / self.places

    @property
    def kept_percent(self) -> float:
        return 100 * self.kept / self.tokens

    @property
    def agreement_percent(self) -> float:
        return 100 * self.agreeing / self.kept

    @property
    def result_percent(self) -> float | None:
        """None where no record says which tokens state results."""
        return 100 * self.results / self.judged if self.judged else None


def _count(store: TargetsStore, shard: int) -> tuple[int, ...]:
    """The fields of `EvictionCounts` for one shard."""
    positions = store.slot_positions(shard)  # [N, L', H, M]
    index = store.index.shard(shard)
    starts, results = index["results"]
    counts = (positions >= 0).sum(-1)
    lengths = np.broadcast_to(index["n_cot"][:, None, None], counts.shape)
    agreeing = judged = stated = 0
    for row, record in enumerate(positions):
        agreeing += _most_common(record.reshape(-1, record.shape[-1]))
        known = results[starts[row] : starts[row + 1]]
        if len(known):
            judged += int(counts[row].sum())
            stated += int(np.isin(record, known).sum())
    return (
        counts.size,
        int((counts < lengths).sum()),
        int(lengths.sum(dtype=np.int64)),
        int(counts.sum(dtype=np.int64)),
        agreeing,
        judged,
        stated,
    )


def _most_common(positions: np.ndarray) -> int:
    """positions [places, M] → how many hold the most common one of their slot; −1 is none."""
    slots = positions.shape[1]
    ids = positions * slots + np.arange(slots)  # a number for each pair of position and slot
    held = np.bincount(ids[positions >= 0])
    held = np.pad(held, (0, -len(held) % slots)).reshape(-1, slots)
    return int(held.max(0).sum())


def eviction_findings(store: TargetsStore) -> EvictionFindings:
    """What eviction did, read from the finished store, so that a continued run counts alike."""
    counts = EvictionCounts.of(store)
    return EvictionFindings(
        engaged_percent=counts.engaged_percent,
        kept_percent=counts.kept_percent,
        agreement_percent=counts.agreement_percent,
        result_percent=counts.result_percent,
        identity_explained=identity_explained(store),
        megabytes=sum(info.bytes for info in store.manifest.files.values()) / 1e6,
        quarantined_records=len(quarantined(store.manifest)),
    )


def quarantined(manifest: Manifest) -> list[tuple[str, str]]:
    """The problems that the store lacks since its teacher's numbers for them were none: id, why."""
    said = manifest.settings.get(QUARANTINED, {})
    if not isinstance(said, dict):
        return []
    return [
        (str(name), str(reason))
        for reason, names in said.items()
        for name in (names if isinstance(names, list) else ())
    ]


def quarantine_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What the store lacks, for people; nothing if it lacks nothing."""
    left_out = quarantined(manifest)
    if not left_out:
        return []
    first, asked = left_out[0], manifest.records + len(left_out)
    reasons = Counter(reason for _, reason in left_out)
    counted = "; ".join(f"{count} for {reason}" for reason, count in reasons.items())
    return [("quarantined", f"{len(left_out)} of {asked:,} records: {counted}; first {first[0]}")]


def describe_store(store: TeacherStore | TargetsStore) -> list[tuple[str, str]]:
    """Facts about a store, name and value: what it is, from what, and how big."""
    manifest, geometry, codec = store.manifest, store.geometry, store.codec
    size = sum(info.bytes for info in manifest.files.values())
    quantised = {codec.keys, codec.values} & CODE_BITS.keys()
    facts = [
        ("kind", f"{manifest.kind}: {KIND_NAMES[manifest.kind]}"),
        ("format version", str(manifest.format_version)),
        ("records", f"{manifest.records:,} in {len(manifest.shards):,} shards"),
        *quarantine_facts(manifest),
        ("size", f"{readable_size(size)}, {readable_size(size / manifest.records)} per record"),
        ("trace tokens", f"{manifest.trace_tokens:,}"),
        ("layers", _layers(store)),
        ("KV heads × dimension", f"{geometry.kv_heads} × {geometry.head_dim}"),
        ("hidden size", str(geometry.hidden_size)),
        (
            "keys",
            f"{codec.keys}, {manifest.rotary.phase.replace('_', '-').replace('rope', 'RoPE')}",
        ),
        ("values", codec.values),
        ("endpoint", codec.endpoint),
    ]
    if isinstance(store, TargetsStore):
        facts.append(("slots (M)", str(geometry.slots)))
        found = eviction_findings(store)
        engaged = f"on {found.engaged_percent:.1f} % of (record, layer, head)"
        facts += [("eviction engaged", engaged), *found.identity]
    if quantised:
        facts.append(("one scale per", codec.granularity))
    facts += drift_facts(manifest)
    facts += [(f"made from {name}", value) for name, value in manifest.fingerprints.items()]
    facts.append(("made with", ", ".join(f"{k} {v}" for k, v in manifest.software.items())))
    shown = {name: value for name, value in manifest.settings.items() if name != QUARANTINED}
    facts += [(f"setting {name}", str(value)) for name, value in shown.items()]
    return facts


def drift_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What quantisation changed, name and value; nothing if nothing is quantised."""
    facts = []
    for name in ("keys", "values") if manifest.drift is not None else ():
        error = getattr(manifest.drift, f"{name}_relative_l2")
        changed = getattr(manifest.drift, f"{name}_neighbour_changed")
        facts.append(
            (
                f"drift of {name}",
                f"relative L2 {min(error):.4f} to {max(error):.4f} over the layers; nearest "
                f"neighbour changed for {np.mean(changed):.1%}",
            )
        )
    return facts


def length_histogram(store: TeacherStore | TargetsStore) -> list[tuple[int, int, int]]:
    """Trace lengths in at most ten equal steps: first length, last length, records."""
    lengths = store.index.column("n_cot")
    low, high = int(lengths.min()), int(lengths.max())
    step = math.ceil((high - low + 1) / BARS)
    counts = np.bincount((lengths - low) // step)
    return [
        (low + i * step, min(low + (i + 1) * step - 1, high), int(count))
        for i, count in enumerate(counts)
    ]


def _layers(store: TeacherStore | TargetsStore) -> str:
    geometry = store.geometry
    kept = f"{len(geometry.layers)} of {geometry.model_layers}"
    if len(geometry.layers) < geometry.model_layers:
        kept += f" ({', '.join(map(str, geometry.layers))})"
    if geometry.share != "none":
        groups = " ".join("+".join(map(str, group)) for group in geometry.groups)
        kept += f", {geometry.share} shared by {groups}"
    return kept

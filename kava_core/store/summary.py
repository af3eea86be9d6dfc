"""What a store is, in words and numbers for a person."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from kava_core.console import readable_size
from kava_core.findings.eviction import EvictionFindings
from kava_core.store.counts import EvictionCounts
from kava_core.store.identity import identity_explained
from kava_core.store.layout import CODE_BITS
from kava_core.store.manifest import KIND_NAMES, Manifest
from kava_core.store.place import Folder
from kava_core.store.read import TargetsStore, TeacherStore

BARS = 10
QUARANTINED = "quarantined"  # in the settings of a manifest: reason → ids


def eviction_findings(
    store: TargetsStore, counts: EvictionCounts | None = None
) -> EvictionFindings:
    """What eviction did. counts: taken as the store was written; None: the store is read for
    them."""
    counts = counts or EvictionCounts.of(store)
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
        facts += _eviction_facts(store)
    if quantised:
        facts.append(("one scale per", codec.granularity))
    facts += drift_facts(manifest)
    facts += [(f"made from {name}", value) for name, value in manifest.fingerprints.items()]
    facts.append(("made with", ", ".join(f"{k} {v}" for k, v in manifest.software.items())))
    shown = {name: value for name, value in manifest.settings.items() if name != QUARANTINED}
    facts += [(f"setting {name}", str(value)) for name, value in shown.items()]
    return facts


def _eviction_facts(store: TargetsStore) -> list[tuple[str, str]]:
    """What eviction did; of a remote store nobody fetches every shard to be told."""
    if not isinstance(store.place, Folder):
        return [("eviction", "counted where the store is a folder")]
    found = eviction_findings(store)
    engaged = f"on {found.engaged_percent:.1f} % of (record, layer, head)"
    return [("eviction engaged", engaged), *found.identity]


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

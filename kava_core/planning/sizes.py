"""Bytes on the disk: stores by their own layout, weights by their number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kava_core.planning.architecture import Architecture
from kava_core.planning.lengths import Lengths
from kava_core.settings import Cadence, Pipeline, Training
from kava_core.store import Codec, Geometry
from kava_core.store.layout import TensorSpec, shard_layout
from kava_core.targets.plan import Plan
from kava_core.targets.specs import store_codec

WEIGHT_BYTES = 4  # models are saved in float32
_KEPT = 2  # the last checkpoints, which a run keeps
_INDEX_ROW = 140  # bytes of a record's ids, names and numbers, beside its tokens
_MANIFEST, _MANIFEST_FILE = 2500, 140
_HEADER = 600  # of a shard


@dataclass(frozen=True)
class StoreSize:
    """A store as it will be. slots: M, 0 for one that keeps every token."""

    records: int
    shards: int
    files: int
    slots: int
    bytes: int
    bits: str

    @property
    def per_record(self) -> float:
        return self.bytes / self.records


def teacher_kv_size(settings: Pipeline, teacher: Architecture, lengths: Lengths) -> StoreSize:
    """The store of the teacher's caches."""
    generate = settings.generate
    codec = store_codec(generate)
    return _size(
        "teacher_kv",
        teacher.geometry,
        codec,
        lengths,
        generate.shard_size,
        bits=_bits(generate.keys_bits, generate.values_bits),
    )


def kv_targets_size(settings: Pipeline, teacher: Architecture, lengths: Lengths) -> StoreSize:
    """The store of targets; KavaError names an eviction setting that this teacher cannot meet."""
    evict = settings.evict
    geometry = Plan.of(evict, teacher.geometry).geometry
    return _size(
        "kv_targets",
        geometry,
        store_codec(evict),
        lengths,
        settings.generate.shard_size,
        bits=_bits(evict.keys_bits, evict.values_bits),
    )


def model_bytes(architecture: Architecture, training: Training | None, where: str) -> int:
    """Of a model's folder: weights, adapters, or both, as `training.lora.save` keeps them."""
    if training is None or training.lora is None:
        return WEIGHT_BYTES * architecture.parameters
    adapters = WEIGHT_BYTES * architecture.trainable(training, where)
    whole = WEIGHT_BYTES * architecture.parameters
    return {"merged": whole, "adapter": adapters, "both": whole + adapters}[training.lora.save]


def checkpoint_bytes(architecture: Architecture, training: Training, where: str) -> int:
    """Of one checkpoint: weights, and AdamW's two moments of what learns."""
    trainable = architecture.trainable(training, where)
    learnt = trainable if training.lora else 0  # adapters lie beside the weights
    return WEIGHT_BYTES * (architecture.parameters + learnt + 2 * trainable)


def checkpoint_count(training: Training, cadence: Cadence, records: int) -> int:
    """How many a run on so many training records writes, one of them at its end."""
    return -(-training.total_steps(training.taught(records)) // cadence.save_every)


def run_bytes(architecture: Architecture, training: Training, where: str, written: int) -> int:
    """Of the checkpoints beside a run that writes so many: those that it keeps, and what the next
    one, written before the oldest goes, takes more than the model, written after all."""
    one = checkpoint_bytes(architecture, training, where)
    more = one - model_bytes(architecture, training, where) if written > _KEPT else 0
    return min(_KEPT, written) * one + max(0, more)


def layout_bytes(layout: dict[str, TensorSpec]) -> int:
    """Of the tensors of a shard."""
    return sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in layout.values())


def _size(
    kind: str, geometry: Geometry, codec: Codec, lengths: Lengths, shard_size: int, *, bits: str
) -> StoreSize:
    records, tokens = lengths.problems, lengths.trace_tokens()
    shards = -(-records // shard_size)
    # A shard has one offset more than it has records.
    tensors = layout_bytes(shard_layout(kind, geometry, codec, records=records, tokens=tokens))
    index = records * (_INDEX_ROW + 4 * float(lengths.whole.mean()))
    manifest = _MANIFEST + _MANIFEST_FILE * shards
    calibration = 1 if codec.calibrated else 0
    return StoreSize(
        records=records,
        shards=shards,
        files=shards + 2 + calibration,
        slots=geometry.slots,
        bytes=round(tensors + index + manifest + _HEADER * shards),
        bits=bits,
    )


def _bits(keys: int, values: int) -> str:
    return str(keys) if keys == values else f"{keys}/{values}"

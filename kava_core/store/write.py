"""Writing a store: shards by any process in any order, then one merge that does not depend on them.

A worker writes shard k under a temporary name, fsyncs it, renames it, and leaves a side record
beside it (checksum, index rows, sums). The driver's `finalise` reads the side records in the order
of the shards, so one worker or twenty leave the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kava_core.artefacts import (
    canonical_json,
    clear,
)
from kava_core.errors import KavaError
from kava_core.record import Record
from kava_core.store.checksum import checksum
from kava_core.store.codec import EncodedTensor, encode
from kava_core.store.counts import EvictionCounts
from kava_core.store.drift import drift_sums
from kava_core.store.index import index_columns
from kava_core.store.layout import (
    CODE_BITS,
    describe,
    shard_name,
    wrong_slots,
)
from kava_core.store.spec import StoreSpec
from kava_core.store.statistics import row_sums
from kava_core.store.tensor_file import flush, serialise, write_pieces

T = TypeVar("T")
U = TypeVar("U")


def write_teacher_shard(
    folder: Path,
    spec: StoreSpec,
    shard: int,
    records: Sequence[Record],
    *,
    keys: Tensor,
    values: Tensor,
    importance: Tensor,
    endpoint: Tensor,
    keep: bool = True,
) -> None:
    """Write shard `shard` of a teacher store into the working folder; repeating it is harmless.

    records: N traces, in order. keys, values: [ΣN_C, L', H, D] of their CoT tokens one after the
    other, any float dtype; importance: [ΣN_C, L', H] float; endpoint: [N, L+1, E] float. keep:
    False leaves only what a manifest would say of it, of a store that nobody keeps
    (`merged_manifest`).

    KavaError names the record for a NaN, an infinity, or a span without tokens.
    """
    geometry = spec.geometry
    if geometry.slots:
        raise ValueError(f"a teacher's shard needs a spec without slots, found {geometry.slots}")
    offsets = torch.tensor([0, *(len(record.cot_ids) for record in records)]).cumsum(0)
    lead = (int(offsets[-1]), len(geometry.rows), geometry.kv_heads)
    importance = importance.cpu()
    _expect_shape(shard, "importance", importance, lead)
    _check_finite("importance", importance, records, offsets)
    content = _Content(
        keys=keys.cpu(),
        values=values.cpu(),
        endpoint=endpoint.cpu(),
        as_is={"importance": importance.float().contiguous(), "offsets": offsets},
        spans=offsets,
        counts=[lead[0] * geometry.kv_heads * geometry.head_dim] * lead[1],
    )
    _write(folder, spec, shard, records, content, (*lead, geometry.head_dim), keep=keep)


def write_targets_shard(
    folder: Path,
    spec: StoreSpec,
    shard: int,
    records: Sequence[Record],
    *,
    keys: Tensor,
    values: Tensor,
    slot_counts: Tensor,
    slot_positions: Tensor,
    endpoint: Tensor,
) -> None:
    """Write shard `shard` of a targets store into the working folder; repeating it is harmless.

    records: N traces, in order. keys, values: [N, L', H, M, D], valid slots first, any float
    dtype; what stands in invalid slots is replaced by zeros. slot_counts: [N, L', H] integers from
    1 to min(M, N_C); slot_positions: [N, L', H, M] integers, the slots' places in the CoT,
    ascending, −1 in invalid slots. endpoint: [N, L+1, E] float.

    KavaError names the record for a NaN, an infinity, or impossible slots.
    """
    geometry = spec.geometry
    if not geometry.slots:
        raise ValueError("a shard of targets needs a spec with slots, found none")
    keys, values, slot_counts, slot_positions = (
        x.cpu() for x in (keys, values, slot_counts, slot_positions)
    )
    lead = (len(records), len(geometry.rows), geometry.kv_heads, geometry.slots)
    _expect_shape(shard, "slot_counts", slot_counts, lead[:-1])
    _expect_shape(shard, "slot_positions", slot_positions, lead)
    _check_slots(records, slot_counts, slot_positions)
    shape = (*lead, geometry.head_dim)
    _expect_shape(shard, "keys", keys, shape)
    _expect_shape(shard, "values", values, shape)
    valid = slot_positions >= 0  # [N, L', H, M]
    if not valid.all():
        keys = keys.masked_fill(~valid[..., None], 0)
        values = values.masked_fill(~valid[..., None], 0)
    counts = slot_counts.sum((0, 2)) * geometry.head_dim  # [L']
    content = _Content(
        keys=keys,
        values=values,
        endpoint=endpoint.cpu(),
        as_is={
            "slot_counts": slot_counts.to(torch.int32).contiguous(),
            "slot_positions": slot_positions.to(torch.int32).contiguous(),
        },
        spans=torch.arange(len(records) + 1),
        counts=counts.tolist(),
        valid=valid,
    )
    lengths = np.array([len(record.cot_ids) for record in records])
    evicted = EvictionCounts.count(slot_positions.numpy(), lengths, [r.results for r in records])
    _write(folder, spec, shard, records, content, shape, noted={"eviction": astuple(evicted)})


@dataclass(frozen=True)
class _Content:
    """The tensors of a shard of N records, on the CPU, before they are encoded.

    keys, values: [ΣN_C, L', H, D] or [N, L', H, M, D]; endpoint: [N, L+1, E]. as_is: tensors that
    are stored as they are. spans: [N+1], record n owns keys[spans[n]:spans[n+1]]. counts: [L']
    numbers in valid slots, of keys as of values. valid: [N, L', H, M], None where there are no
    slots.
    """

    keys: Tensor
    values: Tensor
    endpoint: Tensor
    as_is: dict[str, Tensor]
    spans: Tensor
    counts: list[int]
    valid: Tensor | None = None


def _write(
    folder: Path,
    spec: StoreSpec,
    shard: int,
    records: Sequence[Record],
    content: _Content,
    shape: tuple[int, ...],
    *,
    keep: bool = True,
    noted: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Encode, write and describe one shard; shape: what keys and values must have.

    keep: whether its tensors are written, or only described. noted: what else is put beside it.
    """
    file = folder / shard_name(shard)
    if not records:
        raise KavaError(f"{file}: a shard needs at least one record.")
    columns = index_columns(shard, records)
    levels, hidden_size = spec.geometry.model_layers + 1, spec.geometry.hidden_size
    _expect_shape(shard, "keys", content.keys, shape)
    _expect_shape(shard, "values", content.values, shape)
    _expect_shape(shard, "endpoint", content.endpoint, (len(records), levels, hidden_size))
    own = torch.arange(len(records) + 1)
    inputs = {
        "keys": (content.keys, content.spans),
        "values": (content.values, content.spans),
        "endpoint": (content.endpoint, own),
    }
    encoded = {name: _encode(name, x, where, spec, records) for name, (x, where) in inputs.items()}
    tensors = dict(content.as_is)
    for name, item in encoded.items():
        tensors |= _stored_tensors(name, item)
    temporary, described = (
        file.with_name(f".{path.name}.{os.getpid()}.tmp")
        for path in (file, side_path(folder, shard))
    )
    pieces = serialise(tensors)
    # Sums are taken here while one thread writes and then takes the checksum, and another one waits
    # for the disk.
    with _removed_on_failure(temporary, described), ThreadPoolExecutor(2) as threads:
        written = threads.submit(write_pieces, temporary, pieces if keep else [])
        flushed = threads.submit(_after, written, flush, temporary)
        digest = threads.submit(_after, written, checksum, pieces)
        decoded = {name: item.dequantise() for name, item in encoded.items()}
        if content.valid is not None:
            for name in spec.codec.calibrated:  # whose ranges may leave out the zeros put there
                decoded[name] = decoded[name].masked_fill(~content.valid[..., None], 0)
        counts = {"endpoint": [len(records) * hidden_size] * levels}
        sums = {}
        for name, (_, where) in inputs.items():
            total, squares = row_sums(decoded[name])
            if not np.isfinite(squares).all():
                _check_finite(name, decoded[name], records, where)
            count = counts.get(name, content.counts)
            sums[name] = {"count": count, "sum": total.tolist(), "squares": squares.tolist()}
        side = {
            "spec": spec.fingerprint,
            "shard": shard,
            "records": len(records),
            "trace_tokens": sum(columns["n_cot"]),
            "blake3": digest.result(),
            "bytes": sum(len(piece) for piece in pieces),
            "sums": sums,
            "drift": _drift(spec, content, decoded),
            "columns": columns,
            **noted,
        }
        write_pieces(described, [canonical_json(side).encode()])
        flush(described)
        flushed.result()
        # A shard without a side record is not done.
        if keep:
            _put(temporary, file)
        else:
            temporary.unlink()
        _put(described, side_path(folder, shard))
        flush(folder)  # so that a power cut takes back no name


def _put(made: Path, place: Path) -> None:
    if place.is_dir():  # which no file can replace
        clear(place)
    made.replace(place)


def _encode(
    name: str, x: Tensor, spans: Tensor, spec: StoreSpec, records: Sequence[Record]
) -> EncodedTensor:
    encoding = getattr(spec.codec, name)
    if encoding in CODE_BITS:  # a float is checked by its sums, after it is cast
        _check_finite(name, x, records, spans)
    if name not in spec.codec.calibrated:
        return encode(x, encoding)
    shared = spec.calibration[f"{name}_scale"], spec.calibration[f"{name}_zero"]
    return encode(x, encoding, shared)


def _drift(
    spec: StoreSpec, content: _Content, decoded: dict[str, Tensor]
) -> dict[str, dict[str, list[float]]] | None:
    """What quantisation changes, as sums for the manifest; None if nothing is in codes."""
    if not {spec.codec.keys, spec.codec.values} & CODE_BITS.keys():
        return None
    return {
        name: drift_sums(getattr(content, name), decoded[name], content.spans, content.valid)
        for name in ("keys", "values")
    }


@contextmanager
def _removed_on_failure(*paths: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def _after(first: Future[None], call: Callable[[T], U], argument: T) -> U:
    """The call, once `first` has succeeded."""
    first.result()
    return call(argument)


def _stored_tensors(name: str, item: EncodedTensor) -> dict[str, Tensor]:
    """The tensors of `item` as a shard names them; a shared scale is not a shard's to keep."""
    tensors = {name: item.codes}
    if item.scale is not None and item.zero is not None and not item.shared:
        tensors[f"{name}_scale"] = item.scale.squeeze(-1)
        tensors[f"{name}_zero"] = item.zero.squeeze(-1)
    return tensors


def side_path(folder: Path, shard: int) -> Path:
    return (folder / shard_name(shard)).with_suffix(".json")


def _expect_shape(shard: int, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    wants_float = name not in ("slot_counts", "slot_positions")
    if tuple(x.shape) != shape or x.is_floating_point() != wants_float:
        kind = "float" if wants_float else "integers"
        raise KavaError(
            f"shard {shard}: {name} must be {kind} {list(shape)}, found {describe(x)}. Check that "
            "tensors, records and geometry belong together."
        )


def _check_finite(name: str, x: Tensor, records: Sequence[Record], spans: Tensor) -> None:
    """KavaError naming the first record with a NaN or an infinity in x; spans: [N+1]."""
    finite = torch.isfinite(x).flatten(1).all(1)  # [A]
    if finite.all():
        return
    first = int((~finite).nonzero()[0])
    record = int(torch.searchsorted(spans, first, right=True)) - 1
    raise KavaError(
        f"record {records[record].id!r} has a NaN or an infinity in its {name} "
        f"({str(x.dtype).removeprefix('torch.')}). Check the model and its dtype, or store the "
        f"{name} in a wider one."
    )


def _check_slots(records: Sequence[Record], counts: Tensor, positions: Tensor) -> None:
    """KavaError naming the first record whose slots are impossible."""
    lengths = np.array([len(record.cot_ids) for record in records])
    wrong = wrong_slots(counts.numpy(), positions.numpy(), lengths)
    if wrong is not None:
        first = records[wrong]
        raise KavaError(
            f"record {first.id!r} (trace of {len(first.cot_ids)} tokens) has impossible slots. "
            "Valid slots come first, ascending within the trace; the others have position -1."
        )

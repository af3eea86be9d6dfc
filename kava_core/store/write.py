"""Writing a store: shards by any process in any order, then one merge that does not depend on them.

A worker writes shard k under a temporary name, fsyncs it, renames it, and leaves a side record
beside it (checksum, index rows, sums). The driver's `finalise` reads the side records in the order
of the shards, so one worker or twenty leave the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kava_core.artefacts import (
    atomic_path,
    canonical_json,
    clear,
    read_json,
    sync,
    write_json,
)
from kava_core.console import say, warn
from kava_core.errors import KavaError
from kava_core.record import Record
from kava_core.store.checksum import checksum, file_checksum
from kava_core.store.codec import EncodedTensor, encode
from kava_core.store.drift import drift_sums, merge_drift
from kava_core.store.index import index_columns, write_index
from kava_core.store.layout import (
    CALIBRATION_FILE,
    CODE_BITS,
    INDEX_FILE,
    MANIFEST_FILE,
    describe,
    right_slots,
    shard_name,
)
from kava_core.store.manifest import FileInfo, Manifest, RotaryInfo, load_manifest
from kava_core.store.spec import StoreSpec
from kava_core.store.statistics import deviations, row_sums
from kava_core.store.summary import drift_facts
from kava_core.store.tensor_file import flush, serialise, write_pieces

SIDE_RECORD = re.compile(r"shard-(\d{5,})\.json")

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
    _write(folder, spec, shard, records, content, shape)


def finished_shards(folder: Path) -> set[int]:
    """The shards in a working folder that are complete and need no redoing.

    What is there by name but torn (no file, of another length than its side record says, a side
    record or manifest that cannot be read) is removed and said to be made again.
    """
    if _is_whole(folder):
        return set(range(len(load_manifest(folder).shards)))
    done = set()
    for side in sorted(folder.glob("shard-*.json")):
        match = SIDE_RECORD.fullmatch(side.name)
        if not match:
            continue
        file = folder / shard_name(int(match[1]))
        if _is_finished(side, file):
            done.add(int(match[1]))
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
    if shards < 1:
        raise KavaError(f"{folder}: a store needs records, found none. Check what went in.")
    missing = sorted(set(range(shards)) - finished_shards(folder))
    if missing:
        raise KavaError(
            f"{folder} lacks {len(missing)} of {shards} shards, first {shard_name(missing[0])}. "
            "Run the stage again: it writes what is missing."
        )
    manifest = merged_manifest(
        folder, spec, shards=shards, settings=settings, fingerprints=fingerprints
    )
    write_json(folder / MANIFEST_FILE, manifest.to_json())
    for fact, value in drift_facts(manifest):
        say(f"{spec.kind}: {fact} by quantisation: {value}")
    _tidy(folder)
    return _complete(folder, spec)


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
        ids: set[str] = set()
        for shard in range(shards):
            side = _side_record(folder, shard, spec.fingerprint)
            rows = side.pop("columns")  # the bulk of it: one shard's at a time
            _check_ids(folder, rows["id"], ids)
            sides.append(side)
            yield rows

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
) -> None:
    """Encode, write and describe one shard; shape: what keys and values must have.

    keep: whether its tensors are written, or only described.
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
        for path in (file, _side_path(folder, shard))
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
        }
        write_pieces(described, [canonical_json(side).encode()])
        flush(described)
        flushed.result()
        # A shard without a side record is not done. Names that a power cut takes back cost no more
        # than writing the shard again; `finalise` makes them durable.
        if keep:
            _put(temporary, file)
        else:
            temporary.unlink()
        _put(described, _side_path(folder, shard))


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


def _side_path(folder: Path, shard: int) -> Path:
    return (folder / shard_name(shard)).with_suffix(".json")


def _side_record(folder: Path, shard: int, spec: str) -> dict[str, Any]:
    side = read_json(_side_path(folder, shard))
    if side.get("spec") != spec:
        raise KavaError(
            f"{folder / shard_name(shard)} was written with another geometry or codec, other "
            f"ranges or another rotation than this run's. Delete {folder} and run the stage again."
        )
    return side


def _info(side: dict[str, Any]) -> FileInfo:
    return FileInfo(blake3=side["blake3"], bytes=side["bytes"])


def _check_ids(folder: Path, ids: list[str], seen: set[str]) -> None:
    for name in ids:
        if name in seen:
            raise KavaError(f"{folder}: two records have the id {name!r}. Make ids unique.")
        seen.add(name)


def _tidy(folder: Path) -> None:
    """Remove side records and what a killed writer left behind."""
    for path in [*folder.glob("shard-*.json"), *folder.glob(".*.tmp")]:
        clear(path)
    sync(folder)


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
    lengths = torch.tensor([len(record.cot_ids) for record in records])
    right = right_slots(counts, positions, lengths)
    if not right.all():
        first = records[int((~right).nonzero()[0])]
        raise KavaError(
            f"record {first.id!r} (trace of {len(first.cot_ids)} tokens) has impossible slots. "
            "Valid slots come first, ascending within the trace; the others have position -1."
        )

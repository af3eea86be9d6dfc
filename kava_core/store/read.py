"""Reading a store: a teacher's shards one after the other, or batches of targets in any order.

Opening reads the manifest and looks at file sizes, nothing else. A file's checksum is checked the
first time something is read from it, so that a damaged store cannot give a wrong batch.

Shards are memory-mapped, and a batch is copied row by row from the maps straight into a buffer that
is used again: the process's own memory does not grow with the store.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.record import Record
from kava_core.store.codec import EncodedTensor, spread
from kava_core.store.index import Index
from kava_core.store.layout import (
    CALIBRATION_FILE,
    Codec,
    Geometry,
    TensorSpec,
    calibration_layout,
    right_slots,
    shard_layout,
    shard_name,
)
from kava_core.store.manifest import (
    REMAKE,
    Expectation,
    Manifest,
    check_content,
    check_file,
    load_manifest,
    unless_made_anew,
)
from kava_core.store.statistics import Sums, row_sums
from kava_core.store.tensor_file import read_header

OPEN_FILES = 128

T = TypeVar("T")


@dataclass(frozen=True)
class TeacherShard:
    """One shard of a teacher store, memory-mapped.

    records: N. offsets: [N+1] int64, record n owns tokens offsets[n] … offsets[n+1]. Encoded are
    keys, values [ΣN_C, L', H, D] and endpoint [N, L+1, E]; importance: [ΣN_C, L', H] float32.
    Cut keys and values before decoding them (`shard.keys[a:b].dequantise(device)`).
    """

    records: list[Record]
    offsets: Tensor
    keys: EncodedTensor
    values: EncodedTensor
    importance: Tensor
    endpoint: EncodedTensor

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class TargetTensors:
    """A batch of targets as numbers: keys, values [B, L', H, M, D], endpoint [B, L+1, E].

    slot_counts: [B, L', H] int32; slot_positions: [B, L', H, M] int32, −1 = none; slot_mask:
    [B, L', H, M] bool, true where a slot holds a target.
    """

    keys: Tensor
    values: Tensor
    endpoint: Tensor
    slot_counts: Tensor
    slot_positions: Tensor
    slot_mask: Tensor


@dataclass(frozen=True)
class TargetsBatch:
    """A batch of targets as it is stored; B records.

    indices: their places in the store. Encoded are keys, values [B, L', H, M, D] and endpoint
    [B, L+1, E]; slot_counts [B, L', H] and slot_positions [B, L', H, M] int32.
    """

    indices: list[int]
    keys: EncodedTensor
    values: EncodedTensor
    endpoint: EncodedTensor
    slot_counts: Tensor
    slot_positions: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TargetsBatch:
        """The same, still encoded, on `device`."""
        return replace(
            self,
            keys=self.keys.to(device, non_blocking),
            values=self.values.to(device, non_blocking),
            endpoint=self.endpoint.to(device, non_blocking),
            slot_counts=self.slot_counts.to(device, non_blocking=non_blocking),
            slot_positions=self.slot_positions.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> TargetsBatch:
        """The same in pinned memory.

        torch's DataLoader calls it with `pin_memory=True`; its worker processes are what reads
        ahead.
        """
        return replace(
            self,
            keys=self.keys.pin_memory(),
            values=self.values.pin_memory(),
            endpoint=self.endpoint.pin_memory(),
            slot_counts=self.slot_counts.pin_memory(),
            slot_positions=self.slot_positions.pin_memory(),
        )

    def dequantise(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = torch.float32
    ) -> TargetTensors:
        """The targets as numbers on `device`: codes are moved first and worked out there.

        dtype: of keys, values and endpoint; None leaves stored floats as they are.
        """
        here = self if device is None else self.to(device, non_blocking=True)
        return TargetTensors(
            keys=here.keys.dequantise(dtype=dtype),
            values=here.values.dequantise(dtype=dtype),
            endpoint=here.endpoint.dequantise(dtype=dtype),
            slot_counts=here.slot_counts,
            slot_positions=here.slot_positions,
            slot_mask=here.slot_positions >= 0,
        )


class _Store(ABC):
    """What both kinds have: folder, manifest, index."""

    kind: str

    def __init__(self, path: Path, manifest: Manifest, *, checksums: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.checksums = checksums
        self.index = Index(path, manifest)
        self._checked: dict[str, tuple[int, ...]] = {}  # file → what it was when it was checked
        self._calibration: dict[str, Tensor] | None = None

    @classmethod
    def open(
        cls, path: str | Path, expect: Expectation | None = None, *, checksums: bool = True
    ) -> Self:
        """Open the store in folder `path`; milliseconds, whatever its size.

        expect: what this run needs it to be. checksums: check each file's content the first time it
        is read (once per process); False trusts the disk, but for the index.

        KavaError for another kind, a newer format, a store that is not what is expected, a damaged
        manifest, and a file that is missing, of another length, or outside the folder.
        """
        folder = Path(path)
        manifest = load_manifest(folder, cls.kind)
        if expect is not None:
            expect.check(manifest, folder)
        return cls(folder, manifest, checksums=checksums)

    def __len__(self) -> int:
        return self.manifest.records

    @property
    def geometry(self) -> Geometry:
        return self.manifest.geometry

    @property
    def codec(self) -> Codec:
        return self.manifest.codec

    @property
    def layer_map(self) -> dict[int, int]:
        """Teacher layer → row of keys, values and slots that stands for it."""
        return self.geometry.layer_map

    @abstractmethod
    def check_shard(self, shard: int) -> None:
        """KavaError if a shard is damaged or disagrees with the manifest or the index."""

    @abstractmethod
    def sums(self, shard: int) -> dict[str, Sums]:
        """Sums over a shard's keys, values and endpoint states, as they are read, row by row.

        Over valid slots, or tokens.
        """

    def check_calibration(self) -> None:
        """KavaError if the calibration file is damaged."""
        self._shared()

    def check_content(self, name: str) -> None:
        """Once per file: KavaError unless it is there, whole, and has the content it should.

        Once more if it is another file by now: a store may be made anew while it is read.
        """
        with unless_made_anew(self.path, self.manifest):
            check_file(self.path, name, self.manifest.files[name].bytes)
            now = _identity(self.path / name)
            before = self._checked.get(name)
            if now == before:
                return
            if self.checksums or before is not None:
                check_content(self.path / name, self.manifest)
            self._checked[name] = now

    def _opened(
        self, name: str, layout: dict[str, TensorSpec], opener: Callable[[Path], T]
    ) -> tuple[T, dict[str, tuple[int, int]]]:
        """What `opener` makes of a checked file, and where the tensors in it are.

        The header is checked first: a file of many empty gigabytes is not read through.
        """
        file = self.path / name
        with unless_made_anew(self.path, self.manifest):
            check_file(self.path, name, self.manifest.files[name].bytes)
            spans = read_header(file, layout)
            self.check_content(name)
            try:
                opened = opener(file)
                same = _identity(file) == self._checked[name]
            except (SafetensorError, OSError) as error:
                raise KavaError(f"{file} cannot be read ({error}). {REMAKE}") from None
            if not same:  # what was opened may not be what was checked
                raise KavaError(f"{file} was changed while it was read. {REMAKE}")
        return opened, spans

    def _tensors(self, name: str, layout: dict[str, TensorSpec]) -> dict[str, Tensor]:
        """All tensors of a file, memory-mapped."""

        def read(file: Path) -> dict[str, Tensor]:
            with safe_open(file, framework="pt") as tensors:
                return {key: tensors.get_tensor(key) for key in layout}

        return self._opened(name, layout, read)[0]

    def _shared(self) -> dict[str, Tensor]:
        """Scale and zero of the calibration file; empty if every token has its own."""
        if self._calibration is None:
            layout = calibration_layout(self.geometry, self.codec)
            self._calibration = self._tensors(CALIBRATION_FILE, layout) if layout else {}
        return self._calibration

    def _encoded(self, name: str, tensors: dict[str, Tensor], length: int) -> EncodedTensor:
        encoding = getattr(self.codec, name)
        codes, scale, zero = tensors[name], tensors.get(f"{name}_scale"), None
        shared = name in self.codec.calibrated
        if shared:
            scale, zero = (spread(self._shared()[f"{name}_{p}"], codes.ndim) for p in PARTS)
        elif scale is not None:
            scale, zero = scale[..., None], tensors[f"{name}_zero"][..., None]
        return EncodedTensor(codes, encoding, length, scale, zero, shared)


PARTS = ("scale", "zero")


class TeacherStore(_Store):
    """A teacher's caches, read shard by shard."""

    kind = "teacher_kv"

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.manifest.shards)

    def shard(self, shard: int) -> TeacherShard:
        """Shard `shard`, its tensors memory-mapped.

        KavaError for a damaged shard and for one that disagrees with the index.
        """
        lengths = self.index.shard(shard)["n_cot"]
        records, geometry = self.manifest.shards[shard], self.geometry
        layout = shard_layout(
            self.kind, geometry, self.codec, records=records, tokens=int(lengths.sum())
        )
        tensors = self._tensors(shard_name(shard), layout)
        offsets = tensors["offsets"]
        if offsets[0] != 0 or not np.array_equal(offsets.diff().numpy(), lengths):
            raise KavaError(
                f"{self.path / shard_name(shard)} and the index disagree about the lengths of the "
                f"traces. {REMAKE}"
            )
        return TeacherShard(
            records=self.index.records(shard),
            offsets=offsets,
            keys=self._encoded("keys", tensors, geometry.head_dim),
            values=self._encoded("values", tensors, geometry.head_dim),
            importance=tensors["importance"],
            endpoint=self._encoded("endpoint", tensors, geometry.hidden_size),
        )

    def check_shard(self, shard: int) -> None:
        self.shard(shard)

    def sums(self, shard: int) -> dict[str, Sums]:
        content = self.shard(shard)
        size = int(content.offsets[-1]) * self.geometry.kv_heads * self.geometry.head_dim
        return {
            "keys": _sums(content.keys, [size] * len(self.geometry.rows)),
            "values": _sums(content.values, [size] * len(self.geometry.rows)),
            "endpoint": _endpoint_sums(content.endpoint),
        }


@dataclass
class Buffer:
    """Memory for a batch, used again and again: a batch read into it replaces the one before."""

    tensors: dict[str, Tensor]
    slots: list[list[np.ndarray]] = field(repr=False)  # per record, its bytes in each tensor

    def __len__(self) -> int:
        return len(self.slots)


class TargetsStore(_Store):
    """Targets, read by record in any order; what the trainer streams from.

    May be used from several threads and processes: it pickles as its path.
    """

    kind = "kv_targets"

    def __init__(self, path: Path, manifest: Manifest, *, checksums: bool) -> None:
        super().__init__(path, manifest, checksums=checksums)
        # per shard, the bytes of each tensor [N, …], in the order of `shard_layout`
        self._maps: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._agreed: set[int] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.manifest, self.checksums)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Records per shard, as a sampler wants them."""
        return self.manifest.shards

    def buffer(self, records: int) -> Buffer:
        """Memory for batches of up to `records` records."""
        if not self._agreed:  # a geometry that the files belie asks for no memory
            self.check_shard(0)
        layout = shard_layout(self.kind, self.geometry, self.codec, records=records, tokens=0)
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
        rows = [_rows(x) for x in tensors.values()]
        return Buffer(tensors, [list(slot) for slot in zip(*rows, strict=True)])

    def batch(self, indices: Sequence[int], out: Buffer | None = None) -> TargetsBatch:
        """The records at `indices`, in that order.

        out: memory to read into (`buffer`); the batch is then valid until the next read into it.
        """
        count = len(indices)
        out = out or self.buffer(count)
        if count > len(out):
            raise ValueError(f"a buffer for {len(out)} records cannot hold {count}")
        with self._lock:
            for i, views in zip(indices, out.slots, strict=False):
                shard, row = self.index.locate(int(i))
                for view, tensor in zip(views, self._shard(shard), strict=True):
                    view[:] = tensor[row]
        return self._assemble([int(i) for i in indices], out)

    def slot_counts(self, shard: int) -> np.ndarray:
        """How many slots are valid in a shard's records, int32 [N, L', H]."""
        with self._lock:
            counts = self._shard(shard)[self._place("slot_counts")]
        heads = self.geometry.kv_heads
        return counts.copy().view(np.int32).reshape(len(counts), -1, heads)

    def slot_positions(self, shard: int) -> np.ndarray:
        """The places in the trace that a shard's slots hold, int32 [N, L', H, M]; −1 = none."""
        with self._lock:
            positions = self._shard(shard)[self._place("slot_positions")]
        shape = (len(positions), -1, self.geometry.kv_heads, self.geometry.slots)
        return positions.copy().view(np.int32).reshape(shape)

    def sums(self, shard: int) -> dict[str, Sums]:
        first = sum(self.sizes[:shard])
        content = self.batch(range(first, first + self.sizes[shard]))
        counts = (content.slot_counts.sum((0, 2)) * self.geometry.head_dim).tolist()
        empty = (content.slot_positions < 0)[..., None]
        return {
            "keys": _sums(content.keys, counts, empty),
            "values": _sums(content.values, counts, empty),
            "endpoint": _endpoint_sums(content.endpoint),
        }

    def _place(self, name: str) -> int:
        layout = shard_layout(self.kind, self.geometry, self.codec, records=1, tokens=0)
        return list(layout).index(name)

    def _assemble(self, indices: list[int], out: Buffer) -> TargetsBatch:
        tensors = {name: x[: len(indices)] for name, x in out.tensors.items()}
        geometry = self.geometry
        return TargetsBatch(
            indices=indices,
            keys=self._encoded("keys", tensors, geometry.head_dim),
            values=self._encoded("values", tensors, geometry.head_dim),
            endpoint=self._encoded("endpoint", tensors, geometry.hidden_size),
            slot_counts=tensors["slot_counts"],
            slot_positions=tensors["slot_positions"],
        )

    def check_shard(self, shard: int) -> None:
        with self._lock:
            self._shard(shard)

    def _shard(self, shard: int) -> list[np.ndarray]:
        """The maps of a shard; checked when it is first used by this process."""
        maps = self._maps.get(shard)
        if maps is not None:
            self._maps.move_to_end(shard)
            return maps
        name = shard_name(shard)
        records = self.manifest.shards[shard]
        layout = shard_layout(self.kind, self.geometry, self.codec, records=records, tokens=0)
        whole, spans = self._opened(name, layout, _map)
        tensors = {key: whole[slice(*spans[key])].reshape(records, -1) for key in layout}
        if shard not in self._agreed:
            self._check_slots(shard, tensors["slot_counts"], tensors["slot_positions"])
            self._agreed.add(shard)
        self._maps[shard] = list(tensors.values())
        if len(self._maps) > OPEN_FILES:
            self._maps.popitem(last=False)
        return self._maps[shard]

    def _check_slots(self, shard: int, counts: np.ndarray, positions: np.ndarray) -> None:
        """The slots of a shard fit the trace lengths in the index."""
        shape = (1, len(self.geometry.rows), self.geometry.kv_heads, -1)
        lengths = torch.from_numpy(self.index.shard(shard)["n_cot"].copy())
        for row, length in enumerate(lengths):  # one by one: large tensors leave holes in the heap
            right = right_slots(
                torch.from_numpy(counts[row].copy().view(np.int32)).view(shape[:-1]),
                torch.from_numpy(positions[row].copy().view(np.int32)).view(shape),
                length[None],
            )
            if not right.all():
                raise KavaError(
                    f"{self.path / shard_name(shard)} and the index disagree: the slots of record "
                    f"{row} of the shard are not places in its trace. {REMAKE}"
                )


def _map(file: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped."""
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _identity(file: Path) -> tuple[int, ...]:
    """Another one if another file stands under the name, none does, or it was written to."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reopen(path: str, manifest: Manifest, checksums: bool) -> TargetsStore:
    return TargetsStore(Path(path), manifest, checksums=checksums)


def _rows(x: Tensor) -> list[np.ndarray]:
    """The bytes of each row of a contiguous tensor, writable."""
    return list(x.view(torch.uint8).view(len(x), -1).numpy())


def _sums(encoded: EncodedTensor, counts: Sequence[int], leave_out: Tensor | None = None) -> Sums:
    """Of each row of encoded [A, R, …], counts [R] numbers of which are not left out."""
    x = encoded.dequantise(dtype=torch.float32)
    total, squares = row_sums(x if leave_out is None else x.masked_fill(leave_out, 0))
    return {"count": list(counts), "sum": total.tolist(), "squares": squares.tolist()}


def _endpoint_sums(endpoint: EncodedTensor) -> Sums:
    records, levels = endpoint.codes.shape[:2]
    return _sums(endpoint, [records * endpoint.length] * levels)

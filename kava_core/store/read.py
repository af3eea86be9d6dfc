"""Reading a store: a teacher's shards one after the other, or batches of targets in any order.

Opening reads the manifest and looks at file sizes, nothing else. A file's checksum is checked the
first time something is read from it, so that a damaged store cannot give a wrong batch.

Shards are memory-mapped, and a batch is copied row by row from the maps straight into a buffer that
is used again: the process's own memory does not grow with the store.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.store.base import Store
from kava_core.store.batch import Buffer, TargetsBatch, TeacherShard
from kava_core.store.codec import EncodedTensor
from kava_core.store.layout import (
    TensorSpec,
    shard_layout,
    shard_name,
    wrong_slots,
)
from kava_core.store.manifest import REMAKE, Manifest
from kava_core.store.place import Place
from kava_core.store.statistics import Sums, row_sums

OPEN_FILES = 128


class TeacherStore(Store):
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
        lengths, geometry = self.index.shard(shard)["n_cot"], self.geometry
        tensors = self._tensors(shard_name(shard), self._layout(shard))
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

    def _layout(self, shard: int) -> dict[str, TensorSpec]:
        tokens = int(self.index.shard(shard)["n_cot"].sum())
        records = self.manifest.shards[shard]
        return shard_layout(self.kind, self.geometry, self.codec, records=records, tokens=tokens)

    def sums(self, shard: int) -> dict[str, Sums]:
        content = self.shard(shard)
        size = int(content.offsets[-1]) * self.geometry.kv_heads * self.geometry.head_dim
        return {
            "keys": _sums(content.keys, [size] * len(self.geometry.rows)),
            "values": _sums(content.values, [size] * len(self.geometry.rows)),
            "endpoint": _endpoint_sums(content.endpoint),
        }


class TargetsStore(Store):
    """Targets, read by record in any order; what the trainer streams from.

    May be used from several threads and processes: it pickles as its path.
    """

    kind = "kv_targets"

    def __init__(self, place: Place, manifest: Manifest, *, checksums: bool) -> None:
        super().__init__(place, manifest, checksums=checksums)
        # per shard, the bytes of each tensor [N, …], in the order of `shard_layout`
        self._maps: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._agreed: set[int] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.place, self.manifest, self.checksums)

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

    def endpoints(self, indices: Sequence[int]) -> EncodedTensor:
        """The endpoint states alone of the records at `indices`, in that order."""
        layout = shard_layout(self.kind, self.geometry, self.codec, records=len(indices), tokens=0)
        tensors = {}
        with self._lock:
            places = [self.index.locate(int(i)) for i in indices]
            for place, (name, spec) in enumerate(layout.items()):
                if name.startswith("endpoint"):
                    tensors[name] = torch.empty(spec.shape, dtype=spec.dtype)
                    for view, (shard, row) in zip(_rows(tensors[name]), places, strict=True):
                        view[:] = self._shard(shard)[place][row]
        return self._encoded("endpoint", tensors, self.geometry.hidden_size)

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
        records, layout = self.manifest.shards[shard], self._layout(shard)
        whole, spans = self._opened(shard_name(shard), layout, _map)
        tensors = {key: whole[slice(*spans[key])].reshape(records, -1) for key in layout}
        if shard not in self._agreed:
            self._check_slots(shard, tensors["slot_counts"], tensors["slot_positions"])
            self._agreed.add(shard)
        for other in [k for k in self._maps if not self._is_kept(k)]:
            del self._maps[other]
        self._maps[shard] = list(tensors.values())
        if len(self._maps) > OPEN_FILES:
            self._maps.popitem(last=False)
        return self._maps[shard]

    def _layout(self, shard: int) -> dict[str, TensorSpec]:
        records = self.manifest.shards[shard]
        return shard_layout(self.kind, self.geometry, self.codec, records=records, tokens=0)

    def _is_kept(self, shard: int) -> bool:
        return self.place.has_opened(self.manifest, shard_name(shard))

    def _check_slots(self, shard: int, counts: np.ndarray, positions: np.ndarray) -> None:
        """The slots of a shard fit the trace lengths in the index."""
        shape = (len(counts), len(self.geometry.rows), self.geometry.kv_heads)
        wrong = wrong_slots(
            counts.view(np.int32).reshape(shape),
            positions.view(np.int32).reshape(*shape, self.geometry.slots),
            self.index.shard(shard)["n_cot"],
        )
        if wrong is not None:
            raise KavaError(
                f"{self.path / shard_name(shard)} and the index disagree: the slots of record "
                f"{wrong} of the shard are not places in its trace. {REMAKE}"
            )


def _map(file: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped."""
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _reopen(place: Place, manifest: Manifest, checksums: bool) -> TargetsStore:
    return TargetsStore(place, manifest, checksums=checksums)


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

"""What a reader gives: a teacher's shard, or a batch of targets, as stored and as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kava_core.record import Record
from kava_core.store.codec import EncodedTensor


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


@dataclass
class Buffer:
    """Memory for a batch, used again and again: a batch read into it replaces the one before."""

    tensors: dict[str, Tensor]
    slots: list[list[np.ndarray]] = field(repr=False)  # per record, its bytes in each tensor

    def __len__(self) -> int:
        return len(self.slots)

"""Targets made in the step that uses them: the reference that the store is measured against.

The frozen teacher reads the batch's traces, its cache is evicted and rounded as the stores' were,
and nothing is read from the targets but token ids and statistics. With stores in float32, or
rounded alike here, the loss is that of the stored targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kava_core.eviction import CacheBatch, Targets
from kava_core.models.teacher_pass import TeacherPass
from kava_core.problems.traces import Trace
from kava_core.store import Codec, Record, TargetsStore, TargetTensors
from kava_core.store.codec import CODE_BITS, Encoded, dequantise, encode, encode_with


@dataclass(frozen=True)
class OnlineTargets:
    """What a targets store would hold for the traces of a batch.

    teacher: frozen, on its device. cache_codec: how the teacher's store keeps its caches, before
    eviction. cut: the eviction. codec: how the targets are kept. calibrated: any batch of the
    store, for the ranges that all its records share; None if every token has its own.
    """

    teacher: TeacherPass
    cache_codec: Codec
    cut: Callable[[CacheBatch], Targets]
    codec: Codec
    calibrated: dict[str, Encoded]

    @classmethod
    def like(
        cls,
        store: TargetsStore,
        teacher: TeacherPass,
        cache_codec: Codec,
        cut: Callable[[CacheBatch], Targets],
    ) -> OnlineTargets:
        """Those of `store`: the teacher and the settings must be the ones it was made with."""
        calibrated = {}
        if store.codec.calibrated:
            sample = store.batch([0])
            calibrated = {name: getattr(sample, name) for name in store.codec.calibrated}
        return cls(teacher, cache_codec, cut, store.codec, calibrated)

    @torch.no_grad()
    def __call__(self, records: Sequence[Record]) -> TargetTensors:
        """The targets of B records, in float32, on the teacher's device.

        The student's mixed precision is none of the teacher's.
        """
        device = next(self.teacher.model.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return self._make(records)

    def _make(self, records: Sequence[Record]) -> TargetTensors:
        cache = self.teacher(cast(Sequence[Trace], records))  # it needs their tokens only
        # Caches of floats are evicted in the dtype they are kept in, codes in float32.
        batch = CacheBatch.from_ragged(
            encode(cache.keys, self.cache_codec.keys).dequantise(),
            encode(cache.values, self.cache_codec.values).dequantise(),
            cache.importance,
            cache.offsets,
            [record.id for record in records],
            rotary=self.teacher.rotary,
            cot_start=[len(record.question_ids) for record in records],
        )
        targets = self.cut(batch)
        endpoint = encode(cache.endpoint, self.cache_codec.endpoint).dequantise()
        return TargetTensors(
            keys=self._kept("keys", targets.keys),
            values=self._kept("values", targets.values),
            endpoint=encode(endpoint, self.codec.endpoint).dequantise(dtype=torch.float32),
            slot_counts=targets.slot_counts,
            slot_positions=targets.slot_positions,
            slot_mask=targets.slot_positions >= 0,
        )

    def _kept(self, name: str, x: Tensor) -> Tensor:
        """x [B, L', H, M, D] after a trip through the targets' codec."""
        encoding, shared = getattr(self.codec, name), self.calibrated.get(name)
        if shared is None or shared.scale is None or shared.zero is None:
            return encode(x, encoding).dequantise(dtype=torch.float32)
        scale, zero = shared.scale.to(x.device), shared.zero.to(x.device)
        return dequantise(encode_with(x, scale, zero, CODE_BITS[encoding]), scale, zero)

"""Targets made in the step that uses them: the reference that the store is measured against.

The frozen teacher reads the batch's traces, its cache is evicted and rounded as the stores' were,
and nothing is read from the targets but token ids and statistics. With stores in float32, or
rounded alike here, the loss is that of the stored targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel

from kava_core.eviction import CacheBatch, Targets
from kava_core.models.loading import DTYPES, load_model
from kava_core.models.placing import place_frozen
from kava_core.models.teacher_pass import TeacherPass
from kava_core.record import Record
from kava_core.settings import Generate
from kava_core.store import Codec, TargetsStore, TargetTensors
from kava_core.store.codec import encode
from kava_core.targets.plan import Plan
from kava_core.targets.rounding import Rounding
from kava_core.targets.specs import store_codec, stored_settings


@dataclass(frozen=True)
class OnlineTargets:
    """What a targets store would hold for the traces of a batch.

    teacher: frozen, on its device. cache_codec: how the teacher's store keeps its caches, before
    eviction. cut: the eviction. rounding: how the targets are kept.
    """

    teacher: TeacherPass
    cache_codec: Codec
    cut: Callable[[CacheBatch], Targets]
    rounding: Rounding

    @classmethod
    def of(cls, store: TargetsStore, teacher: Path) -> Self:
        """Those of `store`, by the settings it names, from its teacher's weights in a folder.

        KavaError if the store does not say in words of this version how it was made.
        """
        dtype = DTYPES[stored_settings(store, Generate).model_dtype]
        return cls.of_model(store, place_frozen(load_model(str(teacher), dtype)))

    @classmethod
    def of_model(cls, store: TargetsStore, model: PreTrainedModel) -> Self:
        """Those of `store`, by its settings, but made by another model, on its device."""
        generate, plan = stored_settings(store, Generate), Plan.of_store(store)
        return cls(TeacherPass(model), store_codec(generate), plan.cut, Rounding.of(store))

    @torch.no_grad()
    def __call__(self, records: Sequence[Record]) -> TargetTensors:
        """The targets of B records, in float32, on the teacher's device.

        The student's mixed precision is none of the teacher's.
        """
        device = next(self.teacher.model.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return self._make(records)

    def _make(self, records: Sequence[Record]) -> TargetTensors:
        cache = self.teacher(records)
        # Caches of floats are evicted in the dtype they are kept in, codes in float32.
        batch = CacheBatch.of_records(
            encode(cache.keys, self.cache_codec.keys).dequantise(),
            encode(cache.values, self.cache_codec.values).dequantise(),
            cache.importance,
            cache.offsets,
            records,
            self.teacher.rotary,
        )
        targets = self.cut(batch)
        endpoint = encode(cache.endpoint, self.cache_codec.endpoint).dequantise()
        return TargetTensors(
            keys=self.rounding("keys", targets.keys),
            values=self.rounding("values", targets.values),
            endpoint=encode(endpoint, self.rounding.codec.endpoint).dequantise(dtype=torch.float32),
            slot_counts=targets.slot_counts,
            slot_positions=targets.slot_positions,
            slot_mask=targets.slot_positions >= 0,
        )


class JointTargets:
    """Targets of a student's own weights as they are in this step: it is its own teacher.

    store: whose settings say how targets are made. decoder: the student's; it reads without dropout
    and without gradient, and is left as it was.
    """

    def __init__(self, store: TargetsStore, decoder: PreTrainedModel) -> None:
        self.store, self.decoder = store, decoder
        self.online: OnlineTargets | None = None  # when the decoder is on its device

    def __call__(self, records: Sequence[Record]) -> TargetTensors:
        """The targets of B records, as those of `OnlineTargets`."""
        training = self.decoder.training
        try:
            self.decoder.eval()
            if self.online is None:
                self.online = OnlineTargets.of_model(self.store, self.decoder)
            return self.online(records)
        finally:
            self.decoder.train(training)

"""What all shards of a store share: written down once, by whoever makes the store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kava_core.artefacts import fingerprint
from kava_core.rotary import Rotary
from kava_core.store.codec import Ranges, calibration_tensors
from kava_core.store.layout import Codec, Geometry, Kind, RotaryPhase


@dataclass(frozen=True)
class StoreSpec:
    """A store before it has records; the same for every worker that writes a shard of it.

    geometry: its shapes; with slots it is a store of targets, without a teacher's.
    codec: how keys, values and endpoint states are written.
    phase: whether its keys are as they were before the rotary embedding, or after it.
    rotary: how the model turns its keys, for all its L layers; None without rotary embedding.
    ranges: needed by a codec in codes with granularity `channel` or `tensor`.
    """

    geometry: Geometry
    codec: Codec
    phase: RotaryPhase = "pre_rope"
    rotary: Rotary | None = None
    ranges: Ranges | None = None

    @property
    def kind(self) -> Kind:
        return "kv_targets" if self.geometry.slots else "teacher_kv"

    @cached_property
    def calibration(self) -> dict[str, Tensor]:
        """The tensors of the calibration file; KavaError if the codec needs other ranges."""
        return calibration_tensors(self.geometry, self.codec, self.ranges)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all of it: shards with different ones cannot make a store together."""
        return fingerprint(
            [
                self.geometry.model_dump(mode="json"),
                self.codec.model_dump(mode="json"),
                self.phase,
                None if self.rotary is None else self.rotary.to_json(),
                {name: x.flatten().tolist() for name, x in self.calibration.items()},
            ]
        )

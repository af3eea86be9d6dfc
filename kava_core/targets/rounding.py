"""What keeping numbers in a targets store does to them.

Targets made online are rounded as stored ones are. In quantisation-aware training the student's
keys and values are too before they are compared, so that it is not asked for what codes cannot say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.store import Codec, TargetsStore, fake_quantise
from kava_core.store.codec import CODE_BITS


@dataclass(frozen=True)
class Rounding:
    """The trip through a store's codec, with its bits, granularity and ranges.

    calibrated: `keys`, `values` → the scale and zero point that all records share, [1, L', H, 1, D]
    or [1, L', 1, 1, 1]; without an entry, every token has its own.
    """

    codec: Codec
    calibrated: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, store: TargetsStore) -> Self:
        """That of `store`."""
        codec = store.codec
        shared = store.batch([0]) if codec.calibrated else None
        calibrated = {}
        for name in codec.calibrated:
            encoded = getattr(shared, name)
            calibrated[name] = (encoded.scale.clone(), encoded.zero.clone())
        return cls(codec, calibrated)

    def __call__(self, name: str, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """x [B, len(rows), H, M, D], the `keys` or `values` of these rows, as the store gives them.

        rows: None for all of them, in order. The gradient passes straight through.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        encoding = getattr(self.codec, name)
        if name not in self.calibrated:
            return fake_quantise(x, encoding)
        scale, zero = (
            (part if rows is None else part[:, rows]).to(x.device) for part in self.calibrated[name]
        )
        return fake_quantise(x, encoding, scale, zero)


def fake_quantisation(store: TargetsStore) -> Rounding:
    """The rounding of `store`; KavaError if it keeps neither keys nor values in codes."""
    codec = store.codec
    if not {codec.keys, codec.values} & CODE_BITS.keys():
        raise KavaError(
            f"fake_quantise passes keys and values through the store's codes, but {store.path} "
            f"keeps keys in {codec.keys} and values in {codec.values}. Set evict.keys_bits or "
            "evict.values_bits to 8 or 4, or leave fake_quantise out."
        )
    return Rounding.of(store)

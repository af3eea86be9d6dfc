"""Random: an honest control that any scorer has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kava_core.errors import KavaError
from kava_core.eviction.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from kava_core.eviction.batch import CacheBatch


@dataclass(frozen=True)
class Random(Policy):
    """Tokens drawn without replacement, for every layer and head on its own.

    Drawn per head because the scorers it is compared with choose per head too; `crop` and `uniform`
    are the controls that keep the same tokens everywhere. A score is a hash of (seed, record id,
    layer of the model, head, token): it depends neither on the batch nor on the layers chosen.
    In *Random Attention* (arXiv 2609.03430) random selection rivals every scorer on reasoning.

    seed: an integer; another seed is another draw.
    """

    name = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise KavaError(f"expected `seed` to be an integer, found {self.seed!r}.")

    def score(self, batch: CacheBatch) -> Tensor:
        tokens = batch.token_indices
        seeds = batch.per_token([_record_seed(self.seed, name) for name in batch.ids])
        layers = tokens.new_tensor(batch.layers)[:, None]
        heads = tokens.new_tensor(range(batch.keys.shape[2]))
        place = (layers << 48) + (heads << 32)  # [L', H]
        place = place + tokens[:, None, None]  # [T, L', H]
        hashed = _mix(_mix(place) + seeds[:, None, None])
        return (hashed & 0xFFFFFF).float()  # 24 bits: what a float32 holds exactly


def _record_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _mix(value: Tensor) -> Tensor:
    """The SplitMix64 generator's step and finaliser (Steele et al., OOPSLA 2014), modulo 2⁶⁴."""
    value = value - 0x61C8864680B583EB
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)

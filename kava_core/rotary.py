"""Rotary position embedding as a pure tensor function, so that keys can be turned back and forth.

Su et al., *RoFormer*, arXiv 2104.09864, in the half-split layout of transformers: a rotated
dimension i is paired with i + R/2, where R is the number of rotated dimensions of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotation of every layer.

    inv_freq: [L, R/2] float64, angle per position; R/2 = 0 means the model does not rotate keys.
    scaling:  [L] float64, factor on cos and sin (YaRN and the like; 1 elsewhere).
    """

    inv_freq: Tensor
    scaling: Tensor

    def to_json(self) -> dict[str, list]:
        return {"inv_freq": self.inv_freq.tolist(), "scaling": self.scaling.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, list]) -> Rotary:
        return cls(
            torch.tensor(value["inv_freq"], dtype=torch.float64),
            torch.tensor(value["scaling"], dtype=torch.float64),
        )

    def layers(self, layers: list[int]) -> Rotary:
        """The rotation of the chosen layers only."""
        return Rotary(self.inv_freq[layers], self.scaling[layers])

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [...] → cos, sin, each [L, ..., R/2] float32.

        The angle is formed in float32, as the models do, so that it carries the same rounding.
        """
        layers, half = self.inv_freq.shape
        shape = (layers, *[1] * positions.ndim, half)
        inv_freq = self.inv_freq.to(positions.device, torch.float32).view(shape)
        scaling = self.scaling.to(positions.device, torch.float32).view(
            -1, *[1] * (positions.ndim + 1)
        )
        angle = positions[..., None].float() * inv_freq  # [L, ..., R/2]
        return angle.cos() * scaling, angle.sin() * scaling


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """keys [..., D] turned by cos, sin [..., R/2] (broadcast); dimensions past R stay."""
    return _turn(keys, cos, sin)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The exact inverse of `rotate`: R(θ)⁻¹ = R(−θ) / scaling²."""
    scale = cos.square() + sin.square()  # scaling², whatever the angle
    return _turn(keys, cos / scale, -sin / scale)


def _turn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    if half == 0:
        return keys
    cos, sin = cos.to(keys.dtype), sin.to(keys.dtype)
    first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

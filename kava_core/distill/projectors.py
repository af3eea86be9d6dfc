"""K/V projectors: from a student's basis to that of a teacher it did not come from.

Two models that compute alike may still write their keys and values in coordinates of their own.
While such a student is trained, a linear map per layer, which begins as the identity, stands
between its slots and the targets. It is trained with the student, lies in its checkpoints, and is
dropped when training is over: inference needs none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kava_core.distill.match import Match, cut_heads
from kava_core.models.latent import LatentReasoner, Reasoning


@dataclass
class ProjectedReasoning(Reasoning):
    """A reasoning with the student's slots in the teacher's basis, [B, len(layers), H, M, D]."""

    slot_keys: Tensor = field(kw_only=True)
    slot_values: Tensor = field(kw_only=True)


class Projectors(nn.Module):
    """x → x + x·W of a token's H·D keys, and of its values, for every layer that is taught.

    W is zero at first, so that the map is the identity to the last bit, and weight decay pulls it
    back there. keys, values: the W, [len(layers), H·D, H·D].
    """

    handle: RemovableHandle  # of the hook that calls it

    def __init__(self, match: Match, like: Tensor) -> None:
        super().__init__()
        self.match = match
        size = match.heads[0] * match.heads[1]
        self.keys = nn.Parameter(like.new_zeros(len(match.layers), size, size))
        self.values = nn.Parameter(torch.zeros_like(self.keys))

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values [B, len(layers), H, M, D] → the same shape."""
        return self._map(keys, self.keys), self._map(values, self.values)

    def _map(self, x: Tensor, change: Tensor) -> Tensor:
        # In float32 at least: under autocast the student's values come in half precision.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        whole = cut_heads(x, (1, self.match.heads[0] * self.match.heads[1]))[:, :, 0]
        whole = whole + whole @ change.to(x.dtype)  # [B, len(layers), M, H·D]
        return cut_heads(whole[:, :, None], self.match.heads)


def add_projectors(student: LatentReasoner, match: Match) -> None:
    """Give the student projectors to train: from now on its forward gives ProjectedReasoning.

    They become a part of the student, so that checkpoints hold them, and work inside its forward,
    where several processes look for what has a gradient.
    """
    projectors = Projectors(match, next(student.parameters()))
    student.add_module("projectors", projectors)
    projectors.handle = student.register_forward_hook(_project)


def drop_projectors(student: LatentReasoner) -> None:
    """Take the projectors off again: the student is what it would be without them."""
    cast(Any, student.projectors).handle.remove()
    del student.projectors


def _project(student: nn.Module, _: Any, reasoning: Reasoning) -> ProjectedReasoning:
    projectors = cast(Projectors, student.projectors)
    slots = projectors.match.slots(cast(LatentReasoner, student), reasoning)
    keys, values = projectors(*slots)
    return ProjectedReasoning(**vars(reasoning), slot_keys=keys, slot_values=values)

"""Draw the next tokens of many rows at once, each as if it were alone.

All that is summed is whole numbers: their sums are the same in whatever order a device adds them,
and so are a row's tokens, whoever shares the batch. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# The likeliest token's weight has so many bits, fewer where V of them would not have room in 62.
_BITS, _ROOM = 44, 62
_FIRST = (256, 8192)  # tokens that have `top_p` together in most rows: sorting all takes longer


class Sampled(Protocol):
    """A temperature of 0 takes the likeliest token; above, tokens are drawn from the likeliest that
    have `top_p` together, those as likely as the last of them included, by random numbers of the
    row's own."""

    temperature: float
    top_p: float
    generator: torch.Generator


def next_tokens(scores: Tensor, rows: Sequence[Sampled]) -> Tensor:
    """The next token of each row, [B], from scores [B, V] in float32, as the row asks.

    ArithmeticError if a row has no likeliest one.
    """
    if not bool(scores.amax(-1).isfinite().all()):
        raise ArithmeticError("the student's scores are no numbers: look at its weights")
    chosen = scores.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        asked = [(i, rows[i].temperature, rows[i].top_p, _number(rows[i].generator)) for i in drawn]
        numbers = torch.tensor(asked, dtype=torch.float64).to(scores.device)
        at, temperature, top_p, number = numbers.split(1, -1)
        index = at[:, 0].long()
        chosen[index] = _drawn(scores[index], temperature, top_p, number)
    return chosen


def _number(generator: torch.Generator) -> float:
    """In [0, 1)."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def _drawn(scores: Tensor, temperature: Tensor, top_p: Tensor, number: Tensor) -> Tensor:
    """The token of each row, [B], that the number in [0, 1) falls on; numbers are [B, 1]."""
    unit = 2.0 ** min(_BITS, _ROOM - scores.shape[-1].bit_length())
    weights = scores / temperature.to(scores.dtype)
    weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_().mul_(unit)
    whole = weights.long()
    least = _least(weights, whole.sum(-1, keepdim=True), top_p)
    below = whole.masked_fill_(~(weights >= least), 0).cumsum(-1)
    total = below[:, -1:]
    at = (number * total).long().clamp(max=total - 1)
    return torch.searchsorted(below, at, right=True)[:, 0]


def _least(weights: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """The least weight among the likeliest tokens that have `top_p` of the total, [B, 1]."""
    least = torch.zeros_like(weights[:, :1])
    wanted = top_p * total
    left = (top_p[:, 0] < 1).nonzero()[:, 0]
    for size in (*_FIRST, weights.shape[-1]):
        if not len(left):
            break
        top = weights[left].topk(min(size, weights.shape[-1])).values
        enough = top.long().cumsum(-1) >= wanted[left]
        least[left] = top.gather(-1, enough.int().argmax(-1, keepdim=True))
        left = left[~enough[:, -1]]
    return least

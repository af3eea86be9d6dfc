"""How many slots each layer gets."""

from __future__ import annotations

import math
from typing import Literal, get_args

from kava_core.errors import KavaError

BudgetShape = Literal["uniform", "pyramid"]


def make_budgets(shape: BudgetShape, n_layers: int, budget: int, beta: float = 20.0) -> list[int]:
    """Slots per layer: `n_layers` integers ≥ 1 whose sum is n_layers · budget.

    uniform: `budget` everywhere. pyramid: linear from the first layer down to the last, which gets
    about budget / beta (Cai et al., *PyramidKV*, arXiv 2406.02069: k_last = k/β, k_first = 2k −
    k_last).
    Raises KavaError for an unknown shape, a budget below 1 or a beta below 1.
    """
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise KavaError(f"expected `budget` to be an integer of at least 1, found {budget!r}.")
    if n_layers < 1:
        raise KavaError(f"expected at least one layer to give slots to, found {n_layers}.")
    if shape == "uniform":
        return [budget] * n_layers
    if shape == "pyramid":
        return _pyramid(n_layers, budget, beta)
    raise KavaError(
        f"expected `budget_shape` to be one of {', '.join(get_args(BudgetShape))}, found {shape!r}."
    )


def _pyramid(n_layers: int, budget: int, beta: float) -> list[int]:
    if not beta >= 1:
        raise KavaError(f"expected `beta` to be at least 1, found {beta!r}.")
    if n_layers == 1:
        return [budget]
    last = budget / beta
    first = 2 * budget - last
    line = [first - (first - last) * layer / (n_layers - 1) for layer in range(n_layers)]
    # Every layer keeps one slot; what lies above that is scaled back to the total.
    above = [max(slots - 1, 0.0) for slots in line]
    scale = n_layers * (budget - 1) / (sum(above) or 1)
    shares = [1 + slots * scale for slots in above]
    slots = [math.floor(share) for share in shares]
    missing = n_layers * budget - sum(slots)
    by_remainder = sorted(range(n_layers), key=lambda layer: slots[layer] - shares[layer])
    for layer in by_remainder[:missing]:
        slots[layer] += 1
    return slots

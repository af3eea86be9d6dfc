"""Which layers become targets, and which of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kava_core.errors import KavaError

Share = Literal["none", "selection", "merged"]
SHARES = ("none", "selection", "merged")


def parse_layers(setting: str | Mapping[str, int] | Sequence[int], n_layers: int) -> list[int]:
    """The layers a setting means, ascending, as indices from 0 into a model of `n_layers`.

    "all"; {"last": n}, the n deepest; {"every": n}, every n-th counted back from the deepest; or a
    list of indices. Raises KavaError naming the setting.
    """
    if setting == "all":
        return list(range(n_layers))
    if isinstance(setting, Mapping) and len(setting) == 1:
        ((word, count),) = setting.items()
        if word in ("last", "every"):
            if not _whole(count) or not 1 <= count <= n_layers:
                raise KavaError(
                    f"expected `layers: {word}` to be an integer from 1 to {n_layers}, the "
                    f"teacher's layers, found {count!r}."
                )
            if word == "last":
                return list(range(n_layers - count, n_layers))
            return list(range((n_layers - 1) % count, n_layers, count))
    if isinstance(setting, Sequence) and not isinstance(setting, str) and len(setting) > 0:
        for layer in setting:
            if not _whole(layer) or not 0 <= layer < n_layers:
                raise KavaError(
                    f"expected `layers` to hold integers from 0 to {n_layers - 1}, the teacher's "
                    f"layers, found {layer!r}."
                )
        if list(setting) != sorted(set(setting)):
            raise KavaError(
                f"expected `layers` to be ascending, each layer once, found {list(setting)}."
            )
        return list(setting)
    raise KavaError(
        "expected `layers` to be all, {last: n}, {every: n} or a list of layers, found "
        f"{setting!r}."
    )


def group_layers(n_layers: int, size: int) -> list[list[int]]:
    """Adjacent layers in groups of `size` (the deepest group may be smaller): [[0, 1], [2, 3], …].

    The indices count the chosen layers, not the model's.
    """
    if not _whole(size) or not 1 <= size <= n_layers:
        raise KavaError(
            f"expected groups of 1 to {n_layers} layers, as many as are chosen, found {size!r}."
        )
    return [list(range(i, min(i + size, n_layers))) for i in range(0, n_layers, size)]


def check_groups(
    share: str, groups: Sequence[Sequence[int]] | None, n_layers: int
) -> list[list[int]]:
    """The groups that choose slots together: one per layer when nothing is shared."""
    if share not in SHARES:
        raise KavaError(f"expected `share` to be one of {', '.join(SHARES)}, found {share!r}.")
    if share == "none":
        return [[layer] for layer in range(n_layers)]
    flat = [layer for group in groups or () for layer in group]
    if flat != list(range(n_layers)) or not all(groups or ()):
        raise KavaError(
            f"expected `share: {share}` to come with groups of adjacent layers that cover the "
            f"{n_layers} chosen layers in order, found {groups}."
        )
    return [list(group) for group in groups or ()]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

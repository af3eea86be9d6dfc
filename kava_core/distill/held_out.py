"""Training records that are never trained on, but measured while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence

from kava_core.errors import KavaError
from kava_core.settings import Training


def hold_out(sizes: Sequence[int], training: Training, path: str) -> tuple[list[int], range]:
    """Records per shard that are trained on, and the indices of those that are held out.

    sizes: records per shard; the last records are held out. path: of the settings, for messages.
    KavaError if less than a batch remains.
    """
    records = sum(sizes)
    left = records - (training.held_out.records if training.held_out else 0)
    if left < training.batch_size:
        raise KavaError(
            f"there are {max(left, 0)} training records, fewer than one batch of "
            f"{training.batch_size}. Lower {path}.batch_size"
            f"{f' or {path}.held_out.records' if training.held_out else ''}."
        )
    taught, rest = [], left
    for size in sizes:
        taught.append(min(size, rest))
        rest -= taught[-1]
    return [size for size in taught if size], range(left, records)

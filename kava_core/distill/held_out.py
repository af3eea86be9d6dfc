"""Which training records a run learns from, and which it is measured on while it goes on."""

from __future__ import annotations

from collections.abc import Sequence

from kava_core.errors import KavaError
from kava_core.settings import Training


def hold_out(sizes: Sequence[int], training: Training, path: str) -> tuple[list[int], range]:
    """Records per shard that are trained on, and the indices of those that are held out.

    sizes: records per shard; the first `training.records` are trained on, the last ones held out.
    path: of the settings, for messages. KavaError if less than a batch remains, or there are fewer
    than `training.records`.
    """
    records = sum(sizes)
    left = records - (training.held_out.records if training.held_out else 0)
    if training.records is not None and training.records > left:
        raise KavaError(
            f"{path}.records: expected at most the {max(left, 0)} training records that there are"
            f"{' beside those held out' if training.held_out else ''}, found {training.records}. "
            "Lower it."
        )
    rest = training.taught(records)
    if rest < training.batch_size:
        raise KavaError(
            f"there are {max(rest, 0)} training records, fewer than one batch of "
            f"{training.batch_size}. Lower {path}.batch_size"
            f"{f' or {path}.held_out.records' if training.held_out else ''}"
            f"{f', or raise {path}.records' if training.records else ''}."
        )
    taught = []
    for size in sizes:
        taught.append(min(size, rest))
        rest -= taught[-1]
    return [size for size in taught if size], range(left, records)

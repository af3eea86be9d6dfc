"""Training settings as the library takes them."""

from __future__ import annotations

from collections.abc import Sequence

from kava_core.distill.fit import FitSettings
from kava_core.errors import KavaError
from kava_core.settings import Cadence, Training


def fit_settings(training: Training, cadence: Cadence) -> FitSettings:
    """The part of `training` that `fit` needs."""
    return FitSettings(
        steps=training.steps,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup=training.warmup,
        max_grad_norm=training.max_grad_norm,
        precision=training.precision,
        log_every=cadence.log_every,
        save_every=cadence.save_every,
        seed=training.seed,
        evaluate_every=training.held_out.every if training.held_out else 0,
    )


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

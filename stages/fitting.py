"""Training settings as the library takes them."""

from __future__ import annotations

from kava_core.config import Training
from kava_core.distill.fit import FitSettings


def fit_settings(training: Training) -> FitSettings:
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
        log_every=training.log_every,
        save_every=training.save_every,
        seed=training.seed,
    )

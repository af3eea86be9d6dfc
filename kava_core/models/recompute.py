"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from kava_core.errors import KavaError


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Inside this context the layers keep their inputs only while they train; gradients stay.

    KavaError if the architecture cannot, or if it reads its own cache while it trains.
    """
    try:
        switch_recomputing(model, True)
    except ValueError:
        raise KavaError(
            f"{model.config.model_type} knows no gradient checkpointing. Set "
            "training.gradient_checkpointing to false."
        ) from None
    try:
        yield
    finally:
        switch_recomputing(model, False)


def switch_recomputing(model: PreTrainedModel, on: bool) -> None:
    """transformers' switch, which has another name from release to release."""
    name = "enable" if on else "disable"
    old = getattr(model, f"gradient_checkpointing_{name}")
    switch = getattr(model, f"activation_checkpointing_{name}", old)
    switch(*([{"use_reentrant": False}] if on else []))

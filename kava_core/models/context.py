"""How many positions a model has, and who needs more."""

from __future__ import annotations

from transformers import PreTrainedConfig

from kava_core.errors import KavaError


def context_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence a model of this configuration reads; None where it names no bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(
    config: PreTrainedConfig, needed: int, *, what: str, including: str, remedy: str
) -> None:
    """KavaError if `needed` positions are more than the model has.

    what: takes them; including: what else they hold; remedy: what to do. All for the message.
    """
    context = context_of(config)
    if context is not None and needed > context:
        raise KavaError(
            f"{what} takes {needed} positions with {including}, and the model's context is "
            f"{context}. {remedy}"
        )

"""How many positions a model has, how far back its layers look, and who needs more."""

from __future__ import annotations

from transformers import PreTrainedConfig

from kava_core.errors import KavaError


def context_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence a model of this configuration reads; None where it names no bound."""
    bound = getattr(config.get_text_config(), "max_position_embeddings", None)
    return bound if bound is not None and bound > 0 else None  # XLNet's is −1


def attention_windows(config: PreTrainedConfig) -> dict[int, int]:
    """layer → sliding window, for the layers that have one; KavaError on other attention kinds."""
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:
        raise no_decoder(config)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise KavaError(
            f"{config.model_type} has layers of kind {', '.join(unknown)}, which keep no key and "
            "value per token; expected full or sliding attention."
        )
    return {i: window for i, kind in enumerate(kinds) if kind == "sliding_attention" and window}


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


def no_decoder(config: PreTrainedConfig) -> KavaError:
    """The error of a configuration that does not name what every decoder has."""
    return KavaError(
        f"the configuration of {config.model_type} names no layers with heads of attention "
        "(num_hidden_layers, num_attention_heads, hidden_size). Choose a causal language model."
    )

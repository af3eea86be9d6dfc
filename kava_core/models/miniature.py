"""A small random model of the kind that a configuration describes, to prove things on in a second.

What decides whether an architecture can be recorded and driven is kept: the kinds of layers, head
sizes, rotation, sharing, windows. What only costs time is cut: layers of a kind that is there
already, width, vocabulary, experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.loading import attention_implementation, cache_shape, text_model

VOCABULARY = 64
WIDTH = 64  # of feed-forward layers
LAYERS = 2  # at least
MOST_LAYERS = 8
HEADS = 4  # of queries, at most; half as many of keys and values where these are shared
EXPERTS = 4
LARGEST = 100_000_000  # parameters

_INNER = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner",
    "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "shared_intermediate_size",
    "dense_intermediate_size", "expert_ffn_hidden_size",
)  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token")
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def miniature(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal LM of the class of `config`, with few layers and random weights in float32, in
    evaluation mode; of a model of text and other things its text model.

    KavaError if transformers has no causal LM for `config`, or it cannot be made small.
    """
    torch.manual_seed(seed)
    try:
        small = _small(config)
        attention = attention_implementation(small)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(
                copy.deepcopy(small), attn_implementation=attention, trust_remote_code=False
            ).num_parameters()
        if size > LARGEST:
            raise KavaError(
                f"a small model of {config.model_type} still has {size:,} parameters; it cannot be "
                "tried in a second."
            )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            small, attn_implementation=attention, trust_remote_code=False
        )
    except KavaError:
        raise
    except Exception as error:  # of a configuration that is none of a causal language model
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise KavaError(
            f"transformers builds no causal language model from a configuration of "
            f"{config.model_type}: {why:.200}."
        ) from None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # uneven attention: what is wrong must show
                parameter.normal_(0, min(parameter.shape[-2:]) ** -0.5)
    return text_model(model.float().eval())


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    _shrink(text)
    for part in small.sub_configs:
        other = getattr(small, part, None)
        if isinstance(other, PreTrainedConfig) and other is not text:
            _cut_layers(other)
    for name, value in _TOKENS.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, value)
    return small


def _shrink(config: PreTrainedConfig) -> None:
    _cut_layers(config)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if isinstance(heads, int) and isinstance(width, int):
        kv_heads, size = cache_shape(config)
        fewer_kv = min(kv_heads, HEADS if kv_heads == heads else HEADS // 2)
        fewer = fewer_kv if kv_heads == heads else 2 * fewer_kv
        for name, value in _plain(config).items():
            if value == width and name.endswith(("size", "dim", "width", "embd", "d_model")):
                setattr(config, name, fewer * size)
        config.num_attention_heads = fewer
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = fewer_kv
    for names, most in (
        (_INNER, WIDTH), (_EXPERTS, EXPERTS), (_CHOSEN, 2), (_VOCABULARIES, VOCABULARY),
        (("n_group", "topk_group"), 1),
    ):  # fmt: skip
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(config, name, min(value, most))
            elif isinstance(value, list) and all(isinstance(x, int) for x in value):
                setattr(config, name, [min(x, most) for x in value])
    for name, value in _TOKENS.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)


def _cut_layers(config: PreTrainedConfig) -> None:
    """Keep the first layer of every kind there is, in their order."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= LAYERS:
        return
    by_layer = {
        name: value
        for name, value in _plain(config).items()
        if isinstance(value, list) and len(value) == layers
    }
    own = layers - getattr(config, "num_kv_shared_layers", 0)  # the others share their cache
    kinds: dict[str, int] = {}
    for i in range(layers):
        kinds.setdefault(repr([i < own, *(value[i] for value in by_layer.values())]), i)
    chosen = sorted(kinds.values())[:MOST_LAYERS]
    if len(chosen) < LAYERS:
        chosen = list(range(LAYERS))
    config.num_hidden_layers = len(chosen)
    for name, value in by_layer.items():
        setattr(config, name, [value[i] for i in chosen])
    if own < layers:
        config.num_kv_shared_layers = sum(i >= own for i in chosen)
    for name in _FIRST_LAYERS:
        first = getattr(config, name, None)
        if isinstance(first, int):
            setattr(config, name, min(first, len(chosen) - 1))


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}

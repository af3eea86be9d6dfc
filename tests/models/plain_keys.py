"""Keys before rotation, taken where the model itself makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

KV_HEADS = 2  # of every tiny model with rotation


@contextmanager
def plain_keys(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """layer → keys [B, S, H, D] of the latest call of `model`: its key projection's, or key norm's.

    For models whose layers have a `self_attn.k_proj` of their own.
    """
    keys: dict[int, Tensor] = {}

    def keep(index: int, output: Tensor) -> None:
        if output.ndim == 3:  # [B, S, H·D]
            output = output.unflatten(-1, (KV_HEADS, -1))
        keys[index] = output.transpose(1, 2) if output.shape[1] == KV_HEADS else output

    def hook(index: int, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _module, _args, out: keep(index, out))

    handles = []
    for index, layer in enumerate(model.base_model.layers):
        attention = layer.self_attn
        handles.append(hook(index, getattr(attention, "k_norm", attention.k_proj)))
    try:
        yield keys
    finally:
        for handle in handles:
            handle.remove()

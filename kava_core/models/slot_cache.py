"""A decoder that reads from a cache in which every layer and head holds other tokens.

Eviction keeps different tokens per layer and head, and with budgets per layer not even equally
many. A transformers model builds one mask for all layers from the columns of the batch. Here each
cached key has a *position*, its token's place in the original sequence, and attention goes by
positions alone: a query sees the keys at its own position and before it, and in a layer with a
sliding window only those less than a window away. A place without a token stands at `ABSENT`,
which no query has reached. Padding, slots that were not filled and evicted tokens are therefore one
and the same thing, whatever the columns are.

The attention function delegates to the model's own (`kava_core.models.capture`). No mask function
is registered under its name on purpose: transformers then builds no mask, and the one made here is
the only one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kava_core.models.capture import attending, register_attention
from kava_core.models.context import attention_windows, context_of

ABSENT = 1 << 40  # a position after all positions


class SlotCache:
    """Keys and values per layer, [B, H, S_l, D] post-RoPE, and where their tokens stand.

    positions: per layer [B, H, S_l] int64, or [B, 1, S_l] where all heads hold the same tokens.
    S_l may differ from layer to layer.
    """

    def __init__(
        self,
        keys: Sequence[Tensor] = (),
        values: Sequence[Tensor] = (),
        positions: Sequence[Tensor] = (),
    ) -> None:
        self.cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.cache.update(key, value, layer)
        self.positions = list(positions)

    @property
    def keys(self) -> list[Tensor]:
        return [layer.keys for layer in self._layers]

    @property
    def values(self) -> list[Tensor]:
        return [layer.values for layer in self._layers]

    def append(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add keys, values [B, H, N, D] at positions [B, H, N] to one layer, wherever that is."""
        device = self.keys[layer].device
        self.cache.update(keys.to(device), values.to(device), layer)
        self.positions[layer] = torch.cat(
            (self.positions[layer].expand(-1, positions.shape[1], -1), positions), dim=-1
        )

    def fork(self) -> SlotCache:
        """A cache that can be extended without this one noticing; its tensors are shared."""
        fork = SlotCache(positions=self.positions)
        fork.cache.layers = [copy.copy(layer) for layer in self._layers]
        return fork

    def columns(self, first: int, last: int) -> SlotCache:
        """A copy that holds columns first … last − 1 of every layer."""
        cut = slice(first, last)
        return SlotCache(
            [key[:, :, cut] for key in self.keys],
            [value[:, :, cut] for value in self.values],
            [places[:, :, cut] for places in self.positions],
        )

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers


class SlotDecoder:
    """A causal LM, in evaluation mode, over `SlotCache`s."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self.windows = attention_windows(self.config)
        self.context = context_of(self.config)

    @torch.no_grad()
    def feed(self, cache: SlotCache, ids: Tensor, positions: Tensor, logits: int) -> Tensor:
        """Run the model over ids [B, N] and extend `cache` by them.

        positions: [B, N] int64; a token at ABSENT is padding: nothing sees it, and its own output
        means nothing. Returns the logits [B, n, V] of the last n = `logits` columns.
        """
        layers = range(self.config.num_hidden_layers)
        before = cache.positions or [positions[:, None, :0]] * len(layers)
        cache.positions = [
            torch.cat((places, positions[:, None].expand(-1, places.shape[1], -1)), dim=-1)
            for places in before
        ]
        token = _active.set(_Places(positions, cache.positions, self.windows))
        try:
            with attending(self.config, "kava_slots", to="read from a compressed cache"):
                output = self.model(
                    inputs_embeds=self.model.get_input_embeddings()(ids),
                    position_ids=positions.masked_fill(positions == ABSENT, 0),
                    past_key_values=cache.cache,
                    use_cache=True,
                    logits_to_keep=logits,
                )
        finally:
            _active.reset(token)
        return output.logits[:, -logits:]

    def greedy(
        self, cache: SlotCache, logits: Tensor, start: Tensor, *, limit: int, eos: int
    ) -> Tensor:
        """The most likely continuation, [B, ≤ limit] ids; rows that ended are filled with `eos`.

        logits: [B, V] of the first token; start: [B], its position. `cache` is extended. A row
        ends at `eos`, after `limit` tokens, and where the model's context does.
        """
        written: list[Tensor] = []
        finished = torch.zeros_like(start, dtype=torch.bool)
        while True:
            chosen = logits.float().argmax(-1).masked_fill(finished, eos)
            written.append(chosen)
            positions = start + len(written) - 1
            finished |= chosen == eos
            if self.context is not None:
                finished |= positions >= self.context
                positions = positions.clamp(max=self.context - 1)
            if len(written) == limit or bool(finished.all()):
                return torch.stack(written, dim=1)
            logits = self.feed(cache, chosen[:, None], positions[:, None], 1)[:, -1]


@dataclass(frozen=True)
class _Places:
    """Where queries [B, N] and each layer's keys [B, H or 1, S_l] stand; layer → sliding window."""

    queries: Tensor
    keys: list[Tensor]
    windows: dict[int, int]

    def mask(self, layer: int, query: Tensor) -> Tensor:
        """[B, H_q or 1, N, S_l], 0 where query [B, H_q, N, D] may look and very low elsewhere.

        Not −∞: a row that may look nowhere must stay a number, even if nobody reads it.
        """
        distance = self.queries[:, None, :, None] - self.keys[layer][:, :, None, :]
        seen = distance >= 0
        if layer in self.windows:
            seen &= distance < self.windows[layer]
        if seen.shape[1] > 1:  # query heads of a group lie side by side
            seen = seen.repeat_interleave(query.shape[1] // seen.shape[1], dim=1)
        seen = seen.to(query.device)
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        return mask.masked_fill_(~seen, torch.finfo(query.dtype).min)


_active: ContextVar[_Places] = ContextVar("places")


def _own_mask(layer: int, query: Tensor) -> Tensor:
    return _active.get().mask(layer, query)


register_attention("kava_slots", _own_mask)

"""Continuous batching: answers that are being written together, joined and left at any token.

A row that comes is thought about with those that come with it, then joins the others; a row that
has ended leaves. Masks and positions are explicit, so the company changes no token: each row is
fed what `LatentReasoner.generate` feeds it alone. Shapes: B rows, S columns fed so far, E hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from kava_core.models.batching import pad
from kava_core.models.latent import LatentReasoner
from kava_core.models.thinking import State, think
from kava_core.serving.sampling import Sampled, next_tokens


class Row(Sampled, Protocol):
    """ids: the question's."""

    ids: list[int]


class Batch:
    """Rows of one system, each somewhere in its answer."""

    def __init__(self, system: LatentReasoner) -> None:
        self.system = system
        self.rows: list[Row] = []
        self._state: State | None = None
        self._last: Tensor | None = None  # [B], the tokens that are still to be fed

    def __len__(self) -> int:
        return len(self.rows)

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> list[int]:
        """Think about the questions of new rows; gives the first token of each."""
        system, config = self.system, self.system.config
        ids, mask = (x.to(system.device) for x in pad([row.ids for row in rows], "left"))
        thought = think(system.decoder, system, config, ids, mask)
        prompt = torch.tensor(config.answer_prompt_ids, dtype=torch.long, device=system.device)
        tail = system.get_input_embeddings()(prompt).expand(len(rows), -1, -1)
        if config.latents:
            tail = torch.cat((system.eot.expand(len(rows), 1, -1), tail), 1)
        ones = mask.new_ones(tail.shape[1])
        chosen = self._feed(
            thought.state,
            torch.cat((thought.embeds, tail), 1),
            torch.cat((thought.mask, ones.expand(len(rows), -1)), 1),
            torch.cat((thought.steps, ones)),
            rows,
        )
        state = thought.state
        self._state = state if self._state is None else joined(self._state, state)
        self._last = chosen if self._last is None else torch.cat((self._last, chosen))
        self.rows += rows
        return cast(list[int], chosen.tolist())

    @torch.inference_mode()
    def step(self) -> list[int]:
        """One decoder call: the next token of every row."""
        assert self._state is not None and self._last is not None, "nobody was admitted"
        embeds = self.system.get_input_embeddings()(self._last[:, None])
        ones = torch.ones_like(self._last)[:, None]
        self._last = self._feed(self._state, embeds, ones, None, self.rows)
        return cast(list[int], self._last.tolist())

    @torch.inference_mode()
    def keep(self, stay: Sequence[bool]) -> None:
        """Let go of all rows but those marked."""
        if all(stay):
            return
        if not any(stay):
            self.clear()
            return
        assert self._state is not None and self._last is not None
        marked = torch.tensor(stay, device=self._last.device)
        self._state.keep(marked)
        self._last = self._last[marked]
        self.rows = [row for row, stays in zip(self.rows, stay, strict=True) if stays]
        # Columns that only those who left had filled.
        first = int(self._state.mask.any(0).int().argmax())
        _drop_columns(self._state, first)

    def clear(self) -> None:
        self.rows, self._state, self._last = [], None, None

    def _feed(
        self, state: State, embeds: Tensor, mask: Tensor, steps: Tensor | None, rows: Sequence[Row]
    ) -> Tensor:
        """Advance the decoder; the next token of each row, [B]."""
        output = self.system.decoder(
            inputs_embeds=embeds, logits_to_keep=1, **state.advance(mask, steps)
        )
        return next_tokens(output.logits[:, -1].float(), rows)


def joined(first: State, second: State) -> State:
    """The rows of two states in one: the shorter one is padded on its left."""
    width = max(first.mask.shape[1], second.mask.shape[1])
    one, other = _widened(first, width), _widened(second, width)
    state = one.fork()
    state.mask = torch.cat((one.mask, other.mask))
    state.positions = torch.cat((one.positions, other.positions))
    for layer, its, theirs in zip(state.layers, one.layers, other.layers, strict=True):
        layer.keys = torch.cat((its.keys, theirs.keys))
        layer.values = torch.cat((its.values, theirs.values))
    return state


def _widened(state: State, width: int) -> State:
    """The state with masked columns before its own, up to `width` columns."""
    missing = width - state.mask.shape[1]
    if not missing:
        return state
    wide = state.fork()
    wide.mask, wide.positions = (padded(x, (missing, 0)) for x in (state.mask, state.positions))
    for layer in wide.layers:
        layer.keys, layer.values = (
            padded(x, (0, 0, missing, 0)) for x in (layer.keys, layer.values)
        )
    return wide


def _drop_columns(state: State, count: int) -> None:
    """Forget the first columns, which are masked in every row."""
    state.mask, state.positions = state.mask[:, count:], state.positions[:, count:]
    for layer in state.layers:
        layer.keys, layer.values = layer.keys[:, :, count:], layer.values[:, :, count:]

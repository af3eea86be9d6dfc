"""What a student is compared with: layers, levels and heads of a targets store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner, Reasoning
from kava_core.models.loading import cache_shape
from kava_core.store import TargetsStore


@dataclass(frozen=True)
class Match:
    """Which parts of a student are compared with which parts of the targets, and how.

    layers, rows: equally long; layer layers[i] of the student is taught by row rows[i] of the
    store. Where layers share a merged cache, or the student is deeper than the teacher, one row
    teaches several.
    own_levels, levels: equally long; level own_levels[i] of the student's hidden states is taught
    by level levels[i] of the teacher's. A last level is normed, and the others are not: one is
    compared with the other nowhere.
    heads: H and D of the targets; the student's heads are cut anew where they are others.
    """

    layers: list[int]
    rows: list[int]
    phase: str
    own_levels: list[int]
    levels: list[int]
    heads: tuple[int, int]

    @classmethod
    def of(cls, store: TargetsStore, layer_map: Sequence[int] | None = None) -> Self:
        """layer_map: the teacher's layer for each of the student's; None for the same layers."""
        geometry = store.geometry
        layer_map = range(geometry.model_layers) if layer_map is None else layer_map
        taught = [i for i, layer in enumerate(layer_map) if layer in store.layer_map]
        levels = [0, *(layer + 1 for layer in layer_map)]
        alike = [
            own
            for own, level in enumerate(levels)
            if (own == len(layer_map)) == (level == geometry.model_layers)
        ]
        return cls(
            layers=taught,
            rows=[store.layer_map[layer_map[i]] for i in taught],
            phase=store.manifest.rotary.phase,
            own_levels=alike,
            levels=[levels[own] for own in alike],
            heads=(geometry.kv_heads, geometry.head_dim),
        )

    @classmethod
    def between(
        cls,
        student: LatentReasoner,
        store: TargetsStore,
        layer_map: str | Sequence[int] = "uniform",
        *,
        kv: bool = True,
        codi: bool = True,
    ) -> Self:
        """The match of a student with a store, as `choose_layers` takes `layer_map`.

        kv, codi: whether slots and endpoint are compared at all.

        KavaError naming both values where they cannot be: other numbers of latents and slots, of
        numbers in a key (H·D), or of numbers in a hidden state; no layer in common.
        """
        geometry, config = store.geometry, student.decoder.config.get_text_config()
        if student.config.latents != geometry.slots:
            raise KavaError(
                f"the student reasons in {student.config.latents} latents, and {store.path} has "
                f"{geometry.slots} slots per layer and head. Distil it again from this store."
            )
        theirs, ours = (geometry.kv_heads, geometry.head_dim), cache_shape(config)
        if theirs[0] * theirs[1] != ours[0] * ours[1]:
            raise KavaError(
                f"{store.path} has keys of {_product(theirs)} numbers (heads × head dim), and the "
                f"student's have {_product(ours)}: they must be as many. Choose a student of the "
                "same width of keys and values."
            )
        if codi and config.hidden_size != geometry.hidden_size:
            raise KavaError(
                f"alpha_codi compares hidden states: the teacher's have {geometry.hidden_size} "
                f"numbers, the student's {config.hidden_size}. Set alpha_codi to 0."
            )
        chosen = choose_layers(layer_map, config.num_hidden_layers, geometry.model_layers)
        match = cls.of(store, chosen)
        if kv and not match.layers:
            raise KavaError(
                f"the student's layers belong to the teacher's layers {chosen}, and {store.path} "
                f"keeps targets of layers {sorted(store.layer_map)} only. Change layer_map or "
                "evict.layers."
            )
        if codi and match.levels == [0]:
            raise KavaError(
                f"the student's layers belong to the teacher's layers {chosen}, and a last layer's "
                "hidden states are normed while the others' are not: alpha_codi has none to "
                f"compare. End layer_map in {geometry.model_layers - 1}, or set alpha_codi to 0."
            )
        return match

    def slots(self, student: LatentReasoner, reasoning: Reasoning) -> tuple[Tensor, Tensor]:
        """The student's keys and values where targets stand, [B, len(layers), H, M, D] each."""
        keys = picked(student.slot_keys(reasoning, self.phase), self.layers)
        values = picked(torch.stack(reasoning.values, dim=1), self.layers)
        return cut_heads(keys, self.heads), cut_heads(values, self.heads)


def choose_layers(
    layer_map: str | Sequence[int], student_layers: int, teacher_layers: int
) -> list[int]:
    """The teacher's layer for each of the student's layers.

    `uniform`: layer i of L_s belongs to the teacher's layer i·(L_t − 1)/(L_s − 1), rounded half up,
    which keeps both ends; a student of one layer belongs to the last. Or those layers themselves.
    KavaError if they are not one per student layer, or not layers of the teacher.
    """
    if layer_map == "uniform":
        if student_layers == 1:
            return [teacher_layers - 1]
        steps = student_layers - 1
        return [(2 * i * (teacher_layers - 1) + steps) // (2 * steps) for i in range(steps + 1)]
    chosen = [int(layer) for layer in layer_map]
    if len(chosen) != student_layers:
        raise KavaError(
            f"layer_map {chosen} names {len(chosen)} layers, and the student has {student_layers}. "
            "Name one layer of the teacher for each layer of the student."
        )
    if not all(0 <= layer < teacher_layers for layer in chosen):
        raise KavaError(
            f"layer_map {chosen} names layers that the teacher does not have. Its "
            f"{teacher_layers} layers are numbered from 0."
        )
    return chosen


def cut_heads(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """x [..., H', M, D'] → [..., H, M, D] for heads = (H, D): each token's H'·D' numbers, in their
    order, cut into other heads."""
    if (x.shape[-3], x.shape[-1]) == heads:
        return x
    return x.transpose(-3, -2).flatten(-2).unflatten(-1, heads).transpose(-3, -2)


def picked(x: Tensor, places: Sequence[int]) -> Tensor:
    """x[:, places]; x itself where these are all, in order."""
    return x if list(places) == list(range(x.shape[1])) else x[:, places]


def _product(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]} = {shape[0] * shape[1]}"

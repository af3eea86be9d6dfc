"""The terms of a loss: what is measured on a batch, by name, and added up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kava_core.distill.losses import chain_loss
from kava_core.distill.match import Match, picked
from kava_core.distill.objective import Objective
from kava_core.distill.projectors import ProjectedReasoning
from kava_core.models.latent import LatentReasoner
from kava_core.store.codec import EncodedTensor
from kava_core.targets.online import JointTargets, OnlineTargets
from kava_core.targets.rounding import Rounding

Batch = dict[str, Any]
# Maps a model and a batch to named weighted terms, each a scalar; their sum is minimised.
Terms = Callable[[nn.Module, Batch], dict[str, Tensor]]


def chain_terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The teacher's: CE(C, A-prompt, A | Q) of a `ChainDataset` batch, the mean over records."""
    return {"chain": chain_loss(model, batch["input_ids"], batch["mask"], batch["taught"])}


def student_terms(
    objective: Objective,
    match: Match | None,
    online: OnlineTargets | JointTargets | None = None,
    rounding: Rounding | None = None,
    cut: Callable[[Batch], Batch] | None = None,
) -> Terms:
    """A student's, weighted, ready for `fit`; match None means there are no targets.

    online: makes the targets from the batch's `records`; None takes what is stored, its `targets`
    or its `endpoint`.
    rounding: what the student's keys and values go through before they are compared. cut: what
    becomes of a batch before it is taught, in a curriculum.
    """

    def terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        batch = cut(batch) if cut else batch
        reasoning = model(
            batch["question_ids"],
            batch["question_mask"],
            batch["answer_ids"],
            batch["answer_mask"],
            batch.get("chain_ids"),
            batch.get("chain_mask"),
            batch.get("prompt_lengths"),
            objective.alpha_readout > 0,
            batch.get("latents"),
        )
        if match is None:
            return objective.weighted(reasoning, batch, None, None)
        wanted = {**batch, **_compared(objective, match, batch, online)}
        if objective.alpha_codi:
            ends = picked(reasoning.endpoint, match.own_levels)
            reasoning = replace(reasoning, endpoint=ends)
        if not objective.alpha_kv:
            return objective.weighted(reasoning, wanted, None, None)
        if isinstance(reasoning, ProjectedReasoning):
            keys, values = reasoning.slot_keys, reasoning.slot_values
        else:
            student = cast(LatentReasoner, getattr(model, "module", model))
            keys, values = match.slots(student, reasoning)
        if rounding is not None:
            keys = rounding("keys", keys, match.rows)
            values = rounding("values", values, match.rows)
        return objective.weighted(reasoning, wanted, keys, values)

    return terms


def _compared(
    objective: Objective,
    match: Match,
    batch: Batch,
    online: OnlineTargets | JointTargets | None,
) -> Batch:
    """What the terms of the objective compare with, worked out; nothing that none of them reads."""
    if not (objective.alpha_kv or objective.alpha_codi or objective.alpha_readout):
        return {}
    if not online and "targets" not in batch:
        return {"endpoint": picked(_numbers(batch["endpoint"]), match.levels)}
    targets = online(batch["records"]) if online else batch["targets"]
    found: Batch = {}
    if objective.alpha_kv:
        for name in ("keys", "values"):
            found[name] = picked(_numbers(getattr(targets, name)), match.rows)
        found["slot_mask"] = picked(targets.slot_positions >= 0, match.rows)
    if objective.alpha_codi:
        found["endpoint"] = picked(_numbers(targets.endpoint), match.levels)
    if objective.alpha_readout:
        places = targets.slot_positions[:, 0, 0].long()  # of all layers and heads
        found["slot_ids"] = batch["cot_ids"].gather(1, places.clamp(min=0))
        found["slot_filled"] = (places >= 0).long()
    return found


def _numbers(x: Tensor | EncodedTensor) -> Tensor:
    return x if isinstance(x, Tensor) else x.dequantise(dtype=torch.float32)

"""The terms of a loss: what is measured on a batch, by name, and added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from kava_core.distill.losses import chain_loss
from kava_core.distill.match import Match
from kava_core.distill.objective import Objective
from kava_core.distill.projectors import ProjectedReasoning
from kava_core.models.latent import LatentReasoner
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

    online: makes the targets from the batch's `records`; None takes its stored `targets`.
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
        taught = objective.alpha_kv or objective.alpha_codi or objective.alpha_readout
        if match is None or not taught:
            return objective.weighted(reasoning, batch, None, None)
        targets = online(batch["records"]) if online else batch["targets"].dequantise()
        wanted = {
            **batch,
            "keys": targets.keys[:, match.rows],
            "values": targets.values[:, match.rows],
            "slot_mask": targets.slot_mask[:, match.rows],
            "endpoint": targets.endpoint[:, match.levels],
        }
        if objective.alpha_readout:
            places = targets.slot_positions[:, 0, 0].long()  # of all layers and heads
            wanted["slot_ids"] = batch["cot_ids"].gather(1, places.clamp(min=0))
            wanted["slot_filled"] = (places >= 0).long()
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

"""One student: the targets and layers it is taught by, its loss, and its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from kava_core.distill.fit import Terms
from kava_core.distill.match import Match
from kava_core.distill.objective import Objective
from kava_core.distill.projectors import ProjectedReasoning
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.store import TargetsStore
from kava_core.targets.online import OnlineTargets
from kava_core.targets.rounding import Rounding


def objective_of(
    store: TargetsStore | None,
    *,
    alpha_kv: float,
    alpha_codi: float,
    w_cot: float,
    kv_distance: str,
    kv_std: bool,
    codi_distance: str,
    codi_std: bool,
    match: Match | None = None,
) -> Objective:
    """The objective with the statistics of the whole store, never of a batch.

    match: of the student with the store; None for one that has the teacher's layers.
    """
    if store is None:
        return Objective(0.0, 0.0, w_cot, kv_distance, codi_distance)
    statistics, match = store.manifest.statistics, match or Match.of(store)
    return Objective(
        alpha_kv,
        alpha_codi,
        w_cot,
        kv_distance,
        codi_distance,
        keys_std=_std(statistics.keys_std, match.rows) if kv_std else None,
        values_std=_std(statistics.values_std, match.rows) if kv_std else None,
        endpoint_std=_std(statistics.endpoint_std, match.levels) if codi_std else None,
    )


def student_terms(
    objective: Objective,
    match: Match | None,
    online: OnlineTargets | None = None,
    rounding: Rounding | None = None,
) -> Terms:
    """The weighted terms of a batch, ready for `fit`; match None means there are no targets.

    online: makes the targets from the batch's `records`; None takes its stored `targets`.
    rounding: what the student's keys and values go through before they are compared.
    """

    def terms(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        reasoning = model(
            batch["question_ids"],
            batch["question_mask"],
            batch["answer_ids"],
            batch["answer_mask"],
            batch.get("chain_ids"),
            batch.get("chain_mask"),
            batch.get("prompt_lengths"),
        )
        if match is None or not (objective.alpha_kv or objective.alpha_codi):
            return objective.weighted(reasoning, batch, None, None)
        targets = online(batch["records"]) if online else batch["targets"].dequantise()
        wanted = {
            **batch,
            "keys": targets.keys[:, match.rows],
            "values": targets.values[:, match.rows],
            "slot_mask": targets.slot_mask[:, match.rows],
            "endpoint": targets.endpoint[:, match.levels],
        }
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


def add_lora(
    student: LatentReasoner,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str],
    seed: int,
) -> LoraModel:
    """Freeze the decoder and put adapters on its projections; latents and projection stay free.

    seed: of the adapters' first weights. Call `merge_lora` with the result when training is over.
    KavaError if no module has such a name.
    """
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LoraModel(student.decoder, config, "default")
    except ValueError as error:
        raise KavaError(
            f"training.lora.targets {list(targets)} fit no module of the decoder: {error}"
        ) from None


def merge_lora(student: LatentReasoner, adapters: LoraModel) -> None:
    """Fold the adapters into the decoder's weights."""
    student.decoder = cast(PreTrainedModel, adapters.merge_and_unload())


def _std(values: Sequence[float], rows: Sequence[int]) -> Tensor:
    # A row without any spread (a single record, a constant) is not scaled.
    return torch.tensor([values[row] or 1.0 for row in rows])

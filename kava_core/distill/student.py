"""One student: the targets and layers it is taught by, its loss, and its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from kava_core.distill.fit import Terms
from kava_core.distill.objective import Objective
from kava_core.distill.online import OnlineTargets
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.store import TargetsStore


@dataclass(frozen=True)
class Match:
    """Which student layers are compared with which rows of the targets, and in which phase.

    layers, rows: equally long; layer layers[i] of the student is taught by row rows[i] of the
    store. Where layers share a merged cache, one row teaches several.
    """

    layers: list[int]
    rows: list[int]
    phase: str

    @classmethod
    def of(cls, store: TargetsStore) -> Match:
        layers = sorted(store.layer_map)
        return cls(layers, [store.layer_map[i] for i in layers], store.manifest.rotary.phase)


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
) -> Objective:
    """The objective with the statistics of the whole store, never of a batch."""
    if store is None:
        return Objective(0.0, 0.0, w_cot, kv_distance, codi_distance)
    statistics, rows = store.manifest.statistics, Match.of(store).rows
    return Objective(
        alpha_kv,
        alpha_codi,
        w_cot,
        kv_distance,
        codi_distance,
        keys_std=_std(statistics.keys_std, rows) if kv_std else None,
        values_std=_std(statistics.values_std, rows) if kv_std else None,
        endpoint_std=_std(statistics.endpoint_std) if codi_std else None,
    )


def student_terms(
    objective: Objective, match: Match | None, online: OnlineTargets | None = None
) -> Terms:
    """The weighted terms of a batch, ready for `fit`; match None means there are no targets.

    online: makes the targets from the batch's `records`; None takes its stored `targets`.
    """

    def terms(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        reasoning = model(
            batch["question_ids"],
            batch["question_mask"],
            batch["answer_ids"],
            batch["answer_mask"],
            batch.get("chain_ids"),
            batch.get("chain_mask"),
        )
        if match is None or not (objective.alpha_kv or objective.alpha_codi):
            return objective.weighted(reasoning, batch, None, None)
        student = cast(LatentReasoner, getattr(model, "module", model))
        targets = online(batch["records"]) if online else batch["targets"].dequantise()
        wanted = {
            **batch,
            "keys": targets.keys[:, match.rows],
            "values": targets.values[:, match.rows],
            "slot_mask": targets.slot_mask[:, match.rows],
            "endpoint": targets.endpoint,
        }
        keys = student.slot_keys(reasoning, match.phase)[:, match.layers]
        values = torch.stack(reasoning.values, dim=1)[:, match.layers]
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


def _std(values: Sequence[float], rows: Sequence[int] | None = None) -> Tensor:
    chosen = values if rows is None else [values[row] for row in rows]
    # A row without any spread (a single record, a constant) is not scaled.
    return torch.tensor([value or 1.0 for value in chosen])

"""How close a student's latent cache comes to the teacher's targets, by layer and slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.match import Match
from kava_core.models.latent import LatentReasoner
from kava_core.store import TargetsStore


@torch.no_grad()
def slot_similarity(
    student: LatentReasoner,
    store: TargetsStore,
    *,
    records: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Mean cosine similarity over the store's first records and all heads.

    Returns {"records": n, "layers": [L'], "keys": [L'][M], "values": [L'][M]}; a slot that no
    record fills is None.
    """
    match = Match.of(store)
    dataset = TargetsDataset(store, chains=False)
    count = min(records, len(store))
    sums: dict[str, Tensor] = {}
    filled = torch.zeros(())
    for start in range(0, count, batch_size):
        indices = list(range(start, min(start + batch_size, count)))
        batch = dataset.__getitems__(indices)
        device = student.device
        reasoning = student(
            *(batch[k].to(device) for k in ("question_ids", "question_mask")),
            *(batch[k].to(device) for k in ("answer_ids", "answer_mask")),
        )
        targets = batch["targets"].dequantise(device)
        mask = targets.slot_mask[:, match.rows].double()  # [B, L', H, M]
        pairs = {
            "keys": (student.slot_keys(reasoning, match.phase), targets.keys),
            "values": (torch.stack(reasoning.values, dim=1), targets.values),
        }
        for name, (ours, theirs) in pairs.items():
            cosine = cosine_similarity(ours[:, match.layers], theirs[:, match.rows], dim=-1)
            total = (cosine.double() * mask).sum((0, 2)).cpu()  # [L', M]
            sums[name] = sums.get(name, torch.zeros_like(total)) + total
        filled = filled + mask.sum((0, 2)).cpu()
        advance(len(indices))
    return {
        "records": count,
        "layers": match.layers,
        **{
            name: [
                [float(s / n) if n else None for s, n in zip(row, counts, strict=True)]
                for row, counts in zip(total, filled, strict=True)
            ]
            for name, total in sums.items()
        },
    }

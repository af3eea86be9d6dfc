"""How close a student's latent cache comes to the teacher's targets, by layer and slot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kava_core.findings.latents import SlotSimilarity
from kava_core.models.batching import pad
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
) -> SlotSimilarity:
    """Mean cosine similarity over the store's first records and all heads.

    The student began as the store's teacher, so that layers and heads are the same; a slot that no
    record fills is None.
    """
    layers, rows = sorted(store.layer_map), [row for _, row in sorted(store.layer_map.items())]
    phase = store.manifest.rotary.phase
    count = min(records, len(store))
    sums: dict[str, Tensor] = {}
    filled = torch.zeros(())
    for start in range(0, count, batch_size):
        indices = list(range(start, min(start + batch_size, count)))
        asked = [store.index.record(i) for i in indices]
        device = student.device
        # Latents come before the answer and see nothing of it.
        reasoning = student(
            *(x.to(device) for x in pad([record.question_ids for record in asked], "left")),
            *(x.to(device) for x in pad([record.answer_ids for record in asked], "right")),
        )
        targets = store.batch(indices).dequantise(device)
        mask = targets.slot_mask[:, rows].double()  # [B, L', H, M]
        pairs = {
            "keys": (student.slot_keys(reasoning, phase), targets.keys),
            "values": (torch.stack(reasoning.values, dim=1), targets.values),
        }
        for name, (ours, theirs) in pairs.items():
            cosine = cosine_similarity(ours[:, layers], theirs[:, rows], dim=-1)
            total = (cosine.double() * mask).sum((0, 2)).cpu()  # [L', M]
            sums[name] = sums.get(name, torch.zeros_like(total)) + total
        filled = filled + mask.sum((0, 2)).cpu()
        advance(len(indices))
    means = {
        name: [
            [float(s / n) if n else None for s, n in zip(row, counts, strict=True)]
            for row, counts in zip(total, filled, strict=True)
        ]
        for name, total in sums.items()
    }
    return SlotSimilarity(records=count, layers=layers, keys=means["keys"], values=means["values"])

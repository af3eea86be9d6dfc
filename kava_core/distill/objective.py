"""The objective of METHOD section 4, term by term.

    loss = CE(A | Q, z) + w_cot · CE(C, A | Q) + α_codi · d(endpoint) + α_kv · ½ (d(K) + d(V))

Every term is a mean over a record's own entries first and over the records of the batch then, so
that no term depends on how a batch is cut over steps or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from kava_core.distill.losses import record_mean
from kava_core.distill.match import Match
from kava_core.models.latent import Reasoning
from kava_core.settings import Student
from kava_core.settings.student import KVParts, Share
from kava_core.store import TargetsStore


def cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """logits [B, N, V], ids and mask [B, N]; row j of the logits predicts ids[:, j] → scalar."""
    losses = functional.cross_entropy(
        _wide(logits, logits).flatten(0, 1), ids.flatten(), reduction="none"
    ).view_as(ids)
    weight = mask.to(losses.dtype)
    return ((losses * weight).sum(1) / weight.sum(1)).mean()


def distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Elementwise d: `l1`, `smooth_l1` (β = 1) or `mse`; the teacher gets no gradient.

    At least in float32: under autocast the student's numbers come in half precision, and means
    over thousands of slots must not be taken in that.
    """
    student, teacher = _wide(student, student), _wide(teacher.detach(), student)
    if kind == "l1":
        return functional.l1_loss(student, teacher, reduction="none")
    if kind == "smooth_l1":
        return functional.smooth_l1_loss(student, teacher, reduction="none")
    return functional.mse_loss(student, teacher, reduction="none")


def kv_loss(
    student: Tensor, teacher: Tensor, slot_mask: Tensor, kind: str, std: Tensor | None
) -> Tensor:
    """d over the valid slots.

    student, teacher [B, L, H, M, D]; slot_mask [B, L, H, M], false where a trace had fewer tokens
    than slots; std [L] divides both sides layer by layer → scalar.
    """
    if std is not None:
        scale = _wide(std, student)[None, :, None, None, None]
        student, teacher = student / scale, teacher / scale
    # What lies in a slot without a target must not matter, not even if it is not a number.
    teacher = teacher.masked_fill(~slot_mask[..., None], 0)
    per_slot = distance(student, teacher, kind).mean(-1)
    weight = slot_mask.to(per_slot.dtype)
    per_record = (per_slot * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1)
    return per_record.mean()


def endpoint_loss(student: Tensor, teacher: Tensor, kind: str, std: Tensor | None) -> Tensor:
    """CODI: d over the hidden states at the last token of the answer prompt.

    student, teacher [B, L+1, E]; std [L+1]. The embedding level (index 0) is left out: its spread
    is a tenth of the others', and dividing by it would make the term mostly about embeddings.
    """
    student, teacher = student[:, 1:], teacher[:, 1:]
    if std is not None:
        scale = _wide(std[1:], student)[None, :, None]
        student, teacher = student / scale, teacher / scale
    return distance(student, teacher, kind).mean()


@dataclass(frozen=True)
class Objective:
    """Weights, distances and the store's statistics; the std fields are None where not divided.

    kv_parts: whether `both` keys and values are compared, each with half the weight, or one of
    them. keys_std, values_std: [L']; endpoint_std: [L+1], L' and L being those of the tensors
    compared.
    """

    alpha_kv: float
    alpha_codi: float
    w_cot: float
    kv_distance: str
    codi_distance: str
    alpha_readout: float = 0.0
    kv_parts: KVParts = "both"
    keys_std: Tensor | None = None
    values_std: Tensor | None = None
    endpoint_std: Tensor | None = None

    def weighted(
        self,
        reasoning: Reasoning,
        batch: dict[str, Tensor],
        slot_keys: Tensor | None,
        slot_values: Tensor | None,
    ) -> dict[str, Tensor]:
        """The active terms, each times its weight; their sum is the loss.

        batch: answer_ids, answer_mask [B, A]; with targets also keys, values [B, L', H, M, D],
        slot_mask [B, L', H, M] and endpoint [B, L+1, E]; for the readout slot_ids, the tokens of
        the slots, and their mask slot_filled, [B, M]; slot_keys, slot_values are the student's.
        """
        terms = {
            "answer": cross_entropy(
                reasoning.logits[:, :-1], batch["answer_ids"], batch["answer_mask"]
            )
        }
        if self.w_cot and reasoning.chain_losses is not None:
            terms["cot"] = self.w_cot * record_mean(reasoning.chain_losses, batch["chain_mask"])
        if self.alpha_codi:
            terms["codi"] = self.alpha_codi * endpoint_loss(
                reasoning.endpoint, batch["endpoint"], self.codi_distance, self.endpoint_std
            )
        if self.alpha_kv and slot_keys is not None and slot_values is not None:
            terms["kv"] = self.alpha_kv * self._kv(batch, slot_keys, slot_values)
        if self.alpha_readout and reasoning.readout is not None:
            terms["readout"] = self.alpha_readout * cross_entropy(
                reasoning.readout, batch["slot_ids"], batch["slot_filled"]
            )
        return terms

    def _kv(self, batch: dict[str, Tensor], slot_keys: Tensor, slot_values: Tensor) -> Tensor:
        mask, kind = batch["slot_mask"], self.kv_distance
        parts = []
        if self.kv_parts != "values":
            parts.append(kv_loss(slot_keys, batch["keys"], mask, kind, self.keys_std))
        if self.kv_parts != "keys":
            parts.append(kv_loss(slot_values, batch["values"], mask, kind, self.values_std))
        return torch.stack(parts).sum() / len(parts)


def objective_of(
    settings: Student, store: TargetsStore | None, match: Match | None = None
) -> Objective:
    """The objective with the statistics of the whole store, never of a batch.

    A term whose weight is a share has weight 1 here: `Balance` gives it its share. match: of the
    student with the store; None for one that has the teacher's layers.
    """

    def number(weight: float | Share) -> float:
        return 1.0 if isinstance(weight, Share) else weight

    plain = Objective(
        alpha_kv=number(settings.alpha_kv) if store else 0.0,
        alpha_codi=number(settings.alpha_codi) if store else 0.0,
        w_cot=number(settings.w_cot),
        kv_distance=settings.kv_distance,
        codi_distance=settings.codi_distance,
        alpha_readout=number(settings.alpha_readout) if store else 0.0,
        kv_parts=settings.kv_parts,
    )
    if store is None:
        return plain
    statistics, match = store.manifest.statistics, match or Match.of(store)
    return replace(
        plain,
        keys_std=_std(statistics.keys_std, match.rows) if settings.kv_std else None,
        values_std=_std(statistics.values_std, match.rows) if settings.kv_std else None,
        endpoint_std=_std(statistics.endpoint_std, match.levels) if settings.codi_std else None,
    )


def _std(values: Sequence[float], rows: Sequence[int]) -> Tensor:
    # A row without any spread (a single record, a constant) is not scaled.
    return torch.tensor([values[row] or 1.0 for row in rows])


def _wide(x: Tensor, student: Tensor) -> Tensor:
    """x where the student is, in its dtype, but at least float32."""
    return x.to(student.device, torch.promote_types(student.dtype, torch.float32))

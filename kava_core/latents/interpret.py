"""What a student's latents hold, beside the teacher's cache over the same problems.

Symbols as in METHOD: L layers, M latents, H key/value heads; L' layers have targets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kava_core.errors import KavaError
from kava_core.findings.latents import (
    AttentionFlow,
    CacheNorms,
    DecodedProblem,
    DecodedSlot,
    Grid,
    Insight,
    Iteration,
    LayerMaps,
    Maps,
)
from kava_core.latents.interventions import interventions
from kava_core.latents.student import PARTS, QUESTION_PARTS, Observation, observe
from kava_core.latents.teacher import TOP, TeacherBatch, TeacherView, likeliest
from kava_core.models.head import read_head
from kava_core.models.latent import LatentReasoner
from kava_core.models.slot_cache import ABSENT
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from kava_core.store.codec import EncodedTensor

BINS = 16


@torch.no_grad()
def interpret(
    student: LatentReasoner,
    teacher: TeacherView,
    encoder: TraceEncoder,
    texts: Mapping[str, Problem],
    problems: Sequence[Problem],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Insight:
    """What one student's latents hold.

    teacher: has read the records, and been cut to the M slots that the student was taught by, among
    other budgets.
    texts: id → problem, for the records. problems: what to ask with changed latents.
    """
    seen = [observe(student, batch.traces, batch.parts) for batch in teacher.batches]
    _check_head(student, seen[0])
    asked = None
    if problems:
        asked = interventions(
            student, encoder, problems, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
    evicted, full, truncated = _similarity(student, seen, teacher)
    insight = Insight(
        records=sum(len(batch.traces) for batch in teacher.batches),
        question_parts=list(QUESTION_PARTS),
        decoded=_decoded(student, seen, teacher, encoder, texts),
        similarity_evicted=evicted,
        similarity_full=full,
        similarity_truncated=truncated,
        attention=_attention(student, seen, teacher),
        magnitudes=_magnitudes(seen, teacher),
        interventions=asked,
    )
    return Insight.model_validate(_rounded(insight.model_dump()))


# --- what latents decode to ---------------------------------------------------------------------


def _check_head(student: LatentReasoner, seen: Observation) -> None:
    """The logits that the model gives itself are those of `read_head`."""
    own = seen.reasoning.logits[:, 0].double()
    ours = read_head(student.decoder, seen.reasoning.endpoint[:, -1]).double()
    tolerance = max(1e-3, 16 * torch.finfo(student.dtype).eps) * float(own.abs().max())
    if not torch.allclose(own, ours, rtol=0, atol=tolerance):
        raise KavaError(
            f"{student.decoder.config.model_type} makes its logits in a way this library does not "
            "know (expected the LM head on the last hidden state, softcapped or not): its latents "
            "cannot be decoded. Set evaluate.interpret_records to 0."
        )


def _decoded(
    student: LatentReasoner,
    seen: Sequence[Observation],
    teacher: TeacherView,
    encoder: TraceEncoder,
    texts: Mapping[str, Problem],
) -> list[DecodedProblem]:
    tokenizer, found = encoder.tokenizer, []
    places = (
        (b, row) for b, batch in enumerate(teacher.batches) for row in range(len(batch.traces))
    )
    for tokens, (b, row) in zip(teacher.tokens, places, strict=False):
        batch, m = teacher.batches[b], student.config.latents
        trace = batch.traces[row]
        kept = [_majority(batch, teacher.truncation.budget, row, slot) for slot in range(m)]
        theirs = [[] if place is None else tokens[place] for place, _ in kept]
        iterations = []
        for hidden in seen[b].hidden[:, row]:  # [M, E]
            ours = likeliest(read_head(student.decoder, hidden), tokenizer, TOP)
            slots = [
                DecodedSlot(
                    student=ours[slot],
                    teacher=theirs[slot],
                    teacher_position=kept[slot][0],
                    teacher_share=kept[slot][1],
                )
                for slot in range(m)
            ]
            iterations.append(Iteration(slots=slots))
        found.append(
            DecodedProblem(
                id=trace.id,
                question=texts[trace.id].question,
                trace=[str(tokenizer.decode([i])) for i in trace.cot_ids],
                answer=trace.answer,
                iterations=iterations,
            )
        )
    return found


def _majority(batch: TeacherBatch, budget: int, row: int, slot: int) -> tuple[int | None, float]:
    """The trace token that most layers and heads keep in a slot, and their share."""
    kept = batch.kept[budget].positions[row, :, :, slot].flatten().tolist()
    places = Counter(place for place in kept if place != ABSENT)
    if not places:
        return None, 0.0
    place = min(places, key=lambda p: (-places[p], p))
    return place - len(batch.traces[row].question_ids), places[place] / places.total()


# --- similarity ---------------------------------------------------------------------------------


def _similarity(
    student: LatentReasoner, seen: Sequence[Observation], teacher: TeacherView
) -> tuple[LayerMaps, LayerMaps, dict[int, LayerMaps]]:
    """To the slots, to the whole trace, and per budget to what it leaves of that."""
    cut = teacher.truncation
    layers, rows = sorted(cut.layers.row_of), [row for _, row in sorted(cut.layers.row_of.items())]
    full: dict[str, list[Tensor]] = {"keys": [], "values": []}  # of [L, M]
    kept: dict[int, dict[str, list[Tensor]]] = {m: {"keys": [], "values": []} for m in cut.budgets}
    slots: dict[str, list[Tensor]] = {"keys": [], "values": []}  # of [L', H, M], NaN if empty
    for batch, observation in zip(teacher.batches, seen, strict=True):
        ours = {
            "keys": student.slot_keys(observation.reasoning, cut.phase).float(),
            "values": torch.stack(observation.reasoning.values, 1).float(),
        }  # [B, L, H, M, D]
        for name, trace in (("keys", batch.keys), ("values", batch.values)):
            for one, tokens in zip(ours[name], trace, strict=True):
                full[name].append(_closest(one, tokens.permute(1, 2, 0, 3)))
        for m, left in batch.kept.items():
            theirs = {"keys": teacher.kept_keys(left), "values": left.values.dequantise().float()}
            valid = (left.positions != ABSENT)[:, rows]  # [B, L', H, m]
            for name, mine in ours.items():
                wanted = theirs[name][:, rows]
                for one, other, real in zip(mine[:, layers], wanted, valid, strict=True):
                    kept[m][name].append(_closest(one, other, real))
                if m == cut.budget:
                    cosine = (normalize(mine[:, layers], dim=-1) * normalize(wanted, dim=-1)).sum(
                        -1
                    )
                    slots[name] += cosine.masked_fill(~valid, torch.nan).unbind()
    return (
        _maps(layers, slots, lambda cells: _mean([x.transpose(1, 2) for x in cells], 2)),
        _maps(list(range(len(full["keys"][0]))), full, _mean),
        {m: _maps(layers, found, _mean) for m, found in kept.items()},
    )


def _maps(
    layers: list[int],
    found: Mapping[str, Sequence[Tensor]],
    mean: Callable[[Sequence[Tensor]], Grid],
) -> LayerMaps:
    return LayerMaps(layers=layers, keys=mean(found["keys"]), values=mean(found["values"]))


def _closest(ours: Tensor, theirs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cosine of ours [L, H, M, D] to the most similar of theirs [L, H, N, D], mean over H: [L, M].

    valid: [L, H, N], at least one per layer and head.
    """
    cosine = normalize(ours, dim=-1) @ normalize(theirs, dim=-1).transpose(2, 3)  # [L, H, M, N]
    if valid is not None:
        cosine = cosine.masked_fill(~valid[:, :, None], -torch.inf)
    return cosine.amax(-1).mean(1)


# --- attention and magnitudes -------------------------------------------------------------------


def _attention(
    student: LatentReasoner, seen: Sequence[Observation], teacher: TeacherView
) -> AttentionFlow:
    flow = torch.cat([observation.attention for observation in seen], 1)  # [I, R, M+1, P]
    read = {
        m: _mean(list(torch.cat([batch.attention[m] for batch in teacher.batches])))
        for m in (0, *teacher.truncation.budgets)
    }
    return AttentionFlow(
        sources=[*(f"latent {i + 1}" for i in range(student.config.latents)), "answer"],
        targets=list(PARTS),
        iterations=[_mean(list(one)) for one in flow],
        teacher_full=read.pop(0),
        teacher_truncated=read,
    )


def _magnitudes(seen: Sequence[Observation], teacher: TeacherView) -> CacheNorms:
    keys = torch.cat([observation.key_norms for observation in seen], 1)  # [I, R, L, M]
    values = torch.cat([observation.value_norms for observation in seen], 1)
    return CacheNorms(
        iterations=[
            Maps(keys=_mean(list(k)), values=_mean(list(v)))
            for k, v in zip(keys, values, strict=True)
        ],
        teacher_full=Maps(
            keys=_along([x for batch in teacher.batches for x in batch.keys]),
            values=_along([x for batch in teacher.batches for x in batch.values]),
        ),
        teacher_truncated={m: _kept_norms(teacher, m) for m in teacher.truncation.budgets},
    )


def _along(traces: Sequence[Tensor]) -> Grid:
    """Norms along traces [N_C, L, H, D], mean over records, heads and the tokens of a bin."""
    layers = traces[0].shape[1]
    total, count = torch.zeros(BINS, layers).double(), torch.zeros(BINS, 1).double()
    for trace in traces:
        norms = trace.norm(dim=-1).mean(2).double().cpu()  # [N_C, L]
        bins = torch.arange(len(norms)) * BINS // len(norms)
        total.index_add_(0, bins, norms)
        count.index_add_(0, bins, torch.ones(len(norms), 1).double())
    means: Grid = (total / count).T.tolist()
    return means


def _kept_norms(teacher: TeacherView, budget: int) -> Maps:
    kept = [batch.kept[budget] for batch in teacher.batches]
    layers = teacher.batches[0].keys[0].shape[1]

    def means(encoded: Sequence[EncodedTensor]) -> Grid:
        rows: list[Tensor] = []  # of [L', M, H], NaN where a slot is empty
        for left, one in zip(kept, encoded, strict=True):
            norms = one.dequantise().float().norm(dim=-1)  # [B, L', H, M]
            rows += norms.masked_fill(left.positions == ABSENT, torch.nan).transpose(2, 3).unbind()
        mean = _mean(rows, 2)  # [L'][M]
        nothing: list[float | None] = [None] * len(mean[0])
        row_of = teacher.truncation.layers.row_of
        return [mean[row_of[i]] if i in row_of else nothing for i in range(layers)]

    return Maps(keys=means([left.keys for left in kept]), values=means([x.values for x in kept]))


def _mean(records: Sequence[Tensor], heads: int | None = None) -> Any:
    """The mean over records, all of one shape, and over the dimension `heads`; NaN is skipped.

    In lists as deep as what is left of the shape.
    """
    every = torch.stack([x.double() for x in records])
    over = (0,) if heads is None else (0, heads + 1)
    return every.nanmean(over).tolist()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value

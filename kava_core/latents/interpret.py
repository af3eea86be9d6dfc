"""What a student's latents hold, beside the teacher's cache over the same problems.

`write_insights` writes evaluation/interpretability.json, {student: what `interpret` returns}.
Symbols as in METHOD: L layers, M latents, H key/value heads; L' layers have targets. I counts
iterations: the T + 1 passes of Jacobi reasoning, 1 for sequential reasoning. Numbers have 5
significant digits; null stands where no record has one.

    records                 how many test problems: the first whose trace the teacher can hold
    question_parts          names of the parts that a question's tokens are sorted into: numbers
                            (tokens with a digit), words (others with a letter), other
    decoded                 for the first few records: {id, question, trace [tokens], answer,
                            iterations: [{slots: [M]}]}, and a slot is
        student             [[token, probability]]: the LM head on the last hidden state at the
                            latent, likeliest first
        teacher             the same for the teacher's next token behind the trace token that
                            eviction kept in this slot; [] if it kept none
        teacher_position    which token of the trace that is, from 0: the one that most layers and
                            heads keep in this slot, the earliest of several; null if none
        teacher_share       the share of the layers and heads (with a token there) that keep it
    similarity_evicted      {layers [L'], keys [L'][M], values [L'][M]}: cosine of each latent to
                            the token kept in the same slot, mean over records and heads
    similarity_full         {layers [L], keys [L][M], values [L][M]}: cosine of each latent to the
                            most similar token of the whole trace, per record and head, then mean
    similarity_truncated    budget → as similarity_full, to the most similar of the tokens kept
    attention               sources [M+1]: the latents, and the answer, which is the mean over the
                            places that predict its tokens; targets [P]: question_parts, <bot>,
                            latents, answer prompt (with <eot>, and the steps before it that latents
                            do not stand for), answer
        iterations          [I][M+1][P]: shares of attention, mean over layers, query heads and
                            records; a row adds up to 1; the answer is read in the last one only
        teacher_full        [P]: the teacher's answer reading its whole cache; what it sees of the
                            trace stands under `latents`
        teacher_truncated   budget → [P]: reading a truncated one
    magnitudes              L2 norms of keys and values, mean over records and heads
        iterations          [I] {keys [L][M], values [L][M]}
        teacher_full        {keys [L][bins], values [L][bins]}: along the trace, in bins of equal
                            share of its tokens
        teacher_truncated   budget → {keys [L][budget], values [L][budget]}: along the kept slots
    interventions           see `interpret_interventions`; null if no problem was to be asked

Keys are compared in the phase of the targets store. Everything but `interventions` comes from
teacher-forced forwards, so that the answer's rows belong to the same tokens in all systems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from kava_core.artefacts import atomic_path, canonical_json
from kava_core.errors import KavaError
from kava_core.latents.interventions import interventions
from kava_core.latents.student import PARTS, QUESTION_PARTS, Observed, observe
from kava_core.latents.teacher import (
    TeacherBatch,
    TeacherView,
    likeliest,
    read_teacher,
)
from kava_core.models.latent import LatentReasoner
from kava_core.models.slot_cache import ABSENT
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder

__all__ = ["EXAMPLES", "TOP", "interpret", "read_teacher", "write_insights"]

EXAMPLES, TOP, BINS = 8, 5, 16


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
) -> dict[str, Any]:
    """What this module's docstring says, for one student with latents.

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
    result = {
        "records": sum(len(batch.traces) for batch in teacher.batches),
        "question_parts": list(QUESTION_PARTS),
        "decoded": _decoded(student, seen, teacher, encoder, texts),
        **_similarity(student, seen, teacher),
        "attention": _attention(student, seen, teacher),
        "magnitudes": _magnitudes(seen, teacher),
        "interventions": asked,
    }
    return _rounded(result)


def write_insights(path: Path, insights: Mapping[str, Any]) -> None:
    """Write {student: `interpret`'s result}, atomically and without spaces: it is long."""
    with atomic_path(path) as temporary:
        temporary.write_text(canonical_json(insights) + "\n", encoding="utf-8")


# --- what latents decode to ---------------------------------------------------------------------


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of normed hidden states [..., E]; softcapped where the model does so."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def _check_head(student: LatentReasoner, seen: Observed) -> None:
    """The logits that the model gives itself are those of `head`."""
    own = seen.reasoning.logits[:, 0].double()
    ours = head(student.decoder, seen.reasoning.endpoint[:, -1]).double()
    tolerance = max(1e-3, 16 * torch.finfo(student.dtype).eps) * float(own.abs().max())
    if not torch.allclose(own, ours, rtol=0, atol=tolerance):
        raise KavaError(
            f"{student.decoder.config.model_type} makes its logits in a way this library does not "
            "know (expected the LM head on the last hidden state, softcapped or not): its latents "
            "cannot be decoded. Set evaluate.interpret_records to 0."
        )


def _decoded(
    student: LatentReasoner,
    seen: Sequence[Observed],
    teacher: TeacherView,
    encoder: TraceEncoder,
    texts: Mapping[str, Problem],
) -> list[dict[str, Any]]:
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
            ours = likeliest(head(student.decoder, hidden), tokenizer, TOP)
            slots = [
                {
                    "student": ours[slot],
                    "teacher": theirs[slot],
                    "teacher_position": kept[slot][0],
                    "teacher_share": kept[slot][1],
                }
                for slot in range(m)
            ]
            iterations.append({"slots": slots})
        found.append(
            {
                "id": trace.id,
                "question": texts[trace.id].question,
                "trace": [str(tokenizer.decode([i])) for i in trace.cot_ids],
                "answer": trace.answer,
                "iterations": iterations,
            }
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
    student: LatentReasoner, seen: Sequence[Observed], teacher: TeacherView
) -> dict[str, Any]:
    cut = teacher.truncation
    layers, rows = sorted(cut.layers.row_of), [row for _, row in sorted(cut.layers.row_of.items())]
    full: dict[str, list[Tensor]] = {"keys": [], "values": []}  # of [L, M]
    kept: dict[int, dict[str, list[Tensor]]] = {m: {"keys": [], "values": []} for m in cut.budgets}
    slots: dict[str, list[Tensor]] = {"keys": [], "values": []}  # of [L', H, M], NaN if empty
    for batch, observed in zip(teacher.batches, seen, strict=True):
        ours = {
            "keys": student.slot_keys(observed.reasoning, cut.phase).float(),
            "values": torch.stack(observed.reasoning.values, 1).float(),
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
    return {
        "similarity_evicted": {
            "layers": layers,
            **{name: _mean([x.transpose(1, 2) for x in all_], 2) for name, all_ in slots.items()},
        },
        "similarity_full": {
            "layers": list(range(len(full["keys"][0]))),
            **{name: _mean(all_) for name, all_ in full.items()},
        },
        "similarity_truncated": {
            str(m): {"layers": layers, **{name: _mean(all_) for name, all_ in found.items()}}
            for m, found in kept.items()
        },
    }


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
    student: LatentReasoner, seen: Sequence[Observed], teacher: TeacherView
) -> dict[str, Any]:
    flow = torch.cat([observed.attention for observed in seen], 1)  # [I, R, M+1, P]
    read = {
        m: _mean(list(torch.cat([batch.attention[m] for batch in teacher.batches])))
        for m in (0, *teacher.truncation.budgets)
    }
    return {
        "sources": [*(f"latent {i + 1}" for i in range(student.config.latents)), "answer"],
        "targets": list(PARTS),
        "iterations": [_mean(list(one)) for one in flow],
        "teacher_full": read.pop(0),
        "teacher_truncated": {str(m): shares for m, shares in read.items()},
    }


def _magnitudes(seen: Sequence[Observed], teacher: TeacherView) -> dict[str, Any]:
    norms = {
        "keys": torch.cat([observed.key_norms for observed in seen], 1),  # [I, R, L, M]
        "values": torch.cat([observed.value_norms for observed in seen], 1),
    }
    full = {
        "keys": [x for batch in teacher.batches for x in batch.keys],
        "values": [x for batch in teacher.batches for x in batch.values],
    }
    return {
        "iterations": [
            {name: _mean(list(of[i])) for name, of in norms.items()}
            for i in range(len(norms["keys"]))
        ],
        "teacher_full": {name: _along(traces) for name, traces in full.items()},
        "teacher_truncated": {str(m): _kept_norms(teacher, m) for m in teacher.truncation.budgets},
    }


def _along(traces: Sequence[Tensor]) -> list[Any]:
    """Norms along traces [N_C, L, H, D], mean over records, heads and the tokens of a bin."""
    layers = traces[0].shape[1]
    total, count = torch.zeros(BINS, layers).double(), torch.zeros(BINS, 1).double()
    for trace in traces:
        norms = trace.norm(dim=-1).mean(2).double().cpu()  # [N_C, L]
        bins = torch.arange(len(norms)) * BINS // len(norms)
        total.index_add_(0, bins, norms)
        count.index_add_(0, bins, torch.ones(len(norms), 1).double())
    return (total / count).T.tolist()


def _kept_norms(teacher: TeacherView, budget: int) -> dict[str, Any]:
    row_of = teacher.truncation.layers.row_of
    layers = teacher.batches[0].keys[0].shape[1]
    found = {}
    for name in ("keys", "values"):
        rows: list[Tensor] = []  # of [L', M, H], NaN where a slot is empty
        for batch in teacher.batches:
            left = batch.kept[budget]
            norms = getattr(left, name).dequantise().float().norm(dim=-1)  # [B, L', H, M]
            rows += norms.masked_fill(left.positions == ABSENT, torch.nan).transpose(2, 3).unbind()
        mean = _mean(rows, 2)  # [L'][M]
        nothing = [None] * len(mean[0])
        found[name] = [mean[row_of[i]] if i in row_of else nothing for i in range(layers)]
    return found


def _mean(records: Sequence[Tensor], heads: int | None = None) -> list[Any]:
    """The mean over records, all of one shape, and over the dimension `heads`; NaN is skipped."""
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

"""What a student's latents are held against: the teacher's cache over the same problems.

The teacher reads each trace once. Its chain's keys and values are kept whole and cut to several
budgets, and it answers, teacher-forced, from the whole cache and from each of the cut ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kava_core.errors import KavaError
from kava_core.eviction import Policy
from kava_core.fidelity.examiner import Batch, CompressedCache, Examiner, Layers
from kava_core.latents.student import (
    ANSWER,
    LATENTS,
    NOTHING,
    PARTS,
    PROMPT,
    question_parts,
)
from kava_core.models.capture import AttentionCall, shown_to
from kava_core.models.slot_cache import ABSENT, SlotCache
from kava_core.models.teacher_pass import check_lengths
from kava_core.record import Record
from kava_core.rotary import Rotary, rotate
from kava_core.store import Codec
from kava_core.targets.plan import Plan

EXAMPLES, TOP = 8, 5
WHOLE = Codec(keys="float32", values="float32", endpoint="float32")  # eviction, no rounding


@dataclass(frozen=True)
class Truncation:
    """How the teacher's caches are cut, as the store's were.

    budgets: M → slots per layer (or group of layers that share); budget: the M of the store; phase:
    of the compared keys.
    """

    policy: Policy
    layers: Layers
    budgets: dict[int, list[int]]
    budget: int
    phase: str

    @classmethod
    def of(cls, plan: Plan) -> Truncation:
        """By the plan of a store, to its budget, a quarter and half of it, and twice as much."""
        own = plan.settings.budget
        return cls(
            policy=plan.settings.policy,
            layers=Layers(plan.layers, plan.groups, plan.settings.share, plan.settings.select),
            budgets={
                m: plan.with_budget(m).budgets
                for m in sorted({max(1, own // 4), max(1, own // 2), own, 2 * own})
            },
            budget=own,
            phase=plan.settings.phase,
        )


@dataclass(frozen=True)
class TeacherBatch:
    """B traces as the teacher reads them.

    parts: of each question's tokens. keys, values: per trace [N_C, L, H, D]. kept: M → what
    eviction leaves, keys without phase. attention: M, or 0 for the whole cache → [B, P], shares of
    the attention of the places that predict the answer, mean over layers and query heads; what is
    seen of the chain stands under `latents`.
    """

    traces: list[Record]
    parts: list[list[int]]
    keys: list[Tensor]
    values: list[Tensor]
    kept: dict[int, CompressedCache]
    attention: dict[int, Tensor]


@dataclass(frozen=True)
class TeacherView:
    """All batches, and what does not change with the student.

    tokens: for the first few traces, [N_C][k] likeliest next tokens (text, probability) after each
    token of the chain.
    """

    batches: list[TeacherBatch]
    tokens: list[list[list[tuple[str, float]]]]
    truncation: Truncation
    rotary: Rotary

    def kept_keys(self, kept: CompressedCache) -> Tensor:
        """[B, L', H, M, D] float32, in the phase of the truncation; empty slots are undefined."""
        keys = kept.keys.dequantise(dtype=torch.float32)
        if self.truncation.phase == "pre_rope":
            return keys
        at = kept.positions.masked_fill(kept.positions == ABSENT, 0)
        layer_of = {row: layer for layer, row in self.truncation.layers.row_of.items()}
        turned = [
            rotate(keys[:, row], *(x[0] for x in self.rotary.layers([layer]).cos_sin(at[:, row])))
            for row, layer in sorted(layer_of.items())
        ]
        return torch.stack(turned, 1)


def readable(problems: Sequence[Record], config: PreTrainedConfig, limit: int) -> list[Record]:
    """The first `limit` traces that a teacher with this text configuration can hold; KavaError if
    there is none."""
    found: list[Record] = []
    said = "they have no written chain of thought"
    for trace in problems:
        if len(found) == limit:
            break
        try:
            check_lengths([trace], config)
        except KavaError as error:
            said = str(error)
            continue
        found.append(trace)
    if not found:
        raise KavaError(
            f"expected test problems with traces that the teacher can read, found none: {said} Set "
            "evaluate.interpret_records to 0 to leave out what needs them."
        )
    return found


@torch.no_grad()
def read_teacher(
    model: PreTrainedModel,
    traces: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    *,
    batch_size: int,
    examples: int = EXAMPLES,
    top: int = TOP,
) -> TeacherView:
    """Let the teacher read the traces; for the first `examples` keep `top` tokens per place."""
    eos = tokenizer.eos_token_id
    examiner = Examiner(model, truncation.layers, eos=eos, max_new_tokens=1)
    batches = [
        _read(examiner, list(traces[start : start + batch_size]), tokenizer, truncation)
        for start in range(0, len(traces), batch_size)
    ]
    tokens = [_next_tokens(model, trace, tokenizer, top) for trace in traces[:examples]]
    return TeacherView(batches, tokens, truncation, examiner.teacher.rotary)


def likeliest(
    logits: Tensor, tokenizer: PreTrainedTokenizerBase, top: int
) -> list[list[tuple[str, float]]]:
    """logits [N, V] → per row the `top` likeliest tokens as text, with their probabilities."""
    best = logits.double().softmax(-1).topk(min(top, logits.shape[-1]))
    return [
        [(str(tokenizer.decode([i])), p) for i, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _next_tokens(
    model: PreTrainedModel, trace: Record, tokenizer: PreTrainedTokenizerBase, top: int
) -> list[list[tuple[str, float]]]:
    ids = torch.tensor([trace.question_ids + trace.cot_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(trace.question_ids) :]
    return likeliest(logits, tokenizer, top)


def _read(
    examiner: Examiner,
    traces: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
) -> TeacherBatch:
    batch = examiner.read(traces)
    parts = [question_parts(trace.question_ids, tokenizer) for trace in traces]
    kept = {
        m: examiner.compress(batch, truncation.policy, budgets, WHOLE)
        for m, budgets in truncation.budgets.items()
    }
    attention = {0: _answer_attention(examiner, batch, parts, examiner.full(batch))}
    for m, compressed in kept.items():
        cache = examiner.restore(batch, compressed)
        attention[m] = _answer_attention(examiner, batch, parts, cache)
    keys = batch.slots.keys.float()
    if truncation.phase == "post_rope":
        rotary, positions = batch.slots.rotation("phase: post_rope")
        cos, sin = (x.transpose(0, 1)[:, :, None] for x in rotary.cos_sin(positions))
        keys = rotate(keys, cos, sin)  # [ΣN_C, L, H, D]
    return TeacherBatch(
        traces=traces,
        parts=parts,
        keys=[keys[first:last] for first, last in batch.slots.spans],
        values=[batch.slots.values[first:last].float() for first, last in batch.slots.spans],
        kept=kept,
        attention=attention,
    )


def _answer_attention(
    examiner: Examiner, batch: Batch, parts: Sequence[Sequence[int]], cache: SlotCache
) -> Tensor:
    """[B, P]: see `TeacherBatch.attention`. The cache is extended."""
    device = examiner.device
    tails = [t.answer_prompt_ids + t.answer_ids for t in batch.traces]
    longest = max(map(len, tails))
    ids = torch.zeros(len(tails), longest, dtype=torch.long)
    positions = torch.full_like(ids, ABSENT)
    rows = torch.zeros(len(tails), longest)
    # The part of every position of the teacher's sequence; the last column is that of ABSENT.
    last = int(batch.start.max()) + longest
    labels = torch.full((len(tails), last + 1), NOTHING)
    for row, (trace, tail, question) in enumerate(zip(batch.traces, tails, parts, strict=True)):
        start, prompt = int(batch.start[row]), len(trace.answer_prompt_ids)
        ids[row, : len(tail)] = torch.tensor(tail)
        positions[row, : len(tail)] = start + torch.arange(len(tail))
        rows[row, prompt - 1 : len(tail) - 1] = 1
        labels[row, : len(question)] = torch.tensor(question)
        labels[row, len(question) : start] = LATENTS
        labels[row, start : start + prompt] = PROMPT
        labels[row, start + prompt : start + len(tail)] = ANSWER
    ids, positions, rows, labels = (x.to(device) for x in (ids, positions, rows, labels))
    watch = _AnswerWatch(rows, lambda layer: _labels_at(labels, cache.positions[layer]))
    with shown_to(watch):
        examiner.decoder.feed(cache, ids, positions, logits=1)
    return watch.total / examiner.decoder.config.num_hidden_layers


def _labels_at(labels: Tensor, places: Tensor) -> Tensor:
    """labels [B, N+1] of positions 0 … N − 1, and of ABSENT, at places [B, H or 1, S]."""
    at = places.clamp(max=labels.shape[1] - 1)
    return labels[:, None].expand(-1, at.shape[1], -1).gather(2, at)


class _AnswerWatch:
    """Adds up over layers where the marked rows [B, N] of a call look; total: [B, P].

    labels: layer → the part of each cached key, [B, H or 1, S].
    """

    def __init__(self, rows: Tensor, labels: Callable[[int], Tensor]) -> None:
        self.rows, self.labels = rows, labels
        self.total = torch.zeros(len(rows), len(PARTS), device=rows.device)

    def record(self, call: AttentionCall) -> None:
        b, heads, s = call.key.shape[:3]
        n = call.query.shape[2]
        weights = call.weights(slice(0, n))
        shared = weights.float().view(b, heads, -1, n, s).mean(2)  # over the heads of a group
        parts = one_hot(self.labels(call.layer), len(PARTS) + 1)[..., :NOTHING].float()
        shares = (shared @ parts.expand(-1, heads, -1, -1)).mean(1)  # [B, N, P]
        mean = (shares * self.rows[..., None]).sum(1) / self.rows.sum(1, keepdim=True)
        self.total += mean

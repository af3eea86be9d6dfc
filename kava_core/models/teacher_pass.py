"""One teacher-forced pass over `Q C A`: the CoT's cache, the answer's attention, the endpoint.

METHOD sections 1 and 2. The *answer rows* are the positions that predict the answer's tokens, from
the `:` of the answer prompt to the last token before the end of sequence: N_A rows for N_A answer
tokens (the end of sequence is one of them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.batching import by_length, pad
from kava_core.models.capture import AttentionCall, recording, teacher_forced
from kava_core.models.context import attention_windows, check_context, context_of
from kava_core.models.proofs import prove_capture
from kava_core.record import Record
from kava_core.rotary import Rotary, unrotate


@dataclass(frozen=True)
class TeacherCache:
    """What the teacher knows about the CoT of B traces, concatenated along their tokens.

    keys, values: [ΣN_C, L, H, D], keys without rotary phase
    importance:   [ΣN_C, L, H] float32, sums to at least 1 over a trace (max over a query group)
    endpoint:     [B, L+1, E], hidden states at the last token of the answer prompt
    offsets:      [B+1] int64, trace b owns tokens offsets[b] : offsets[b+1]
    """

    keys: Tensor
    values: Tensor
    importance: Tensor
    endpoint: Tensor
    offsets: Tensor


class TooLong(KavaError):
    """A trace that a model cannot hold. reason: the same words for all that exceed the same."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_lengths(traces: Sequence[Record], config: Any) -> None:
    """Refuse traces that the model cannot hold: past its context, or past a sliding window."""
    for _, error in too_long(traces, config):
        raise error


def too_long(traces: Sequence[Record], config: Any) -> Iterator[tuple[int, TooLong]]:
    """The traces that the model cannot hold: their places in `traces`, and why."""
    windows, context = attention_windows(config), context_of(config)
    narrowest = min(windows.values(), default=None)
    for place, trace in enumerate(traces):
        total = whole_length(trace)
        reach = total - len(trace.question_ids)
        try:
            check_context(
                config,
                total,
                what=f"problem {trace.id}",
                including="its trace and answer",
                remedy="Drop long problems in `prepare` or use a model with a longer context.",
            )
        except KavaError as error:
            yield place, TooLong(str(error), f"longer than the context of {context} tokens")
            continue
        if narrowest is not None and reach > narrowest:
            layer = next(i for i, w in windows.items() if w == narrowest)
            message = (
                f"the CoT and answer of problem {trace.id} span {reach} tokens, more than the "
                f"sliding window of {narrowest} in layer {layer}: the answer cannot see the whole "
                "trace there. Drop long traces in `prepare` or use another teacher."
            )
            yield place, TooLong(message, f"longer than the sliding window of {narrowest} tokens")


class TeacherPass:
    """The frozen teacher, ready to run over batches of traces.

    model: a causal LM on its device; KavaError if its cache cannot be recorded (`prove_capture`).
    Keys come back in float32 or wider, values and endpoint states in the model's own dtype.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.rotary: Rotary = prove_capture(model)

    @torch.no_grad()
    def __call__(self, traces: Sequence[Record]) -> TeacherCache:
        """Right-padded, so that causality alone keeps padding out of every real position."""
        device = next(self.model.parameters()).device
        sequences = [
            t.question_ids + t.cot_ids + t.answer_prompt_ids + t.answer_ids for t in traces
        ]
        ids, _ = pad(sequences, "right")
        spans = _Spans.of(traces).to(device)
        recorder = _CoTRecorder(spans, self.model.config.get_text_config().num_hidden_layers)
        with recording(self.model, recorder):
            positions = torch.arange(ids.shape[1], device=device).expand(len(traces), -1)
            endpoint, _ = self._read(ids.to(device), positions, spans.endpoint)
        keys, values, importance = recorder.ragged()
        return TeacherCache(
            keys=self._without_phase(keys, spans),
            values=values,
            importance=importance,
            endpoint=endpoint,
            offsets=spans.offsets,
        )

    def _read(self, ids: Tensor, positions: Tensor, at: Tensor) -> tuple[Tensor, Any]:
        return teacher_forced(self.model, ids, positions, at)

    def _without_phase(self, keys: Tensor, spans: _Spans) -> Tensor:
        """keys [ΣN_C, L, H, D] post-RoPE → pre-RoPE, in float32 or wider."""
        cos, sin = self.rotary.cos_sin(spans.token_positions)  # [L, ΣN_C, R/2]
        # The model rotates with cosines of its own dtype; undoing them exactly needs the same.
        cos, sin = (x.to(keys.dtype).transpose(0, 1)[:, :, None] for x in (cos, sin))
        wide = torch.promote_types(keys.dtype, torch.float32)
        return unrotate(keys.to(wide), cos.to(wide), sin.to(wide))


def over(teacher: TeacherPass, traces: Sequence[Record], batch_size: int) -> TeacherCache:
    """The pass over many traces in batches of similar length; the result is in their own order.

    Which traces share a batch depends on the traces alone, so repeating it gives the same bytes.
    """
    pieces: list[TeacherCache] = [None] * len(traces)  # type: ignore[list-item]
    for chosen in by_length([whole_length(t) for t in traces], batch_size):
        cache = teacher([traces[i] for i in chosen])
        for row, i in enumerate(chosen):
            pieces[i] = _one(cache, row)
    return _joined(pieces)


def whole_length(trace: Record) -> int:
    """Tokens of all that the teacher reads of a trace."""
    return (
        len(trace.question_ids)
        + len(trace.cot_ids)
        + len(trace.answer_prompt_ids)
        + len(trace.answer_ids)
    )


def chosen_records(cache: TeacherCache, rows: Sequence[int]) -> TeacherCache:
    """What the cache has of these records, in this order."""
    return _joined([_one(cache, row) for row in rows])


def _one(cache: TeacherCache, row: int) -> TeacherCache:
    span = slice(int(cache.offsets[row]), int(cache.offsets[row + 1]))
    return TeacherCache(
        cache.keys[span],
        cache.values[span],
        cache.importance[span],
        cache.endpoint[row : row + 1],
        cache.offsets[:2],
    )


def _joined(pieces: Sequence[TeacherCache]) -> TeacherCache:
    sizes = torch.tensor([0, *(len(p.keys) for p in pieces)])
    return TeacherCache(
        keys=torch.cat([p.keys for p in pieces]),
        values=torch.cat([p.values for p in pieces]),
        importance=torch.cat([p.importance for p in pieces]),
        endpoint=torch.cat([p.endpoint for p in pieces]),
        offsets=sizes.cumsum(0),
    )


@dataclass(frozen=True)
class _Spans:
    """Where the parts of each trace lie in its sequence; all int64."""

    cot_start: Tensor  # [B]
    cot_length: Tensor  # [B]
    endpoint: Tensor  # [B]
    rows: Tensor  # [B, R] answer rows, clamped where a trace has fewer
    row_mask: Tensor  # [B, R] bool
    offsets: Tensor  # [B+1]
    token_record: Tensor  # [ΣN_C] which record a CoT token belongs to
    token_positions: Tensor  # [ΣN_C] where it stands in that record's sequence

    @classmethod
    def of(cls, traces: Sequence[Record]) -> _Spans:
        start = torch.tensor([len(t.question_ids) for t in traces])
        length = torch.tensor([len(t.cot_ids) for t in traces])
        endpoint = start + length + torch.tensor([len(t.answer_prompt_ids) for t in traces]) - 1
        answer = torch.tensor([len(t.answer_ids) for t in traces])
        row = torch.arange(int(answer.max()))
        offsets = torch.cat((torch.zeros(1, dtype=torch.long), length.cumsum(0)))
        record = torch.repeat_interleave(torch.arange(len(traces)), length)
        within = torch.arange(int(offsets[-1])) - offsets[record]
        return cls(
            cot_start=start,
            cot_length=length,
            endpoint=endpoint,
            rows=endpoint[:, None] + torch.minimum(row, answer[:, None] - 1),
            row_mask=row < answer[:, None],
            offsets=offsets,
            token_record=record,
            token_positions=start[record] + within,
        )

    def to(self, device: torch.device) -> _Spans:
        return _Spans(**{name: value.to(device) for name, value in vars(self).items()})


class _CoTRecorder:
    """Keeps each layer's CoT keys and values, and the answer's attention to them."""

    def __init__(self, spans: _Spans, layers: int) -> None:
        self.spans = spans
        self.layers: list[tuple[Tensor, ...] | None] = [None] * layers

    @torch.no_grad()
    def record(self, call: AttentionCall) -> None:
        spans = self.spans.to(call.key.device)  # layers may lie on several
        at = (spans.token_record, slice(None), spans.token_positions)
        importance = answer_importance(
            call, spans.rows, spans.row_mask, spans.cot_start, spans.cot_length
        )
        if self.layers[call.layer] is not None:
            raise KavaError(
                f"layer {call.layer} called transformers' attention interface twice in one forward "
                "pass; this architecture's cache cannot be recorded."
            )
        # [ΣN_C, H, …] each
        found = (call.key[at], call.value[at], importance[at])
        self.layers[call.layer] = tuple(x.to(self.spans.offsets.device) for x in found)

    def ragged(self) -> tuple[Tensor, Tensor, Tensor]:
        """keys, values [ΣN_C, L, H, D] post-RoPE, importance [ΣN_C, L, H]."""
        missing = [i for i, layer in enumerate(self.layers) if layer is None]
        if missing:
            raise KavaError(
                f"layers {missing} did not pass through transformers' attention interface; "
                "this architecture's cache cannot be recorded."
            )
        keys, values, importance = zip(*self.layers, strict=True)
        return torch.stack(keys, 1), torch.stack(values, 1), torch.stack(importance, 1)


def answer_importance(
    call: AttentionCall, rows: Tensor, row_mask: Tensor, cot_start: Tensor, cot_length: Tensor
) -> Tensor:
    """I_i of METHOD section 2 for every position of the sequence (0 outside the CoT).

    call: over whole sequences of S tokens; rows, row_mask [B, R]; cot_start, cot_length [B] →
    [B, H, S] float32. Softmax over the CoT positions only, per query head and answer row; the
    maximum over the query heads of a group; the mean over the answer rows. Only R rows of the
    attention matrix are ever formed.
    """
    query, key = call.query, call.key
    b, hq, s, d = query.shape
    h = key.shape[1]
    picked = query.gather(2, rows[:, None, :, None].expand(b, hq, rows.shape[1], d))
    picked = picked.view(b, h, hq // h * rows.shape[1], d)  # [B, H, g·R, D]
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = picked.to(wide) @ key.to(wide).transpose(2, 3) * call.scaling  # [B, H, g·R, S]
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    position = torch.arange(s, device=key.device)
    inside = (position >= cot_start[:, None]) & (position < (cot_start + cot_length)[:, None])
    logits = logits.masked_fill(~inside[:, None, None], -torch.inf)
    attention = logits.softmax(-1).view(b, h, hq // h, rows.shape[1], s).amax(2)  # [B, H, R, S]
    attention = attention * row_mask[:, None, :, None]
    return (attention.sum(2) / row_mask.sum(1)[:, None, None]).float()

"""What a compressed cache is worth, told by the teacher answering from it.

The teacher reads a question and its ground-truth chain of thought once. Then it answers from

- the **full** cache of both;
- the question's cache and what eviction and quantisation left of the chain's, every kept token at
  its original position (**compressed**);
- the question's cache alone, positions as they were (**none**): the chain is masked out.

The answer prompt and the answer come after, at the positions they have behind the whole chain, and
nothing else of the chain can be seen. Differences in the answers are therefore differences in the
cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.eviction import CacheBatch, Policy, evict
from kava_core.eviction.layers import Share, group_layers, parse_layers
from kava_core.eviction.policies.base import Selection
from kava_core.memory import PeakMemory
from kava_core.models.batching import by_length, pad
from kava_core.models.slot_cache import ABSENT, SlotCache, SlotDecoder
from kava_core.models.teacher_pass import TeacherPass
from kava_core.record import Record
from kava_core.rotary import rotate
from kava_core.store.codec import EncodedTensor, encode
from kava_core.store.layout import Codec


@dataclass(frozen=True)
class Layers:
    """Which layers of the teacher keep slots, which of them share, and who selects.

    chosen: the layers, ascending; groups: adjacent ones that share, as indices into `chosen`;
    select: each head for itself or the record for all, as in `evict`. A layer that is not chosen
    sees the question only.
    """

    chosen: list[int]
    groups: list[list[int]]
    share: Share = "none"
    select: Selection = "head"

    @classmethod
    def of(
        cls,
        choice: str | Mapping[str, int] | Sequence[int],
        share: Share,
        share_size: int,
        select: Selection,
        model_layers: int,
    ) -> Layers:
        """choice: as `parse_layers` takes it; share_size: layers in a group, if any share.

        KavaError names the setting that the model's layers do not meet.
        """
        chosen = parse_layers(choice, model_layers)
        groups = group_layers(len(chosen), share_size if share != "none" else 1)
        return cls(chosen, groups, share, select)

    @property
    def row_of(self) -> dict[int, int]:
        """Layer → row of the compressed cache it reads."""
        if self.share != "merged":
            return {layer: row for row, layer in enumerate(self.chosen)}
        return {self.chosen[i]: row for row, group in enumerate(self.groups) for i in group}


@dataclass(frozen=True)
class Batch:
    """B problems that the teacher has read.

    cache: of the question (left-padded, the first `question` columns) and the chain of thought;
    slots: the chain's cache as a teacher store would hold it; start: [B] int64, the position of
    the answer prompt.
    """

    traces: Sequence[Record]
    cache: SlotCache
    question: int
    slots: CacheBatch
    start: Tensor


@dataclass(frozen=True)
class CompressedCache:
    """What is left of a batch's chains, encoded as a targets store would hold it.

    keys, values: encoded [B, L', H, M, D], pre-RoPE; positions: [B, L', H, M] int64 in the
    teacher's sequence, ABSENT where a slot is empty (the filled ones come first); widths: the
    filled slots of each row, of the record that has most.
    tokens: [B], how many tokens of the chain a head sees, the mean over the teacher's L·H heads.
    bytes: [B], of keys, values, their scales and zero points, and 4 for each slot's position.
    """

    keys: EncodedTensor
    values: EncodedTensor
    positions: Tensor
    widths: list[int]
    tokens: list[float]
    bytes: list[int]


@dataclass(frozen=True)
class Outcome:
    """How the teacher answered a batch from one cache.

    written: the ids it wrote, to the end of sequence; nll: [B], −log p of the gold answer, nats per
    token, its end of sequence included; kl: [B], KL(full ‖ this) of the next-token distributions,
    mean over the same tokens, nats; logits: per record [N_A, V], as the model gives them; seconds:
    of wall-clock per problem, from the stored cache to the last token written; memory: bytes that
    took at its peak for the whole batch (None where the system does not tell).
    """

    written: list[list[int]]
    nll: list[float]
    kl: list[float]
    logits: list[Tensor]
    seconds: float
    memory: int | None

    def log_probs(self, row: int) -> Tensor:
        """[N_A, V] float64, of one record. Of all of a batch at once they take, with 152,000
        tokens, more than everything else."""
        return self.logits[row].double().log_softmax(-1)


class Examiner:
    """Lets one teacher read problems and answer them from caches of every kind."""

    def __init__(
        self, model: PreTrainedModel, layers: Layers, *, eos: int, max_new_tokens: int
    ) -> None:
        self.teacher = TeacherPass(model)
        self.decoder = SlotDecoder(model)
        self.layers = layers
        self.eos = eos
        self.limit = max_new_tokens

    @property
    def device(self) -> torch.device:
        return self.teacher.model.device

    def read(self, traces: Sequence[Record]) -> Batch:
        """The teacher's caches over questions and chains of thought."""
        cot = self.teacher(traces)
        question, question_at = _place([t.question_ids for t in traces], "left")
        chain, chain_at = _place([t.cot_ids for t in traces], "right")
        questions = torch.tensor([len(t.question_ids) for t in traces])
        chains = torch.tensor([len(t.cot_ids) for t in traces])
        chain_at = torch.where(chain_at < ABSENT, chain_at + questions[:, None], chain_at)
        cache = SlotCache()
        ids, positions = torch.cat((question, chain), 1), torch.cat((question_at, chain_at), 1)
        self.decoder.feed(cache, ids.to(self.device), positions.to(self.device), logits=1)
        slots = CacheBatch.of_records(
            cot.keys,
            cot.values,
            cot.importance,
            cot.offsets,
            traces,
            self.teacher.rotary,
        ).choose_layers(self.layers.chosen)
        start = (questions + chains).to(self.device)
        return Batch(traces, cache, question.shape[1], slots, start)

    def compress(
        self, batch: Batch, policy: Policy, budgets: Sequence[int], codec: Codec
    ) -> CompressedCache:
        """Evict and encode a batch's chains.

        budgets: slots per chosen layer, or per group where layers share.
        """
        layers = self.layers
        targets = evict(
            batch.slots,
            policy,
            budgets,
            select=layers.select,
            share=layers.share,
            groups=None if layers.share == "none" else layers.groups,
        )
        keys, values = encode(targets.keys, codec.keys), encode(targets.values, codec.values)
        starts = torch.tensor(batch.slots.cot_start, device=targets.keys.device)[
            :, None, None, None
        ]
        places = targets.slot_positions.long()
        counts = targets.slot_counts.cpu()  # [B, L', H]
        seen = counts[:, list(layers.row_of.values())].sum((1, 2))  # a merged row has many readers
        heads = self.decoder.config.num_hidden_layers * counts.shape[2]
        slot = _vector_bytes(keys) + _vector_bytes(values) + 4
        return CompressedCache(
            keys=keys,
            values=values,
            positions=torch.where(places < 0, ABSENT, places + starts),
            widths=counts.amax((0, 2)).tolist(),
            tokens=(seen.double() / heads).tolist(),
            bytes=(counts.sum((1, 2)) * slot).tolist(),
        )

    def full(self, batch: Batch) -> SlotCache:
        """The cache of questions and whole chains, as the teacher made it."""
        return batch.cache.columns(0, batch.cache.positions[0].shape[-1])

    def none(self, batch: Batch) -> SlotCache:
        """The cache of the questions alone."""
        return batch.cache.columns(0, batch.question)

    def restore(self, batch: Batch, compressed: CompressedCache) -> SlotCache:
        """Questions and kept slots, decoded and turned to where their tokens stood."""
        cache = self.none(batch)
        keys, values = compressed.keys.dequantise(), compressed.values.dequantise()
        dtype = batch.cache.keys[0].dtype
        for layer, row in self.layers.row_of.items():
            filled = slice(0, compressed.widths[row])
            at = compressed.positions[:, row, :, filled]  # [B, H, M_l]
            turned = self._turn(keys[:, row, :, filled], at, layer, dtype)
            cache.append(layer, turned, values[:, row, :, filled].to(dtype), at)
        return cache

    def examine(
        self, batch: Batch, make: Callable[[], SlotCache], full: Outcome | None = None
    ) -> Outcome:
        """Answer every problem of a batch from the cache that `make` gives.

        full: what came of the full cache, which KL is taken to; None says that this is it.
        The time and memory of `make` count.
        """
        traces = batch.traces
        prompt = torch.tensor([t.answer_prompt_ids for t in traces], device=self.device)
        at = batch.start[:, None] + torch.arange(prompt.shape[1], device=self.device)
        first = batch.start + prompt.shape[1]
        with PeakMemory(self.device) as memory:
            began = time.perf_counter()
            cache = make()
            logits = self.decoder.feed(cache, prompt, at, logits=1)  # [B, 1, V]
            written = self.decoder.greedy(
                cache.fork(), logits[:, -1], first, limit=self.limit, eos=self.eos
            ).tolist()
            seconds = (time.perf_counter() - began) / len(traces)
        logits = self._forced(traces, cache, first, logits)
        outcome = Outcome(
            written=[_ended(row, self.eos) for row in written],
            nll=[],
            kl=[],
            logits=[logits[row, : len(trace.answer_ids)] for row, trace in enumerate(traces)],
            seconds=seconds,
            memory=memory.peak,
        )
        for row, trace in enumerate(traces):
            gold = torch.tensor(trace.answer_ids, device=self.device)
            probs = outcome.log_probs(row)
            if not bool(probs.isfinite().all()):
                raise KavaError(
                    f"problem {trace.id}: expected finite logits, found NaN or infinity. The "
                    "model's dtype or the 16-bit dtype of the cache is too narrow: use float32 or "
                    "bfloat16."
                )
            outcome.nll.append(-float(probs.gather(1, gold[:, None]).mean()))
            reference = probs if full is None else full.log_probs(row)
            outcome.kl.append(float((reference.exp() * (reference - probs)).sum(-1).mean()))
        return outcome

    def _forced(
        self, traces: Sequence[Record], cache: SlotCache, first: Tensor, logits: Tensor
    ) -> Tensor:
        """Logits [B, A, V] of the gold answers behind `cache`, which is extended.

        first: [B], the position of the answers' first token; logits: [B, 1, V], which predict it.
        """
        answers, at = _place([t.answer_ids[:-1] for t in traces], "right")
        if not answers.shape[1]:
            return logits
        answers, at = answers.to(self.device), at.to(self.device)
        at = torch.where(at < ABSENT, at + first[:, None], at)
        rest = self.decoder.feed(cache, answers, at, logits=answers.shape[1])
        return torch.cat((logits, rest), dim=1)

    def full_bytes(self, batch: Batch) -> list[int]:
        """Bytes of each record's full chain in the model's own dtype."""
        keys = batch.cache.keys
        token = 2 * sum(key.shape[1] * key.shape[3] * key.element_size() for key in keys)
        return [token * length for length in batch.slots.lengths]

    def _turn(self, keys: Tensor, at: Tensor, layer: int, dtype: torch.dtype) -> Tensor:
        """Pre-RoPE keys [B, H, M, D] at positions [B, H, M] → post-RoPE, in the model's dtype."""
        rotary = self.teacher.rotary.layers([layer])
        cos, sin = rotary.cos_sin(at.masked_fill(at == ABSENT, 0))  # [1, B, H, M, R/2]
        wide = torch.promote_types(dtype, torch.float32)
        # The model rotates with cosines of its own dtype, and they were un-rotated with the same.
        cos, sin = (x[0].to(dtype).to(wide) for x in (cos, sin))
        return rotate(keys.to(wide), cos, sin).to(dtype)


def alike(traces: Sequence[Record], batch_size: int) -> list[list[int]]:
    """Indices of the traces in batches of equal `n_steps` and similar length.

    A batch of one number of steps is timed for that number of steps. Which traces share a batch
    depends on the traces alone.
    """

    def length(trace: Record) -> int:
        return len(trace.question_ids) + len(trace.cot_ids)

    batches = []
    for steps in sorted({trace.n_steps for trace in traces}):
        those = [i for i, trace in enumerate(traces) if trace.n_steps == steps]
        for chosen in by_length([length(traces[i]) for i in those], batch_size):
            batches.append([those[i] for i in chosen])
    return batches


def _place(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """ids [B, N], padded on `side`, and their positions from 0, ABSENT for padding."""
    ids, mask = pad(rows, side)
    return ids, (mask.cumsum(1) - 1).masked_fill(mask == 0, ABSENT)


def _ended(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row


def _vector_bytes(encoded: EncodedTensor) -> int:
    """Bytes of one stored vector of D numbers, its own scale and zero point included."""
    parts = [encoded.codes]
    if encoded.scale is not None and encoded.zero is not None:
        parts += [encoded.scale, encoded.zero]
    return sum(part.shape[-1] * part.element_size() for part in parts)

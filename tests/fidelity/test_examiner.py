"""A teacher answering from a compressed cache sees exactly what was kept, where it stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig

from kava_core.errors import KavaError
from kava_core.eviction import POLICIES, Policy, group_layers, make_budgets
from kava_core.fidelity.examiner import (
    CompressedCache,
    Examiner,
    Layers,
    Outcome,
    alike,
)
from kava_core.memory import peak_tensor_bytes
from kava_core.models.slot_cache import ABSENT, SlotCache
from kava_core.record import Record
from kava_core.rotary import unrotate
from kava_core.store import Codec
from kava_core.store.codec import encode
from tests.tiny import ARCHITECTURES, COMMON, EOS, assert_near, tiny_model, tiny_trace

EXACT = Codec.from_bits(keys=32, values=32)
ALL = Layers([0, 1, 2], group_layers(3, 1))
# Of different lengths everywhere, and the last longer than the sliding windows of the tiny models.
TRACES = [tiny_trace("a", 5, 9, 3, 1), tiny_trace("b", 11, 4, 2, 2), tiny_trace("c", 40, 20, 4, 3)]


def examiner(name: str, layers: Layers = ALL, dtype: torch.dtype | None = None) -> Examiner:
    return Examiner(tiny_model(name, dtype), layers, eos=EOS, max_new_tokens=6)


def compressed(
    examiner: Examiner,
    traces: Sequence[Record],
    budgets: list[int],
    policy: Policy | None = None,
    codec: Codec = EXACT,
) -> tuple[CompressedCache, SlotCache]:
    batch = examiner.read(traces)
    what = examiner.compress(batch, policy or POLICIES["rkv"](), budgets, codec)
    return what, examiner.restore(batch, what)


def log_probs(outcome: Outcome) -> list[Tensor]:
    return [outcome.log_probs(row) for row in range(len(outcome.logits))]


def answer_logits(examiner: Examiner, traces: Sequence[Record], cache: SlotCache) -> list[Tensor]:
    """Per trace, the log-probabilities [N_A, V] of each answer token."""
    batch = examiner.read(traces)
    return log_probs(examiner.examine(batch, cache.fork))


def plain_logits(examiner: Examiner, trace: Record, hide_chain: bool = False) -> Tensor:
    """The same of an ordinary forward over the whole sequence, without a cache or padding."""
    model = examiner.teacher.model
    head = trace.question_ids + trace.cot_ids
    ids = torch.tensor([head + trace.answer_prompt_ids + trace.answer_ids])
    mask = torch.ones_like(ids)
    if hide_chain:
        mask[:, len(trace.question_ids) : len(head)] = 0
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0]
    first = len(head) + len(trace.answer_prompt_ids) - 1
    return logits[first : first + len(trace.answer_ids)].double().log_softmax(-1)


# --- the semantics ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_full_cache_and_one_that_keeps_every_slot_give_the_models_own_logits(name: str) -> None:
    subject = examiner(name)
    batch = subject.read(TRACES)
    full = subject.examine(batch, lambda: subject.full(batch))
    what, cache = compressed(subject, TRACES, [64] * 3)
    kept = subject.examine(batch, cache.fork, full)
    for row, trace in enumerate(TRACES):
        expected = plain_logits(subject, trace)
        assert_near(full.log_probs(row), expected, 1e-5)
        assert_near(kept.log_probs(row), expected, 1e-5)
        assert abs(kept.kl[row]) < 1e-7
        gold = torch.tensor(trace.answer_ids)
        assert kept.nll[row] == pytest.approx(-float(expected.gather(1, gold[:, None]).mean()))
    assert kept.written == full.written
    assert full.kl == [0.0] * len(TRACES)
    assert what.tokens == [len(t.cot_ids) for t in TRACES]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keeping_nothing_is_masking_the_chain_out(name: str) -> None:
    subject = examiner(name)
    batch = subject.read(TRACES)
    none = log_probs(subject.examine(batch, lambda: subject.none(batch)))
    for trace, found in zip(TRACES, none, strict=True):
        assert_near(found, plain_logits(subject, trace, hide_chain=True), 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3"])
def test_the_greedy_answer_is_the_one_written_without_a_cache(name: str) -> None:
    subject = examiner(name)
    batch = subject.read(TRACES)
    full = subject.examine(batch, lambda: subject.full(batch)).written
    for trace, found in zip(TRACES, full, strict=True):
        ids = trace.question_ids + trace.cot_ids + trace.answer_prompt_ids
        written: list[int] = []
        while len(written) < 6 and EOS not in written:
            with torch.no_grad():
                logits = subject.teacher.model(input_ids=torch.tensor([ids + written])).logits
            written.append(int(logits[0, -1].argmax()))
        assert found == written


# What each layer and key/value head may look at in the naive attention: [S, S] bool.
ALLOWED: dict[int, list[Tensor]] = {}


def naive_attention(module, query, key, value, _, **kwargs):  # type: ignore[no-untyped-def]
    """One head at a time, in float64, by METHOD's formula and the masks in `ALLOWED`."""
    group = query.shape[1] // key.shape[1]
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    outputs = []
    for head in range(query.shape[1]):
        q, k, v = (
            x[0, h].double()
            for x, h in ((query, head), (key, head // group), (value, head // group))
        )
        logits = q @ k.T * scaling
        if kwargs.get("softcap"):
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        allowed = ALLOWED[module.layer_idx][head // group]
        outputs.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v)
    return torch.stack(outputs, dim=1)[None].to(query.dtype), None


AttentionInterface.register("naive", naive_attention)


def naive_logits(examiner: Examiner, trace: Record, kept: list[list[list[int]]]) -> Tensor:
    """The answer's log-probabilities if layer l, head h sees the tokens kept[l][h] of the chain."""
    head = trace.question_ids + trace.cot_ids
    ids = torch.tensor([head + trace.answer_prompt_ids + trace.answer_ids])
    place = torch.arange(ids.shape[1])
    question, end = len(trace.question_ids), len(head)
    for layer, heads in enumerate(kept):
        ALLOWED[layer] = []
        for tokens in heads:
            allowed = place[:, None] >= place
            window = examiner.decoder.windows.get(layer)
            if window:
                allowed &= place[:, None] - place < window
            allowed[end:, question:end] &= torch.tensor(
                [i in tokens for i in range(end - question)]
            )
            ALLOWED[layer].append(allowed)
    model = examiner.teacher.model
    config = model.config
    before, config._attn_implementation = config._attn_implementation, "naive"
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=place[None]).logits[0]
    config._attn_implementation = before
    first = end + len(trace.answer_prompt_ids) - 1
    return logits[first : first + len(trace.answer_ids)].double().log_softmax(-1)


def kept_tokens(what: CompressedCache, row: int, trace: Record) -> list[list[list[int]]]:
    """Per layer and head, the places in the chain that were kept of record `row`."""
    start = len(trace.question_ids)
    return [
        [[p - start for p in head if p != ABSENT] for head in layer]
        for layer in what.positions[row].tolist()
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "budgets", [[1, 1, 1], make_budgets("pyramid", 3, 4)], ids=["one slot", "pyramid"]
)
def test_each_head_sees_its_own_slots_and_nothing_else_of_the_chain(
    name: str, budgets: list[int]
) -> None:
    subject = examiner(name)
    batch = subject.read(TRACES)
    what = subject.compress(batch, POLICIES["random"](), budgets, EXACT)
    found = log_probs(subject.examine(batch, lambda: subject.restore(batch, what)))
    for row, trace in enumerate(TRACES):
        kept = kept_tokens(what, row, trace)
        sizes = [{len(head) for head in layer} for layer in kept]
        assert sizes == [{min(b, len(trace.cot_ids))} for b in budgets]
        assert len({tuple(head) for layer in kept for head in layer}) > 1
        assert_near(found[row], naive_logits(subject, trace, kept), 1e-5)
    cache = subject.restore(batch, what)
    assert [key.shape[2] - batch.question for key in cache.keys] == [min(b, 20) for b in budgets]


def test_a_layer_that_keeps_no_slots_sees_the_question_only() -> None:
    subject = examiner("qwen3", Layers([0, 2], [[0], [1]]))
    what, cache = compressed(subject, TRACES, [3, 2], POLICIES["random"]())
    found = answer_logits(subject, TRACES, cache)
    for row, trace in enumerate(TRACES):
        first, last = kept_tokens(what, row, trace)
        expected = naive_logits(subject, trace, [first, [[]] * len(first), last])
        assert_near(found[row], expected, 1e-5)
    assert what.tokens == [(3 + 0 + 2) / 3] * 3


def test_layers_that_share_a_selection_keep_the_same_tokens() -> None:
    subject = examiner("llama", Layers([0, 1, 2], [[0, 1], [2]], "selection"))
    what, cache = compressed(subject, TRACES, [3, 2])
    found = answer_logits(subject, TRACES, cache)
    for row, trace in enumerate(TRACES):
        kept = kept_tokens(what, row, trace)
        assert kept[0] == kept[1]
        assert_near(found[row], naive_logits(subject, trace, kept), 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_layers_that_share_a_merged_cache_read_it_at_their_own_rotation(name: str) -> None:
    subject = examiner(name, Layers([0, 1, 2], [[0, 1], [2]], "merged"))
    batch = subject.read(TRACES)
    what = subject.compress(batch, POLICIES["attention"](), [3, 2], EXACT)
    cache = subject.restore(batch, what)
    slots = [key[:, :, batch.question :] for key in cache.keys]
    assert [x.shape[2] for x in slots] == [3, 3, 2]
    rotary = subject.teacher.rotary
    for layer in (0, 1):
        at = what.positions[:, 0]
        cos, sin = rotary.layers([layer]).cos_sin(at)
        plain = unrotate(slots[layer].double(), cos[0], sin[0])
        assert_near(plain, what.keys.dequantise()[:, 0], 1e-5)
        values = cache.values[layer][:, :, batch.question :]
        assert_near(values, what.values.dequantise()[:, 0], 1e-6)
    assert what.tokens == [(3 + 3 + 2) / 3] * 3
    vector = 4 * what.keys.length
    assert what.bytes == [(3 + 2) * slots[0].shape[1] * (2 * vector + 4)] * 3


# --- quantisation -------------------------------------------------------------------------------


def test_slots_pass_through_the_codec_before_they_are_turned_back() -> None:
    subject = examiner("llama")
    batch = subject.read(TRACES[2:])
    exact = subject.compress(batch, POLICIES["rkv"](), [64] * 3, EXACT)
    full = torch.stack(subject.full(batch).keys)
    drift, kl = {}, {}
    reference = subject.examine(batch, lambda: subject.full(batch))
    for bits in (32, 16, 8, 4):
        codec = Codec.from_bits(keys=bits, values=bits)
        what = subject.compress(batch, POLICIES["rkv"](), [64] * 3, codec)
        for name in ("keys", "values"):
            expected = encode(getattr(exact, name).dequantise(), getattr(codec, name))
            assert torch.equal(getattr(what, name).dequantise(), expected.dequantise())
        # Everything is kept, so the slots stand where the chain does.
        cache = subject.restore(batch, what)
        drift[bits] = float((torch.stack(cache.keys) - full).norm() / full.norm())
        (kl[bits],) = subject.examine(batch, cache.fork, reference).kl
    assert drift[32] < 1e-6 < drift[16] < drift[8] < 0.01 < drift[4] < 0.2
    assert kl[32] < 1e-9 < kl[16] < kl[8] < kl[4]


@pytest.mark.parametrize(
    ("bits", "half", "vector"),
    [(32, "bfloat16", 32), (16, "float16", 16), (8, "bfloat16", 12), (4, "bfloat16", 8)],
)
def test_bytes_count_codes_scales_zero_points_and_positions(
    bits: int, half: str, vector: int
) -> None:
    subject = examiner("llama")  # D = 8, H = 2, L = 3
    codec = Codec.from_bits(keys=bits, values=16, half=half)
    what, _ = compressed(subject, TRACES, [5, 5, 5], codec=codec)
    assert what.bytes == [min(5, len(t.cot_ids)) * 3 * 2 * (vector + 16 + 4) for t in TRACES]


def test_full_bytes_are_those_of_the_models_dtype() -> None:
    subject = examiner("llama", dtype=torch.bfloat16)
    assert subject.full_bytes(subject.read(TRACES)) == [
        len(t.cot_ids) * 3 * 2 * 2 * 8 * 2 for t in TRACES
    ]


# --- every policy; batches ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_problem_is_answered_alike_alone_and_in_a_padded_batch(policy: str) -> None:
    subject = examiner("qwen2", dtype=torch.float32)
    codec = Codec.from_bits(keys=8, values=8)
    _, cache = compressed(subject, TRACES, [2, 3, 4], POLICIES[policy](), codec)
    together = answer_logits(subject, TRACES, cache)
    for row, trace in enumerate(TRACES):
        _, cache = compressed(subject, [trace], [2, 3, 4], POLICIES[policy](), codec)
        (alone,) = answer_logits(subject, [trace], cache)
        assert_near(alone, together[row], 1e-4)


def test_examining_leaves_the_caches_of_a_batch_as_they_are() -> None:
    subject = examiner("llama")
    batch = subject.read(TRACES)
    first = subject.examine(batch, lambda: subject.full(batch))
    second = subject.examine(batch, lambda: subject.full(batch), first)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    assert first.written == second.written and second.kl == [0.0] * 3
    assert first.seconds > 0 and (first.memory is None or first.memory >= 0)


def test_a_large_vocabulary_is_never_in_float64_for_a_whole_batch() -> None:
    vocabulary, problems = 30_000, 24
    model = tiny_model(LlamaConfig(**{**COMMON, "vocab_size": vocabulary}), torch.float32)
    subject = Examiner(model, ALL, eos=EOS, max_new_tokens=2)
    batch = subject.read([tiny_trace(str(i), 5, 9, 3, i) for i in range(problems)])
    reference = subject.examine(batch, lambda: subject.full(batch))
    logits = 4 * vocabulary * sum(len(trace.answer_ids) for trace in batch.traces)
    peak = peak_tensor_bytes(
        lambda: subject.examine(batch, lambda: subject.none(batch), reference), subject.device
    )
    assert logits < peak < 2.7 * logits  # in float64 they alone would take twice as much


def test_writing_ends_with_the_models_context() -> None:
    trace = tiny_trace("long", 490, 14, 3)
    subject = examiner("gpt2")
    subject.limit = 20
    batch = subject.read([trace])
    (written,) = subject.examine(batch, lambda: subject.full(batch)).written
    # Positions 507 to 511 can be fed, which gives one token more.
    assert len([t for t in written if t != EOS]) <= 6


def test_narrow_dtypes_that_overflow_are_refused() -> None:
    subject = examiner("llama", dtype=torch.float32)
    batch = subject.read(TRACES)
    with pytest.raises(KavaError, match="problem a: expected finite logits"):
        cache = subject.full(batch)
        cache.cache.layers[0].values.mul_(float("inf"))
        subject.examine(batch, lambda: cache)


def test_batches_hold_one_number_of_steps_and_similar_lengths() -> None:
    traces = [replace(tiny_trace(str(i), 3 + i % 4, 5, 2), n_steps=2 + i % 2) for i in range(11)]
    batches = alike(traces, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(11))
    assert all(len({traces[i].n_steps for i in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [3, 3, 3, 2]
    lengths = [[len(traces[i].question_ids) for i in batch] for batch in batches]
    assert all(batch == sorted(batch) for batch in lengths)

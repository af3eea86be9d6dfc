"""The recorded pass against the model's own cache, eager attention and hidden states."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from kava_core.errors import KavaError
from kava_core.memory import peak_tensor_bytes
from kava_core.models.capture import AttentionCall, decoder_layers, recording, teacher_forced
from kava_core.models.teacher_pass import (
    TeacherCache,
    TeacherPass,
    answer_importance,
    attention_windows,
    check_lengths,
)
from kava_core.record import Record
from kava_core.rotary import rotate
from tests.models.plain_keys import plain_keys
from tests.tiny import ARCHITECTURES, COMMON, CONFIGS, assert_near, pad, tiny_model, tiny_trace

TRACES = [
    tiny_trace("long", 9, 20, 3, seed=1),
    tiny_trace("short", 4, 1, 1, seed=2),
    tiny_trace("middle", 6, 7, 5, seed=3),
]


def whole(trace: Record) -> list[int]:
    return trace.question_ids + trace.cot_ids + trace.answer_prompt_ids + trace.answer_ids


def span(trace: Record) -> slice:
    return slice(len(trace.question_ids), len(trace.question_ids) + len(trace.cot_ids))


def of(cache: TeacherCache, row: int) -> slice:
    return slice(int(cache.offsets[row]), int(cache.offsets[row + 1]))


def stacked(cache: DynamicCache, name: str) -> Tensor:
    return torch.stack([getattr(layer, name)[0] for layer in cache.layers], 1)  # [H, L, S, D]


def eager_importance(model: PreTrainedModel, trace: Record) -> Tensor:
    """[N_C, L, H] from the whole attention matrices, one head and one answer row at a time."""
    model = copy.deepcopy(model)
    model.config._attn_implementation = "eager"
    attentions = model(
        torch.tensor([whole(trace)]), output_attentions=True, use_cache=False
    ).attentions
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    group = model.config.num_attention_heads // heads
    colon = span(trace).stop + len(trace.answer_prompt_ids) - 1
    layers = []
    for attention in attentions:  # [1, H_q, S, S]
        per_head = []
        for head in range(heads):
            rows = []
            for row in range(colon, colon + len(trace.answer_ids)):
                members = attention[0, head * group : (head + 1) * group, row, span(trace)].double()
                rows.append((members / members.sum(-1, keepdim=True)).amax(0))
            per_head.append(torch.stack(rows).mean(0))
        layers.append(torch.stack(per_head, 1))
    return torch.stack(layers, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_gives_each_trace_what_the_model_itself_gives_it_alone(name: str) -> None:
    model = tiny_model(name)
    teacher = TeacherPass(model)
    got = teacher(TRACES)
    for row, trace in enumerate(TRACES):
        own = DynamicCache()
        hidden = model(
            torch.tensor([whole(trace)]),
            past_key_values=own,
            use_cache=True,
            output_hidden_states=True,
        ).hidden_states
        at = torch.arange(span(trace).start, span(trace).stop)
        cos, sin = (x.transpose(0, 1)[:, :, None] for x in teacher.rotary.cos_sin(at))
        keys, values = (
            stacked(own, kind).permute(2, 1, 0, 3)[at] for kind in ("keys", "values")
        )  # [N_C, L, H, D]
        assert_near(rotate(got.keys[of(got, row)], cos, sin), keys, 1e-5)
        assert_near(got.values[of(got, row)], values, 1e-5)
        colon = span(trace).stop + len(trace.answer_prompt_ids) - 1
        assert whole(trace)[colon] == trace.answer_prompt_ids[-1]
        assert_near(got.endpoint[row], torch.stack([h[0, colon] for h in hidden]), 1e-5)
        importance = got.importance[of(got, row)]
        assert importance.dtype == torch.float32
        assert_near(importance, eager_importance(model, trace), 1e-5)
        assert bool((importance.sum(0) >= 1 - 1e-5).all())


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "gpt2"])
def test_stored_keys_are_those_before_rotation(name: str) -> None:
    model = tiny_model(name)
    got = TeacherPass(model)(TRACES)
    for row, trace in enumerate(TRACES):
        with plain_keys(model) as plain:
            model(torch.tensor([whole(trace)]))
        expected = torch.stack([plain[i][0, span(trace)] for i in range(3)], 1)
        assert_near(got.keys[of(got, row)], expected, 1e-5)


@torch.no_grad()
def test_gpt2_keys_are_stored_as_they_are() -> None:
    model = tiny_model("gpt2")
    got = TeacherPass(model)(TRACES[:1])
    own = DynamicCache()
    model(torch.tensor([whole(TRACES[0])]), past_key_values=own, use_cache=True)
    expected = stacked(own, "keys").permute(2, 1, 0, 3)[span(TRACES[0])]
    assert_near(got.keys, expected, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_equals_one_by_one_in_any_company(name: str) -> None:
    teacher = TeacherPass(tiny_model(name))
    batch = teacher(TRACES)
    assert batch.offsets.tolist() == [0, 20, 21, 28]
    for row, trace in enumerate(TRACES):
        alone = teacher([trace])
        assert_near(batch.keys[of(batch, row)], alone.keys, 1e-5)
        assert_near(batch.values[of(batch, row)], alone.values, 1e-5)
        assert_near(batch.importance[of(batch, row)], alone.importance, 1e-5)
        assert_near(batch.endpoint[row : row + 1], alone.endpoint, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_models(name: str) -> None:
    model = tiny_model(name, torch.bfloat16)
    teacher = TeacherPass(model)
    got = teacher(TRACES[:1])
    trace = TRACES[0]
    own = DynamicCache()
    model(torch.tensor([whole(trace)]), past_key_values=own, use_cache=True)
    at = torch.arange(span(trace).start, span(trace).stop)
    cos, sin = (x.transpose(0, 1)[:, :, None] for x in teacher.rotary.cos_sin(at))
    cos, sin = cos.bfloat16().float(), sin.bfloat16().float()  # those that the model used
    assert got.keys.dtype == torch.float32
    # The very numbers of the cache: nothing is lost beyond float32.
    assert_near(
        rotate(got.keys, cos, sin), stacked(own, "keys").permute(2, 1, 0, 3)[at].float(), 1e-5
    )
    assert torch.equal(got.values, stacked(own, "values").permute(2, 1, 0, 3)[at])
    assert got.endpoint.dtype == torch.bfloat16
    eager = eager_importance(model, trace)
    assert_near(got.importance[:, 0], eager[:, 0], 0.03)
    assert_near(got.importance, eager, 0.2)  # SDPA and eager round apart from layer to layer


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_endpoint_is_to_the_bit_what_the_model_returns(name: str, dtype: torch.dtype) -> None:
    """Of all levels: the embedding's, before any layer, and the last one's, normed."""
    model = tiny_model(name, dtype)
    ids, _ = pad([whole(trace) for trace in TRACES])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    at = torch.tensor([31, 0, 9])
    states = model.base_model(
        input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False
    ).hidden_states
    found, _ = teacher_forced(model, ids, positions, at)
    assert torch.equal(found, torch.stack([h[[0, 1, 2], at] for h in states], dim=1))
    assert found.dtype == dtype
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))


def test_hidden_states_that_nobody_reads_are_not_kept() -> None:
    """The whole pass takes a fraction of what all levels at all positions would."""
    layers, width, rows = 24, 256, 4
    config = {**COMMON, "hidden_size": width, "num_hidden_layers": layers, "head_dim": 8}
    teacher = TeacherPass(tiny_model(LlamaConfig(**config), torch.float32))
    traces = [tiny_trace(str(i), 40, 50, 5, seed=i) for i in range(rows)]
    taken = peak_tensor_bytes(lambda: teacher(traces), torch.device("cpu"))
    assert taken < 0.5 * rows * len(whole(traces[0])) * (layers + 1) * width * 4


# --- recording itself ----------------------------------------------------------------------------


class Keep:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def record(self, call: AttentionCall) -> None:
        self.seen[call.layer] = (call.query, call.key, call.value)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"),  # SDPA cannot cap Gemma-2's logits
    [(n, a) for n in ARCHITECTURES for a in ("sdpa", "eager") if (n, a) != ("gemma2", "sdpa")],
)
def test_recording_changes_no_bit_and_sees_the_cache(
    name: str, masked: bool, attention: str
) -> None:
    model = tiny_model(name, torch.float32)
    model.config._attn_implementation = attention
    ids, mask = pad([[11, 12, 13, 14, 15], [16, 17]], "left")
    given = {"attention_mask": mask} if masked else {}
    plain = model(ids, past_key_values=DynamicCache(), use_cache=True, **given)
    recorder = Keep()
    with recording(model, recorder):
        recorded = model(ids, past_key_values=DynamicCache(), use_cache=True, **given)
    assert torch.equal(recorded.logits, plain.logits)
    assert sorted(recorder.seen) == [0, 1, 2]
    for layer, (query, key, value) in recorder.seen.items():
        assert query.shape == (2, 4, 5, 8)
        assert torch.equal(key, plain.past_key_values.layers[layer].keys)
        assert torch.equal(value, plain.past_key_values.layers[layer].values)
    assert model.config._attn_implementation == attention


def test_recording_ends_with_the_context_even_after_an_error() -> None:
    model = tiny_model("llama")
    recorder = Keep()
    with pytest.raises(RuntimeError, match="stop"), recording(model, recorder):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    model(torch.tensor([[3, 4]]))
    assert recorder.seen == {}


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_other_attention_is_refused(attention: str) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = attention
    with pytest.raises(KavaError, match=f"uses {attention} attention; load it with sdpa or eager"):
        TeacherPass(model)
    with pytest.raises(KavaError, match=attention), recording(model, Keep()):
        pass


# --- importance ----------------------------------------------------------------------------------


def naive_importance(
    query: Tensor, key: Tensor, rows: list[int], cot: slice, scaling: float, softcap: float | None
) -> Tensor:
    """[H, S] of one record, by METHOD's words."""
    hq, h = len(query), len(key)
    importance = torch.zeros(h, key.shape[1], dtype=torch.float64)
    for head in range(h):
        for row in rows:
            best = torch.zeros(cot.stop - cot.start, dtype=torch.float64)
            for member in range(head * (hq // h), (head + 1) * (hq // h)):
                logits = scaling * key[head, cot].double() @ query[member, row].double()
                if softcap is not None:
                    logits = softcap * (logits / softcap).tanh()
                best = torch.maximum(best, logits.softmax(0))
            importance[head, cot] += best / len(rows)
    return importance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_importance_is_methods_formula_whatever_lies_outside_the_trace(
    softcap: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 12, 4, generator=generator).mul(3).to(dtype)
    key = torch.randn(2, 2, 12, 4, generator=generator).to(dtype)
    cots = [slice(3, 7), slice(1, 9)]
    answers = [[8, 9, 10], [10]]
    expected = [
        naive_importance(query[b], key[b], answers[b], cots[b], 0.7, softcap) for b in range(2)
    ]
    for b in range(2):  # padding and everything else that is not the trace
        outside = torch.ones(12, dtype=torch.bool)
        outside[cots[b]] = False
        key[b, :, outside] = torch.nan
    got = answer_importance(
        AttentionCall(0, query, key, key, None, 0.7, softcap),
        rows=torch.tensor([[8, 9, 10], [10, 10, 10]]),
        row_mask=torch.tensor([[True, True, True], [True, False, False]]),
        cot_start=torch.tensor([3, 1]),
        cot_length=torch.tensor([4, 8]),
    )
    assert got.dtype == torch.float32
    assert_near(got, torch.stack(expected), 1e-5)
    assert bool((got[0, :, :3] == 0).all() and (got[0, :, 7:] == 0).all())


# --- what a teacher cannot do --------------------------------------------------------------------


def test_a_trace_beyond_a_sliding_window_is_refused_by_name() -> None:
    fits = tiny_trace("fits", 200, 40, 5)  # 40 + 3 + 5 = 48, the window; the question is free
    check_lengths([fits], CONFIGS["gemma2"])
    with pytest.raises(KavaError, match=r"problem p7 span 49 tokens.*window of 48 in layer 0"):
        check_lengths([fits, tiny_trace("p7", 5, 41, 5)], CONFIGS["gemma2"])
    with pytest.raises(KavaError, match=r"problem p8 .* sliding window of 64"):
        check_lengths([tiny_trace("p8", 5, 70, 5)], CONFIGS["mistral"])
    for name in ("llama", "qwen2", "qwen3", "gpt2"):  # no window
        check_lengths([tiny_trace("p8", 5, 70, 5)], CONFIGS[name])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_importance_is_exact_up_to_the_longest_trace_allowed(name: str) -> None:
    model = tiny_model(name)
    window = model.config.sliding_window
    trace = tiny_trace("edge", 30, window - 8, 5)
    check_lengths([trace], model.config)
    got = TeacherPass(model)([trace])
    assert_near(got.importance, eager_importance(model, trace), 1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trace_beyond_the_context_is_refused_by_name(name: str) -> None:
    check_lengths([tiny_trace("fits", 480, 10, 19)], CONFIGS[name])  # 512
    with pytest.raises(KavaError, match=r"problem p9 takes 513 positions .* context is 512"):
        check_lengths([tiny_trace("p9", 480, 10, 20)], CONFIGS[name])


def test_windows_by_layer() -> None:
    assert attention_windows(CONFIGS["llama"]) == {}
    assert attention_windows(CONFIGS["gpt2"]) == {}
    assert attention_windows(CONFIGS["qwen2"]) == {}
    assert attention_windows(CONFIGS["mistral"]) == {0: 64, 1: 64, 2: 64}
    assert attention_windows(CONFIGS["gemma2"]) == {0: 48, 2: 48}
    assert attention_windows(CONFIGS["gemma3"]) == {0: 48, 2: 48}


def test_layers_without_keys_and_values_per_token_are_refused() -> None:
    config = LlamaConfig(**COMMON)
    config.layer_types = ["linear_attention", "full_attention", "chunked_attention"]
    with pytest.raises(KavaError, match="layers of kind chunked_attention, linear_attention"):
        attention_windows(config)

"""Which rotations are understood, and that everything else is refused before a key is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from kava_core.errors import KavaError
from kava_core.models.phase import rotary_of, rotates
from kava_core.models.teacher_pass import TeacherPass
from kava_core.rotary import Rotary
from tests.models.plain_keys import plain_keys
from tests.tiny import ARCHITECTURES, COMMON, CONFIGS, assert_near, tiny_model, tiny_trace

TRACE = tiny_trace("t", 60, 30, 2)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def tiny_config(model_type: str, **settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**COMMON, **settings})


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "settings", "turned"),
    [
        ("llama", {}, 4),
        ("llama", {"rope_parameters": LINEAR}, 4),
        ("llama", {"rope_parameters": YARN}, 4),
        ("phi", {"rope_parameters": HALF}, 2),
        ("stablelm", {"rope_parameters": HALF}, 2),
        ("olmo2", {}, 4),
        ("starcoder2", {}, 4),
        ("granite", {"attention_multiplier": 0.5}, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keys_are_un_rotated_to_what_they_were(
    model_type: str, settings: dict, turned: int, dtype: torch.dtype
) -> None:
    model = tiny_model(tiny_config(model_type, **settings), dtype)
    got = TeacherPass(model)([TRACE])
    assert rotary_of(model).inv_freq.shape == (3, turned)
    with plain_keys(model) as plain:
        model(
            torch.tensor(
                [TRACE.question_ids + TRACE.cot_ids + TRACE.answer_prompt_ids + TRACE.answer_ids]
            )
        )
    expected = torch.stack([plain[i][0, 60:90] for i in range(3)], 1)
    if model_type == "olmo2":  # its norm spans all heads and comes before they are parted
        expected = expected.reshape(got.keys.shape)
    assert_near(got.keys, expected, 0.02 if dtype == torch.bfloat16 else 1e-5)


def test_fused_projections_with_partial_rotation_are_understood() -> None:
    model = tiny_model(tiny_config("gpt_neox", rope_parameters=HALF))
    assert rotary_of(model).inv_freq.shape == (3, 2)
    assert rotary_of(tiny_model(tiny_config("phi3"))).inv_freq.shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_yarn_scales_cosines_by_the_models_own_factor(dtype: torch.dtype) -> None:
    model = tiny_model(tiny_config("llama", rope_parameters=YARN), dtype)
    factor = model.base_model.rotary_emb.attention_scaling
    assert factor > 1.1
    assert rotary_of(model).scaling.tolist() == [factor] * 3


def test_gemma3_turns_its_layers_by_two_bases() -> None:
    inv_freq = rotary_of(tiny_model("gemma3")).inv_freq
    assert torch.equal(inv_freq[0], inv_freq[2])
    step = torch.arange(4) / 4
    assert_near(inv_freq[0], 10_000.0**-step, 1e-6)
    assert_near(inv_freq[1], 1_000_000.0**-step, 1e-6)


def test_llama3_scaling_slows_the_low_frequencies() -> None:
    scaled, plain = (rotary_of(tiny_model(n)).inv_freq[0] for n in ("llama-tied-scaled", "llama"))
    assert float(scaled[0]) == pytest.approx(float(plain[0]))
    assert float(scaled[-1]) == pytest.approx(float(plain[-1]) / 8)


def test_learned_positions_turn_nothing() -> None:
    rotary = rotary_of(tiny_model("gpt2"))
    assert rotary.inv_freq.shape == (3, 0)
    cos, sin = Rotary.from_json(rotary.to_json()).cos_sin(torch.arange(5))
    assert cos.shape == sin.shape == (3, 5, 0)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gpt_neox", "phi3", "opt"])
def test_a_configuration_tells_whether_keys_are_turned(name: str) -> None:
    config = CONFIGS[name] if name in CONFIGS else tiny_config(name)
    assert rotates(config) == bool(rotary_of(tiny_model(config)).inv_freq.shape[1])
    assert rotates(config) == (name not in ("gpt2", "opt"))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("llama", {"rope_parameters": DYNAMIC}, "rope_type=dynamic, whose frequencies change"),
        ("glm", {"head_dim": 8}, "interleaved"),
        ("ernie4_5", {}, "interleaved"),
        ("cohere", {}, "not one this library can undo"),
        # Every fourth layer of this one is handed the angles and does not use them.
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}, "layer 3, does not"),
        (
            "deepseek_v3",
            {
                "num_key_value_heads": 4,
                "q_lora_rank": None,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "n_routed_experts": 4,
                "first_k_dense_replace": 3,
            },
            "does not rotate its keys as its frequencies say",
        ),
    ],
)
def test_other_rotations_are_refused(model_type: str, settings: dict, reason: str) -> None:
    model = tiny_model(tiny_config(model_type, **settings), torch.float32)
    with pytest.raises(KavaError, match=reason):
        rotary_of(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_probe_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_model(name).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attention = model.config._attn_implementation
    rotary_of(model)
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())

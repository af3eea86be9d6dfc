"""What a stage is stopped by before it makes anything, on models that stand for each reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, Gemma3nTextConfig, Gemma4TextConfig, PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.context import context_of
from kava_core.models.loading import cache_shape
from kava_core.models.phase import rotary_of
from kava_core.models.proofs import (
    prove_asked,
    prove_capture,
    prove_latents,
    prove_slots,
    prove_teacher,
)
from kava_core.models.slot_cache import SlotCache, SlotDecoder
from kava_core.models.teacher_pass import TeacherPass
from kava_core.targets.generate import store_geometry
from tests.tiny import ARCHITECTURES, COMMON, tiny_model, tiny_student, tiny_trace

TRACE = tiny_trace("t", 5, 6, 2)


def of_type(model_type: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    return tiny_model(config, torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_the_promised_architectures_pass(name: str) -> None:
    model = tiny_model(name).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rotary = prove_teacher(model)
    assert torch.equal(rotary.inv_freq, rotary_of(model).inv_freq)
    student = tiny_student(name)
    prove_latents(student)
    prove_slots(student)
    assert model.training and not student.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_half_precision_passes(name: str) -> None:
    prove_teacher(tiny_model(name, torch.bfloat16))


def test_attention_called_twice_is_refused_before_a_shard_and_in_the_pass() -> None:
    model = of_type("diffllama")
    with pytest.raises(KavaError, match=r"diffllama, layer 0, calls .* 2 times .*\(3 of 3 layers"):
        prove_capture(model)
    with pytest.raises(KavaError, match="expected once"):
        TeacherPass(model)
    prove_asked(model)  # it can still learn


def test_a_pass_that_calls_attention_twice_does_not_keep_the_second() -> None:
    """Even of a model that did not when it was looked at."""
    teacher = TeacherPass(tiny_model("llama"))
    layer = teacher.model.model.layers[1].self_attn
    forward = layer.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    layer.forward = twice
    with pytest.raises(KavaError, match="layer 1 called transformers' attention interface twice"):
        teacher([TRACE])


def test_layers_that_are_handed_other_hidden_states_than_are_returned_are_refused() -> None:
    model = tiny_model("llama")

    def doubled(_: nn.Module, __: Any, output: Any) -> Any:
        first, second, *rest = output.hidden_states or (None, None)
        if second is not None:
            output.hidden_states = (first, 2 * second, *rest)
        return output

    model.model.register_forward_hook(doubled)
    with pytest.raises(KavaError, match="llama hands its layers other hidden states than those"):
        prove_capture(model)


def test_layers_that_cannot_be_found_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(KavaError, match="llama has no list of 3 layers that say their number"):
        prove_capture(model)


def test_attention_outside_the_interface_is_refused() -> None:
    with pytest.raises(KavaError, match="calls transformers' attention interface 0 times"):
        prove_capture(of_type("gpt_neo", num_layers=3, attention_types=[[["global"], 3]]))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("doge", {}, "adds numbers of its own to its attention's logits"),
        ("bert", {"num_key_value_heads": 4}, "bert looks ahead"),
        ("jetmoe", {"num_key_value_heads": 2, "kv_channels": 8}, r"keeps keys of 4 heads × 8, exp"),
        (
            "mimo_v2_flash",
            {
                "head_dim": 16,
                "v_head_dim": 8,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "layer_types": ["full_attention"] * 3,
                "mlp_layer_types": ["dense"] * 3,
            },
            "keeps values of 2 heads × 8, expected 2 × 16",
        ),
    ],
)
def test_what_would_be_recorded_wrongly_is_refused(
    model_type: str, settings: dict[str, Any], reason: str
) -> None:
    model = of_type(model_type, **settings)
    with pytest.raises(KavaError, match=reason):
        prove_capture(model)


def test_afmoe_hands_its_mask_over_by_keyword_and_is_asked() -> None:
    model = of_type(
        "afmoe",
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        num_dense_layers=1,
        layer_types=["sliding_attention"] * 3,
    )
    prove_teacher(model)  # with a layer of full attention it does not rotate there


def test_layers_with_heads_of_other_sizes_are_refused_by_the_configuration() -> None:
    config = Gemma4TextConfig()
    with pytest.raises(KavaError, match="gemma4_text differ in the number or size of their heads"):
        cache_shape(config)
    with pytest.raises(KavaError, match="one size in all layers"):
        store_geometry(config)


def test_layers_that_share_a_cache_are_refused() -> None:
    config = Gemma3nTextConfig(
        **{**COMMON, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        head_dim=8,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = tiny_model(config, torch.float32)
    with pytest.raises(KavaError, match="4 layers and caches keys and values for 2"):
        prove_capture(model)


def test_a_hybrid_that_is_only_asked_gets_a_sentence() -> None:
    model = of_type(
        "qwen3_next",
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    with pytest.raises(KavaError, match="qwen3_next has layers of kind linear_attention"):
        prove_asked(model)


def test_a_model_that_needs_ids_is_refused_as_a_student() -> None:
    """Here the embedding of a token is scaled on its way only when ids come in."""
    model = tiny_model("llama")
    embed = model.get_input_embeddings()

    def scaled(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids: Tensor | None = kwargs.pop("input_ids", None)
        if ids is None:
            return args, kwargs
        return (), {**kwargs, "inputs_embeds": 2 * embed(ids)}

    model.model.register_forward_pre_hook(scaled, with_kwargs=True)
    with pytest.raises(KavaError, match="gives other logits when it reads embeddings"):
        prove_asked(model)


def test_latents_without_comparable_keys_can_still_be_taught() -> None:
    model = of_type("cohere")
    student = tiny_student("llama")
    student.decoder, student.config.decoder_config = model, model.config.to_dict()
    student.double()
    prove_latents(student)
    with pytest.raises(KavaError, match="not one this library can undo"):
        prove_slots(student)


def test_a_mask_of_the_models_own_is_not_dropped_over_a_compressed_cache() -> None:
    decoder = SlotDecoder(of_type("doge"))
    with pytest.raises(KavaError, match="DogeAttention makes an attention mask of its own"):
        decoder.feed(SlotCache(), torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), 1)


def test_a_bound_that_is_none_is_no_context() -> None:
    assert context_of(AutoConfig.for_model("xlnet")) is None

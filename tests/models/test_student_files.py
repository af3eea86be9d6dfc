"""A student written to disk and read back is the same student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kava_core.models.latent import LatentReasoner
from tests.tiny import ARCHITECTURES, assert_near, pad, tiny_model, tiny_student

QUESTION = pad([[11, 12, 13, 14, 15], [16, 17]], "left")
ANSWER = pad([[18, 2], [19, 20, 2]])


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    student = tiny_student(name).to(torch.float32)
    expected = student(*QUESTION, *ANSWER).logits
    student.save_pretrained(tmp_path)
    loaded, report = LatentReasoner.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded(*QUESTION, *ANSWER).logits, expected)
    automatic = AutoModel.from_pretrained(tmp_path)
    assert isinstance(automatic, LatentReasoner)
    assert not automatic.training
    tokens = student.generate(*QUESTION, max_new_tokens=4).tokens
    assert torch.equal(automatic.generate(*QUESTION, max_new_tokens=4).tokens, tokens)
    assert (
        automatic.decoder.config._attn_implementation == student.decoder.config._attn_implementation
    )


@pytest.mark.parametrize("name", ["llama-tied-scaled", "gemma2", "gemma3", "gpt2"])
def test_tied_embeddings_are_stored_once_and_stay_tied(name: str, tmp_path: Path) -> None:
    student = tiny_student(name)
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert "decoder.lm_head.weight" not in stored
    assert stored == {path for path, _ in student.named_parameters()}
    loaded = LatentReasoner.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_untied_embeddings_stay_apart(tmp_path: Path) -> None:
    tiny_student("llama").save_pretrained(tmp_path)
    loaded = LatentReasoner.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_weight_has_the_dtype_asked_for_and_frequencies_stay_float32(
    name: str, stored: torch.dtype, asked: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(name, stored).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=stored)
    student = LatentReasoner.from_teacher(
        teacher,
        latents=4,
        iterations=1,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=[5, 6],
        eos_token_id=2,
        seed=0,
    )
    student.save_pretrained(tmp_path / "student")
    loaded = LatentReasoner.from_pretrained(tmp_path / "student", dtype=asked)
    frequencies = {k: v for k, v in teacher.named_buffers() if k.endswith("inv_freq")}
    assert frequencies
    for model, dtype in ((student, stored), (loaded, asked)):
        assert {p.dtype for p in model.parameters()} == {dtype}
        own = dict(model.decoder.named_buffers())
        for path, inv_freq in frequencies.items():
            assert own[path].dtype == torch.float32
            assert torch.equal(own[path], inv_freq)
    if stored == asked:
        with torch.no_grad():
            assert torch.equal(
                loaded(*QUESTION, *ANSWER).logits, student(*QUESTION, *ANSWER).logits
            )


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_follows_float32(name: str) -> None:
    student = tiny_student(name).to(torch.float32)
    exact = student(*QUESTION, *ANSWER)
    half = tiny_student(name)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rough = half(*QUESTION, *ANSWER)
    assert rough.logits.dtype == torch.bfloat16
    # Before the second iteration rounding errors have passed the layers once: the first layer's
    # values of the first latent depend on the question's hidden state alone.
    assert_near(rough.keys[0][:, :, 0].float(), exact.keys[0][:, :, 0], 0.1)
    assert bool(half.slot_keys(rough, "pre_rope").isfinite().all())
    assert half.generate(*QUESTION, max_new_tokens=3).tokens.shape[0] == 2


@torch.no_grad()
def test_merged_lora_is_written_as_plain_weights(tmp_path: Path) -> None:
    student = tiny_student("llama-tied-scaled")
    lora = LoraModel(
        student.decoder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "default"
    )
    for path, parameter in student.decoder.named_parameters():
        if "lora_B" in path:
            parameter.normal_(0, 0.1)
    trained = student(*QUESTION, *ANSWER).logits
    student.decoder = lora.merge_and_unload()
    student.save_pretrained(tmp_path)
    loaded, report = LatentReasoner.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_near(loaded(*QUESTION, *ANSWER).logits, trained)
    untrained = tiny_student("llama-tied-scaled")(*QUESTION, *ANSWER).logits
    assert float((trained - untrained).abs().max()) > 0.01


def test_the_configuration_is_a_text_configuration_to_transformers(tmp_path: Path) -> None:
    """PEFT and the Trainer ask for it."""
    student = tiny_student("llama")
    assert student.config.get_text_config() is student.config
    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict()["decoder_config"]["model_type"] == "llama"
    for name in ("latents", "iterations", "reasoning", "projection", "per_position"):
        assert getattr(config, name) == getattr(student.config, name)
    assert config.answer_prompt_ids == student.config.answer_prompt_ids
    assert config.eos_token_id == student.config.eos_token_id


def test_the_same_seed_gives_the_same_student_and_the_teachers_weights() -> None:
    one, same, other = (tiny_student("qwen2", seed=s) for s in (0, 0, 1))
    teacher = tiny_model("qwen2").state_dict()
    for path, weight in one.decoder.state_dict().items():
        assert torch.equal(weight, teacher[path])
    for path in ("bot", "eot", "initial_latents", "projection.up.weight"):
        assert torch.equal(one.get_parameter(path), same.get_parameter(path))
        assert not torch.equal(one.get_parameter(path), other.get_parameter(path))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_latents_enter_at_the_scale_of_embeddings(name: str) -> None:
    student = tiny_student(name)
    embeddings = student.get_input_embeddings()(torch.arange(8, 64))
    latents = student.projection(torch.randn(100, 32, dtype=torch.float64))
    for tensor in (student.initial_latents, latents):
        assert float(tensor.std() / embeddings.std()) == pytest.approx(1, abs=0.25)

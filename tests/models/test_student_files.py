"""A student written to disk and read back is the same student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kava_core.artefacts import read_json, write_json
from kava_core.errors import KavaError
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
    loaded = LatentReasoner.from_pretrained(tmp_path)
    assert torch.equal(loaded(*QUESTION, *ANSWER).logits, expected)
    assert not loaded.training
    written = student.generate(*QUESTION, max_new_tokens=4)
    assert torch.equal(loaded.generate(*QUESTION, max_new_tokens=4), written)
    assert loaded.decoder.config._attn_implementation == student.decoder.config._attn_implementation


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoder_is_one_that_transformers_knows(name: str, tmp_path: Path) -> None:
    student = tiny_student(name)
    student.save_pretrained(tmp_path)
    decoder, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(decoder) is type(student.decoder)
    own = student.decoder.state_dict()
    for path, weight in decoder.state_dict().items():
        assert torch.equal(weight, own[path])
    assert decoder.generation_config.eos_token_id == student.config.eos_token_id
    assert not decoder.generation_config.do_sample
    assert "auto_map" not in read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["llama-tied-scaled", "gemma2", "gemma3", "gpt2"])
def test_tied_embeddings_are_stored_once_and_stay_tied(name: str, tmp_path: Path) -> None:
    student = tiny_student(name)
    student.save_pretrained(tmp_path)
    stored = set()
    for file, prefix in (("model.safetensors", "decoder."), ("latents.safetensors", "")):
        with safe_open(tmp_path / file, "pt") as opened:
            stored |= {prefix + key for key in opened.keys()}  # noqa: SIM118
    assert "decoder.lm_head.weight" not in stored
    assert stored == {path for path, _ in student.named_parameters()}
    loaded = LatentReasoner.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_untied_embeddings_stay_apart(tmp_path: Path) -> None:
    tiny_student("llama").save_pretrained(tmp_path)
    loaded = LatentReasoner.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight


def test_big_weights_are_cut_and_all_files_are_readable(tmp_path: Path) -> None:
    student = tiny_student("qwen2")
    student.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert len({file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}) == 1
    for found in (LatentReasoner.from_pretrained(tmp_path).decoder, student.decoder):
        for path, weight in found.state_dict().items():
            assert torch.equal(weight, student.decoder.state_dict()[path])
    # written over by a student without latents, nothing of the old one is left
    plain = tiny_student("qwen2", latents=0)
    plain.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("latents.safetensors"), *tmp_path.glob("model-*")]
    question = QUESTION[0][:1]
    assert torch.equal(
        LatentReasoner.from_pretrained(tmp_path).generate(question), plain.generate(question)
    )


@torch.no_grad()
def test_the_attention_asked_for_is_used(tmp_path: Path) -> None:
    tiny_student("llama").save_pretrained(tmp_path)
    logits = {}
    for name in ("eager", "sdpa"):
        # not in float64, in which the eager mask turns padding into NaN
        loaded = LatentReasoner.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation=name
        )
        assert loaded.decoder.config._attn_implementation == name
        logits[name] = loaded(*QUESTION, *ANSWER).logits
    assert_near(logits["eager"], logits["sdpa"])


def rewritten(path: Path, **changes: Tensor | None) -> None:
    """The tensors of a file with some replaced, and those that are None taken out."""
    tensors = {**load_file(path), **changes}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


SETTINGS = {
    "reasoning": ("magic", "reasoning cannot be 'magic'"),
    "latents": (5, r"expected initial_latents of shape \[5, 32\], found \[4, 32\]"),
    "projection": (False, "latents.safetensors has too much: projection.down.bias"),
    "iterations": (-1, "iterations cannot be -1"),
    "answer_prompt_ids": (["5"], r"answer_prompt_ids cannot be \['5'\]"),
    "format_version": (2, "expected format_version 1, found 2"),
    "color": ("red", "expected latents, iterations, .* found .*color"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    tiny_student("llama").save_pretrained(tmp_path)
    value, said = SETTINGS[name]
    about = read_json(tmp_path / "latents.json")
    write_json(tmp_path / "latents.json", {**about, name: value})
    with pytest.raises(KavaError, match=said):
        LatentReasoner.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    tiny_student("llama").save_pretrained(tmp_path)
    path = tmp_path / "latents.safetensors"
    whole = path.read_bytes()
    rewritten(path, eot=None)
    with pytest.raises(KavaError, match=r"latents\.safetensors lacks eot"):
        LatentReasoner.from_pretrained(tmp_path)
    path.write_bytes(whole)
    rewritten(path, bot=torch.zeros(31))
    with pytest.raises(KavaError, match=r"expected bot of shape \[32\], found \[31\]"):
        LatentReasoner.from_pretrained(tmp_path)
    path.write_bytes(whole[:100])
    with pytest.raises(KavaError, match="cannot be read"):
        LatentReasoner.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(KavaError, match=r"it has no latents\.safetensors"):
        LatentReasoner.from_pretrained(tmp_path)
    (tmp_path / "latents.json").unlink()
    with pytest.raises(KavaError, match=r"it has no latents\.json"):
        LatentReasoner.from_pretrained(tmp_path)


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
    assert half.generate(*QUESTION, max_new_tokens=3).shape[0] == 2


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
    loaded = LatentReasoner.from_pretrained(tmp_path)
    assert_near(loaded(*QUESTION, *ANSWER).logits, trained)
    untrained = tiny_student("llama-tied-scaled")(*QUESTION, *ANSWER).logits
    assert float((trained - untrained).abs().max()) > 0.01


def test_the_configuration_is_a_text_configuration_to_transformers(tmp_path: Path) -> None:
    """PEFT and the Trainer ask for it; what it says comes back from a folder."""
    student = tiny_student("llama", reasoning="sequential", per_position=False)
    assert student.config.get_text_config() is student.config
    student.config.eos_token_id = [2, 7]
    student.save_pretrained(tmp_path)
    config = LatentReasoner.from_pretrained(tmp_path).config
    for name in ("latents", "iterations", "reasoning", "projection", "per_position"):
        assert getattr(config, name) == getattr(student.config, name)
    assert config.answer_prompt_ids == student.config.answer_prompt_ids
    assert config.eos_token_id == [2, 7]


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

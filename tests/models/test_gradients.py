"""The KV loss trains everything that made the latents' keys and values, and nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from tests.tiny import ARCHITECTURES, assert_near, pad, tiny_model, tiny_student

QUESTION = pad([[11, 12, 13, 14, 15], [16, 17]], "left")
ANSWER = pad([[18, 2], [19, 20, 2]])


def kv_loss(
    student: LatentReasoner,
    kind: str = "l1",
    phase: str = "pre_rope",
    question: tuple[Tensor, Tensor] = QUESTION,
) -> Tensor:
    """Distance of the latents' keys and values to fixed targets."""
    reasoning = student(*question, *ANSWER)
    keys, values = student.slot_keys(reasoning, phase), torch.stack(reasoning.values, 1)
    generator = torch.Generator().manual_seed(1)
    distance = nn.functional.l1_loss if kind == "l1" else nn.functional.mse_loss
    total = keys.new_zeros(())
    for slots in (keys, values):
        total = total + distance(
            slots, torch.randn(slots.shape, generator=generator).to(slots.dtype)
        )
    return total


def without_gradient(student: LatentReasoner) -> set[str]:
    return {
        name
        for name, parameter in student.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.any())
    }


def untied_head(student: LatentReasoner) -> set[str]:
    return set() if student.decoder.config.tie_word_embeddings else {"decoder.lm_head.weight"}


@pytest.mark.parametrize("phase", ["pre_rope", "post_rope"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kv_loss_reaches_all_but_the_named_exceptions(name: str, phase: str) -> None:
    student = tiny_student(name)
    kv_loss(student, phase=phase).backward()
    # `<eot>` stands after the latents, and no logit is in the loss.
    assert without_gradient(student) == {"eot"} | untied_head(student)
    # Each iteration pushes one initial latent out at the end: T = 2 of M = 4.
    assert student.initial_latents.grad.any(-1).tolist() == [True, True, False, False]
    used = student.get_input_embeddings().weight.grad.any(-1).nonzero().flatten().tolist()
    assert used == [11, 12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize(
    ("settings", "exceptions"),
    [
        ({"iterations": 4}, {"eot", "initial_latents"}),
        ({"reasoning": "sequential"}, {"eot", "initial_latents"}),
        ({"projection": False}, {"eot"}),
        ({"per_position": False}, {"eot"}),
        ({"latents": 1, "iterations": 1}, {"eot", "initial_latents"}),
    ],
)
def test_exceptions_of_other_settings(settings: dict, exceptions: set[str]) -> None:
    student = tiny_student("llama-tied-scaled", **settings)
    kv_loss(student).backward()
    assert without_gradient(student) == exceptions


def test_without_iterations_the_last_layers_output_is_read_by_nothing() -> None:
    student = tiny_student("llama-tied-scaled", iterations=0)
    kv_loss(student).backward()
    last = "decoder.model.layers.2."
    assert without_gradient(student) == {
        "eot",
        "decoder.model.norm.weight",
        *(
            f"projection.{part}.{kind}"
            for part in ("up", "down", "norm")
            for kind in ("weight", "bias")
        ),
        *(f"{last}self_attn.{kind}_proj.weight" for kind in "qo"),
        *(f"{last}mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
        f"{last}post_attention_layernorm.weight",
    }
    assert student.initial_latents.grad.any(-1).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_answer_trains_every_parameter(name: str) -> None:
    student = tiny_student(name)
    student(*QUESTION, *ANSWER).logits.square().mean().backward()
    assert without_gradient(student) == set()


def exact_norms(student: LatentReasoner) -> LatentReasoner:
    """The same RMS norms in the model's own dtype: transformers' compute in float32."""
    for module in list(student.decoder.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                gemma = hasattr(child, "eps")  # whose weights count from 1
                eps = child.eps if gemma else child.variance_epsilon
                norm = nn.RMSNorm(child.weight.shape, eps=eps)
                norm.weight = nn.Parameter(child.weight + 1) if gemma else child.weight
                setattr(module, name, norm)
    return student


@pytest.mark.parametrize(
    "settings", [{}, {"reasoning": "sequential"}], ids=["jacobi", "sequential"]
)
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "llama-tied-scaled"])
def test_gradients_match_finite_differences(name: str, settings: dict) -> None:
    student = exact_norms(tiny_student(name, **settings).double())
    # Gemma-2's eager attention takes its softmax in float32, and padding as NaN in float64.
    step, tolerance = (1e-3, 1e-2) if name == "gemma2" else (1e-6, 1e-5)
    question = pad([[11, 12, 13], [14, 15, 16]], "left") if name == "gemma2" else QUESTION
    kv_loss(student, "mse", question=question).backward()
    layer = "transformer.h.1.attn.c_attn" if name == "gpt2" else "model.layers.1.self_attn.v_proj"
    for path in ("bot", "projection.up.weight", f"decoder.{layer}.weight", "initial_latents"):
        parameter = student.get_parameter(path)
        if parameter.grad is None:
            assert (path, settings) == ("initial_latents", {"reasoning": "sequential"})
            continue
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        direction = direction.to(parameter.dtype)
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                losses.append(float(kv_loss(student, "mse", question=question)))
                parameter -= sign * step * direction
        numeric = (losses[0] - losses[1]) / (2 * step)
        exact = float((parameter.grad * direction).sum())
        assert exact == pytest.approx(numeric, rel=tolerance), path


def test_a_frozen_teacher_gives_a_student_that_trains() -> None:
    teacher = tiny_model("llama").requires_grad_(False)
    student = LatentReasoner.from_teacher(
        teacher,
        latents=2,
        iterations=1,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=[5],
        eos_token_id=2,
        seed=0,
    )
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_gradient_checkpointing_is_refused_wherever_it_is_switched_on() -> None:
    student = tiny_student("llama").train()
    with pytest.raises(KavaError, match="detaches the cache"):
        student.gradient_checkpointing_enable()
    student.decoder.gradient_checkpointing_enable()
    with pytest.raises(KavaError, match="detaches the cache"):
        student(*QUESTION, *ANSWER)
    student.decoder.gradient_checkpointing_disable()
    student(*QUESTION, *ANSWER)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_starts_as_the_teacher_and_is_trained(name: str) -> None:
    student = tiny_student(name)
    before = student(*QUESTION, *ANSWER)
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    LoraModel(
        student.decoder,
        LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2"),
        "default",
    )
    assert_near(student(*QUESTION, *ANSWER).logits, before.logits, 1e-6)
    kv_loss(student).backward()
    for path, parameter in student.decoder.named_parameters():
        if "lora_B" in path:
            assert bool(parameter.grad.any()), path
        elif "lora_A" in path:
            assert not bool(parameter.grad.any()), path  # zero while B is
        else:
            assert parameter.grad is None, path
    assert bool(student.bot.grad.any())
    adapters = {p: x for p, x in student.decoder.named_parameters() if "lora_" in p}
    with torch.no_grad():
        for path, parameter in adapters.items():
            if "lora_B" in path:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(path)))
    student.zero_grad()
    kv_loss(student).backward()
    assert [path for path, parameter in adapters.items() if not parameter.grad.any()] == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_precision_follows_float32(name: str) -> None:
    """As the Trainer runs it: float32 weights under autocast, the rotation looked up inside."""
    exact, mixed = (tiny_student(name, iterations=0).float() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        reasoning = mixed(*QUESTION, *ANSWER)
        keys = mixed.slot_keys(reasoning, "pre_rope")
        assert torch.equal(mixed.rotary().inv_freq, exact.rotary().inv_freq)
        loss = kv_loss(mixed)
    assert_near(keys[:, 0], exact.slot_keys(exact(*QUESTION, *ANSWER), "pre_rope")[:, 0], 0.03)
    loss.backward()
    assert {p.grad.dtype for p in mixed.parameters() if p.grad is not None} == {torch.float32}
    assert bool(mixed.initial_latents.grad.any(-1).all())

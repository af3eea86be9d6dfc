"""The written chain beside the latents: behind the question's cache, as if read from scratch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from kava_core.memory import peak_tensor_bytes
from kava_core.models import head
from kava_core.models.latent import LatentReasoner
from kava_core.models.recompute import recomputed
from tests.tiny import (
    ARCHITECTURES,
    COMMON,
    CONFIGS,
    EOS,
    PROMPT,
    VOCABULARY,
    assert_near,
    pad,
    tiny_model,
    tiny_student,
    tiny_trace,
)

QUESTIONS = [tiny_trace("q", n, 1, 1, seed=n).question_ids for n in (9, 1, 6)]
CHAINS = [tiny_trace("c", n, 1, 1, seed=50 + n).question_ids for n in (4, 12, 5)]
ANSWERS = [[11, 12, 13, 2], [14, 2], [15, 16, 2]]
KINDS = {
    "jacobi": {"stride": 2},
    "sequential": {"reasoning": "sequential"},
    "no iterations": {"iterations": 0},
    "no latents": {"latents": 0},
}


def from_scratch(student: LatentReasoner) -> list[Tensor]:
    """Per record the losses of its chain, of one plain pass over question and chain."""
    losses = []
    for question, chain in zip(QUESTIONS, CHAINS, strict=True):
        whole = student.decoder(torch.tensor([question + chain])).logits[0]
        foretold = whole[len(question) - 1 : -1]
        losses.append(nn.functional.cross_entropy(foretold, torch.tensor(chain), reduction="none"))
    return losses


def total(losses: Tensor | list[Tensor]) -> Tensor:
    """The sum over records of the mean over tokens."""
    return torch.stack(
        [row[: len(chain)].mean() for row, chain in zip(losses, CHAINS, strict=True)]
    ).sum()


def gradients(student: LatentReasoner, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def check(student: LatentReasoner, side: str) -> None:
    got = student(*pad(QUESTIONS, side), *pad(ANSWERS), *pad(CHAINS)).chain_losses
    assert got is not None
    wanted = from_scratch(student)
    for row, (mine, chain) in enumerate(zip(wanted, CHAINS, strict=True)):
        assert_near(got[row, : len(chain)], mine)
    found, expected = gradients(student, total(got)), gradients(student, total(wanted))
    assert found.keys() >= expected.keys()
    for name, gradient in found.items():
        if name in expected:
            assert_near(gradient, expected[name])
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize("tokens", [1, 7])  # at once, of 21
def test_pieces_change_neither_losses_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(head, "PIECE", tokens * VOCABULARY)
    for name in ("llama", "gemma2"):
        check(tiny_student(name), "left")


@pytest.mark.parametrize("latents", [0, 2])
def test_memory_is_that_of_a_piece_however_long_chains_are(latents: int) -> None:
    vocabulary, tokens = 152_064, 80
    config = LlamaConfig(
        **{**COMMON, "vocab_size": vocabulary, "hidden_size": 8, "intermediate_size": 8,
           "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
           "head_dim": 8, "tie_word_embeddings": True}
    )  # fmt: skip
    student = LatentReasoner.from_teacher(
        tiny_model(config, torch.float32), latents=latents, iterations=1, reasoning="jacobi",
        projection=False, per_position=True, answer_prompt_ids=PROMPT, eos_token_id=EOS, seed=0,
    )  # fmt: skip
    short, long = torch.full((4, 2), 9), torch.full((4, tokens), 9)

    def work() -> None:
        given = [x for ids in (short, short, long) for x in (ids, torch.ones_like(ids))]
        student(*given).chain_losses.mean().backward()

    whole, piece = 4 * long.numel() * vocabulary, 4 * head.PIECE
    answer, weights = 4 * 3 * short.numel() * vocabulary, 4 * 8 * vocabulary
    assert (
        peak_tensor_bytes(work, torch.device("cpu")) < 3 * piece + answer + 4 * weights < 2 * whole
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shared_question_changes_neither_logits_nor_gradients(name: str, kind: str) -> None:
    for side in ("left", "right"):
        check(tiny_student(name, **KINDS[kind]), side)


@pytest.mark.parametrize("kind", ["jacobi", "sequential"])
def test_not_where_a_sliding_window_ends_in_the_question_either(kind: str) -> None:
    config = copy.deepcopy(CONFIGS["gemma3"])
    config.sliding_window = 5
    student = LatentReasoner.from_teacher(
        tiny_model(config),
        latents=3,
        projection=True,
        per_position=True,
        answer_prompt_ids=PROMPT,
        eos_token_id=EOS,
        seed=0,
        **{"reasoning": "jacobi", "iterations": 2, **KINDS[kind]},
    )
    check(student.eval(), "left")


def test_layers_that_are_recomputed_read_the_question_again() -> None:
    student = tiny_student("llama", latents=0).train()
    expected = total(from_scratch(student))
    with recomputed(student):
        output = student(*pad(QUESTIONS, "left"), *pad(ANSWERS), *pad(CHAINS))
        assert_near(total(output.chain_losses), expected)


def test_of_the_question_one_token_is_read_again() -> None:
    student, widths = tiny_student("llama"), []
    student.decoder.base_model.register_forward_pre_hook(
        lambda _, _args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    student(*pad(QUESTIONS, "left"), *pad(ANSWERS), *pad(CHAINS))
    question, latents, chain = 9, 4, 12
    assert widths[0] == question + 1 + latents
    assert widths[-1] == 1 + chain - 1

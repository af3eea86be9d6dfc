"""The written chain beside the latents: behind the question's cache, as if read from scratch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kava_core.models.latent import LatentReasoner
from kava_core.models.recompute import recomputed
from tests.tiny import (
    ARCHITECTURES,
    CONFIGS,
    EOS,
    PROMPT,
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
    """Per record the logits that foretell its chain, of one plain pass over question and chain."""
    logits = []
    for question, chain in zip(QUESTIONS, CHAINS, strict=True):
        whole = student.decoder(torch.tensor([question + chain])).logits[0]
        logits.append(whole[len(question) - 1 : -1])
    return logits


def losses(logits: Tensor | list[Tensor]) -> Tensor:
    return torch.stack(
        [
            nn.functional.cross_entropy(row[: len(chain)], torch.tensor(chain))
            for row, chain in zip(logits, CHAINS, strict=True)
        ]
    ).sum()


def gradients(student: LatentReasoner, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def check(student: LatentReasoner, side: str) -> None:
    got = student(*pad(QUESTIONS, side), *pad(ANSWERS), *pad(CHAINS)).cot_logits
    assert got is not None
    wanted = from_scratch(student)
    for row, (mine, chain) in enumerate(zip(wanted, CHAINS, strict=True)):
        assert_near(got[row, : len(chain)], mine)
    found, expected = gradients(student, losses(got)), gradients(student, losses(wanted))
    assert found.keys() >= expected.keys()
    for name, gradient in found.items():
        if name in expected:
            assert_near(gradient, expected[name])
        else:
            assert not gradient.any(), name


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
    expected = losses(from_scratch(student))
    with recomputed(student):
        output = student(*pad(QUESTIONS, "left"), *pad(ANSWERS), *pad(CHAINS))
        assert_near(losses(output.cot_logits), expected)


def test_of_the_question_one_token_is_read_again() -> None:
    student, widths = tiny_student("llama"), []
    student.decoder.base_model.register_forward_pre_hook(
        lambda _, _args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    student(*pad(QUESTIONS, "left"), *pad(ANSWERS), *pad(CHAINS))
    question, latents, chain = 9, 4, 12
    assert widths[0] == question + 1 + latents
    assert widths[-1] == 1 + chain - 1

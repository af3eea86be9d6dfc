"""The readout: what the head reads in the hidden states that become latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kava_core.models.latent import LatentReasoner, Reasoning
from tests.tiny import ARCHITECTURES, assert_near, tiny_student


def reason(student: LatentReasoner, readout: bool = True) -> Reasoning:
    questions = torch.tensor([[9, 10, 11, 12], [13, 14, 15, 16]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    answers = torch.tensor([[20, 2], [21, 2]])
    return student(questions, mask, answers, torch.ones_like(answers), readout=readout)


def projected(student: LatentReasoner) -> list[Tensor]:
    """What goes through the projection from now on, call by call."""
    seen: list[Tensor] = []
    student.projection.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 1},
        {"iterations": 3},
        {"iterations": 2, "projection": False},
        {"reasoning": "sequential"},
    ],
)
def test_the_readout_is_of_the_states_that_become_the_last_latents(
    name: str, settings: dict[str, Any]
) -> None:
    student = tiny_student(name, **settings)
    seen = projected(student)
    found = reason(student).readout
    thoughts = torch.cat(seen, 1) if settings.get("reasoning") == "sequential" else seen[-1]
    assert thoughts.shape[1] == 4
    logits = student.decoder.get_output_embeddings()(thoughts)
    cap = getattr(student.decoder.config, "final_logit_softcapping", None)
    assert_near(found, logits if cap is None else torch.tanh(logits / cap) * cap)


def test_nobody_reads_unless_asked_or_where_latents_are_the_initial_ones() -> None:
    assert reason(tiny_student("llama"), readout=False).readout is None
    assert reason(tiny_student("llama", iterations=0)).readout is None
    assert reason(tiny_student("llama", latents=0)).readout is None


def test_the_first_latent_reads_like_the_decoder_behind_the_question() -> None:
    """Its hidden state is that of <bot>, whatever the other latents are."""
    student = tiny_student("llama", iterations=3)
    once = tiny_student("llama", iterations=1)
    once.load_state_dict(student.state_dict())
    assert_near(reason(student).readout[:, 0], reason(once).readout[:, 0])

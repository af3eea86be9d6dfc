"""Adapters start from their seed, compute the same once merged, and are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kava_core.distill.adapters import add_lora, merge_lora
from kava_core.distill.batches import AnswerDataset
from kava_core.errors import KavaError
from tests.distill import toy
from tests.distill.toy import same, toy_student, toy_traces


def test_adapters_start_from_their_seed_whatever_was_drawn_before() -> None:
    def adapters(seed: int, drawn: int) -> dict[str, Tensor]:
        student = toy_student()
        torch.manual_seed(drawn)
        add_lora(student, toy.lora(2, 2, 0.0, "q_proj"), seed=seed)
        after = torch.rand(())
        torch.manual_seed(drawn)
        assert torch.equal(after, torch.rand(()))  # nothing was drawn from the common stream
        return {name: x for name, x in student.state_dict().items() if "lora_A" in name}

    assert same(adapters(3, drawn=1), adapters(3, drawn=2))
    assert not same(adapters(3, drawn=1), adapters(4, drawn=1))


def test_merged_adapters_compute_what_they_did() -> None:
    student = toy_student(latents=2)
    adapters = add_lora(student, toy.lora(2, 4, 0.0, "q_proj", "v_proj"), seed=3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    student.eval()
    batch = AnswerDataset(toy_traces(3), chains=False).__getitems__([0, 1, 2])
    given = [batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask")]
    before = student(*given).logits
    merge_lora(student, adapters)
    assert not any("lora" in name for name, _ in student.named_parameters())
    torch.testing.assert_close(student(*given).logits, before, rtol=1e-4, atol=1e-4)


def test_unknown_projections_are_refused_by_name() -> None:
    with pytest.raises(KavaError, match=r"training\.lora\.targets \['query'\]"):
        add_lora(toy_student(), toy.lora(2, 2, 0.0, "query"), seed=0)

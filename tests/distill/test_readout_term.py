"""The readout term, and keys or values alone, against the slow and obvious."""

from __future__ import annotations

import pytest
import torch

from kava_core.distill.objective import Objective, kv_loss
from kava_core.models.latent import Reasoning

B, M, V, LAYERS, HEADS, D = 3, 4, 11, 2, 2, 5


def reasoning(generator: torch.Generator) -> Reasoning:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Reasoning(
        logits=rand(B, 3, V),
        keys=[],
        values=[],
        latent_positions=torch.zeros(B, M, dtype=torch.long),
        endpoint=rand(B, LAYERS + 1, 8),
        readout=rand(B, M, V).requires_grad_(),
    )


def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    slots = (B, LAYERS, HEADS, M)
    filled = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    return {
        "answer_ids": torch.randint(V, (B, 2), generator=generator),
        "answer_mask": torch.ones(B, 2, dtype=torch.long),
        "slot_ids": torch.randint(V, (B, M), generator=generator),
        "slot_filled": filled,
        "slot_mask": filled[:, None, None].bool().expand(slots),
        "keys": torch.randn(*slots, D, generator=generator, dtype=torch.float64),
        "values": torch.randn(*slots, D, generator=generator, dtype=torch.float64),
    }


def test_the_readout_is_the_cross_entropy_of_the_slots_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    thought, given = reasoning(generator), batch(generator)
    objective = Objective(0.0, 0.0, 0.0, "smooth_l1", "smooth_l1", alpha_readout=0.5)
    term = objective.weighted(thought, given, None, None)["readout"]
    records = []
    for b in range(B):
        filled = [j for j in range(M) if given["slot_filled"][b, j]]
        tokens = given["slot_ids"][b].tolist()
        logs = thought.readout[b].detach().log_softmax(-1)
        records.append(-sum(logs[j, tokens[j]] for j in filled) / len(filled))
    assert float(term.detach()) == pytest.approx(0.5 * float(sum(records)) / B)
    (gradient,) = torch.autograd.grad(term, thought.readout)
    assert bool((gradient[given["slot_filled"] == 1] != 0).any())
    assert not gradient[given["slot_filled"] == 0].any()  # a slot without a token teaches nothing


def test_without_weight_there_is_no_term() -> None:
    generator = torch.Generator().manual_seed(0)
    objective = Objective(0.0, 0.0, 0.0, "smooth_l1", "smooth_l1")
    assert set(objective.weighted(reasoning(generator), batch(generator), None, None)) == {"answer"}


@pytest.mark.parametrize(("parts", "names"), [("keys", ["keys"]), ("values", ["values"])])
def test_keys_or_values_may_be_compared_alone(parts: str, names: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    thought, given = reasoning(generator), batch(generator)
    ours = {
        name: torch.randn(B, LAYERS, HEADS, M, D, generator=generator, dtype=torch.float64)
        for name in ("keys", "values")
    }

    def term(which: str) -> torch.Tensor:
        objective = Objective(3.0, 0.0, 0.0, "mse", "mse", kv_parts=which)
        return objective.weighted(thought, given, ours["keys"], ours["values"])["kv"]

    expected = [kv_loss(ours[name], given[name], given["slot_mask"], "mse", None) for name in names]
    torch.testing.assert_close(term(parts), 3.0 * sum(expected))
    torch.testing.assert_close(term("both"), (term("keys") + term("values")) / 2)

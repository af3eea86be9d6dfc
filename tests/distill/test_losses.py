"""The lean cross-entropy is the plain one, gradients and all, in a piece of its memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, PreTrainedModel

from kava_core.distill.adapters import add_lora
from kava_core.distill.batches import ChainDataset
from kava_core.distill.losses import chain_loss
from kava_core.distill.objective import cross_entropy
from kava_core.memory import peak_tensor_bytes
from kava_core.models import head as heads
from kava_core.models.head import token_losses
from tests.distill import toy
from tests.tiny import ARCHITECTURES, COMMON, VOCABULARY, tiny_model

BATCH = ChainDataset(toy.toy_traces(5)).__getitems__([0, 1, 2, 3, 4])
GIVEN = (BATCH["input_ids"], BATCH["mask"], BATCH["taught"])


def plain_loss(model: nn.Module, ids: Tensor, mask: Tensor, taught: Tensor) -> Tensor:
    """The same with all logits at once."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits[:, :-1], ids[:, 1:], taught[:, 1:])


def measured(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
    return {"": loss.detach(), **found}


@pytest.mark.parametrize("tokens", [1, 7, 1000])  # at once; there are 35 or so
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, name: str, tokens: int
) -> None:
    monkeypatch.setattr(heads, "PIECE", tokens * VOCABULARY)
    model = tiny_model(name)
    exact = measured(model, plain_loss(model, *GIVEN))
    lean = measured(model, chain_loss(model, *GIVEN))
    assert lean.keys() == exact.keys()
    assert len(exact) > 20
    tolerance = 1e-12 if model.dtype == torch.float64 else 2e-5
    for key, value in exact.items():
        assert float((lean[key] - value).abs().max()) <= tolerance * float(value.abs().max()), key


def test_what_is_not_taught_changes_nothing() -> None:
    model = tiny_model("llama")
    ids, mask, taught = GIVEN
    once = chain_loss(model, *GIVEN)
    assert not torch.equal(
        once, chain_loss(model, ids, mask, torch.cat((taught[:, :1], mask[:, 1:]), 1))
    )
    assert torch.equal(once, chain_loss(model, ids.masked_fill(mask == 0, 9), mask, taught))


def noted(seen: list[torch.dtype], scores: Tensor) -> Tensor:
    seen.append(scores.dtype)
    return scores


def test_autocast_reaches_the_head_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "PIECE", 4 * VOCABULARY)
    model = tiny_model("llama", torch.float32)
    seen: list[torch.dtype] = []
    head = model.get_output_embeddings()
    plain = float(plain_loss(model, *GIVEN).detach())
    monkeypatch.setattr(head, "forward", lambda x: noted(seen, functional.linear(x, head.weight)))
    with torch.autocast("cpu", torch.bfloat16):
        rough = chain_loss(model, *GIVEN)
    rough.backward()
    assert rough.dtype == torch.float32
    assert set(seen) == {torch.bfloat16} and len(seen) > 10
    assert float(rough.detach()) == pytest.approx(plain, rel=0.05)


def test_adapters_on_the_head_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "PIECE", 4 * VOCABULARY)
    model = tiny_model(LlamaConfig(**COMMON))
    add_lora(model, toy.lora(2, 2, 0.0, "lm_head"), seed=0, path="it")
    found = measured(model, chain_loss(model, *GIVEN))
    exact = measured(model, plain_loss(model, *GIVEN))
    assert found.keys() == exact.keys() and any("lora_B" in name for name in found)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value)


def test_memory_is_that_of_a_piece_however_many_tokens_there_are() -> None:
    vocabulary, width, tokens = 152_064, 8, 640
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,), generator=generator)

    def lean() -> None:
        token_losses(hidden, ids, head, vocabulary).mean().backward()

    def plain() -> None:
        functional.cross_entropy(head(hidden), ids).backward()

    whole, piece = 4 * tokens * vocabulary, 4 * heads.PIECE
    assert peak_tensor_bytes(plain, torch.device("cpu")) > 2 * whole
    head.zero_grad()
    weights = 4 * width * vocabulary
    assert peak_tensor_bytes(lean, torch.device("cpu")) < 3 * piece + 4 * weights < whole

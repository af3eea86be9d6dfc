"""Teach a causal LM to write the chain of thought and then the answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kava_core.distill.objective import cross_entropy


def chain_terms(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """CE(C, A-prompt, A | Q) of a `ChainDataset` batch, the mean over records."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["mask"], use_cache=False
    ).logits
    return {
        "chain": cross_entropy(logits[:, :-1], batch["input_ids"][:, 1:], batch["taught"][:, 1:])
    }

"""The loss of a written chain, which never holds the logits of a whole batch."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from kava_core.models.head import losses_of_call


def chain_loss(model: nn.Module, ids: Tensor, mask: Tensor, taught: Tensor) -> Tensor:
    """CE of the taught tokens given all before them: the mean over a record's, then over records.

    model: a causal LM, or what wraps one for several processes. ids, mask, taught [B, N], or the
    mask as the model's attention takes it, [B, 1, N, N]; every record has a taught token, never the
    first. `kava_core.models.head.check_head` says whether a model's logits are known.
    """

    def call() -> None:
        model(input_ids=ids, attention_mask=mask, use_cache=False)

    decoder = cast(PreTrainedModel, getattr(model, "module", model))
    return record_mean(losses_of_call(decoder, call, ids[:, 1:], taught[:, 1:]), taught[:, 1:])


def record_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Of losses [B, N], 0 where the mask is: the mean over a record's tokens, then over records."""
    return (losses.sum(1) / mask.sum(1)).mean()

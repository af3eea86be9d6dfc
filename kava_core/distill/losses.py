"""Cross-entropy that never holds the logits of a whole batch.

With a vocabulary of 152,000 the float32 logits of 8,000 tokens take 5 GB, and their gradient as
much again. Here only the tokens that are taught reach the language-model head, and they do so in
pieces, whose logits are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kava_core.models.head import finish_logits

PIECE = 2**24  # entries of logits that are held at once: 64 MB in float32


def chain_loss(model: nn.Module, ids: Tensor, mask: Tensor, taught: Tensor) -> Tensor:
    """CE of the taught tokens given all before them: the mean over a record's, then over records.

    model: a causal LM, or what wraps one for several processes. ids, mask, taught [B, N], or the
    mask as the model's attention takes it, [B, 1, N, N]; every record has a taught token, never the
    first. `kava_core.models.head.check_head` says whether a model's logits are known.
    """
    wanted = taught[:, 1:].bool()
    decoder = cast(PreTrainedModel, getattr(model, "module", model))
    found: list[Tensor] = []

    def read(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Takes what the head is given, and leaves it the first column only."""

        def logits(hidden: Tensor) -> Tensor:
            return finish_logits(decoder.config, head.forward(hidden))

        vocabulary = decoder.config.get_text_config().vocab_size
        found.append(token_losses(args[0][:, :-1][wanted], ids[:, 1:][wanted], logits, vocabulary))
        return (args[0][:, :1],)

    # Inside the model's own call: there autocast is on, and several processes share gradients.
    handle = decoder.get_output_embeddings().register_forward_pre_hook(read)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    losses = found[0].new_zeros(wanted.shape).masked_scatter(wanted, found[0])
    return (losses.sum(1) / wanted.sum(1)).mean()


def token_losses(
    hidden: Tensor, ids: Tensor, logits: Callable[[Tensor], Tensor], vocabulary: int
) -> Tensor:
    """CE of each token, hidden [T, E] and ids [T] → [T], at least in float32.

    logits: hidden states [t, E] → [t, V], for any t; V: vocabulary.
    """

    def losses(hidden: Tensor, ids: Tensor) -> Tensor:
        scores = logits(hidden)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return functional.cross_entropy(scores.to(wide), ids, reduction="none")

    rows = max(1, PIECE // vocabulary)
    if len(hidden) <= rows:
        return losses(hidden, ids)
    # torch's own `linear_cross_entropy` knows no softcap, and no adapters on the head.
    pieces = zip(hidden.split(rows), ids.split(rows), strict=True)
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False) for piece in pieces])

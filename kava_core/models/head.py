"""From hidden states to logits, as an architecture makes them, and to losses without logits.

With a vocabulary of 152,000 the float32 logits of 8,000 tokens take 5 GB, and their gradient as
much again. Here only the tokens that are taught reach the language-model head, and they do so in
pieces, whose logits are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from kava_core.errors import KavaError

PIECE = 2**24  # entries of logits that are held at once: 64 MB in float32


def read_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of what the language-model head reads, hidden [..., E] of the last level."""
    return finish_logits(model.config, model.get_output_embeddings()(hidden))


def finish_logits(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """What becomes of the output of the language-model head: scaled as by Cohere and Granite,
    softcapped as by Gemma, or left as it is."""
    text = config.get_text_config()
    if scale := getattr(text, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(text, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(text, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def losses_of_call(
    decoder: PreTrainedModel, call: Callable[[], object], ids: Tensor, taught: Tensor
) -> Tensor:
    """CE of the taught tokens in a call of the decoder, [B, N], 0 for the others.

    call: makes it, with gradient or without; its logits are of no use. ids, taught [B, N]: column j
    is foretold by the j-th of the hidden states that the head is given. `check_head` says whether
    a model's logits are known.
    """
    wanted = taught.bool()
    found: list[Tensor] = []

    def read(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Takes what the head is given, and leaves it the first column only."""

        def logits(hidden: Tensor) -> Tensor:
            return finish_logits(decoder.config, head.forward(hidden))

        vocabulary = decoder.config.get_text_config().vocab_size
        hidden = args[0][:, : ids.shape[1]]
        found.append(token_losses(hidden[wanted], ids[wanted], logits, vocabulary))
        return (args[0][:, :1],)

    # Inside the model's own call: there autocast is on, and several processes share gradients.
    handle = decoder.get_output_embeddings().register_forward_pre_hook(read)
    try:
        call()
    finally:
        handle.remove()
    return found[0].new_zeros(wanted.shape).masked_scatter(wanted, found[0])


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


@torch.no_grad()
def check_head(model: PreTrainedModel, remedy: str) -> None:
    """KavaError if the model makes its logits in another way than `read_head`.

    By one call on four tokens. remedy: what to do then, for the message.
    """
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.arange(4, device=model.device)[None]
    try:
        own = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    ours = read_head(model, seen[0]).float()
    tolerance = max(1e-3, 16 * torch.finfo(model.dtype).eps) * float(own.abs().max())
    if ours.shape != own.shape or not torch.allclose(own, ours, rtol=0, atol=tolerance):
        raise KavaError(
            f"{model.config.model_type} makes its logits in a way this library does not know: "
            f"expected the output of the LM head, scaled, softcapped or as it is. {remedy}"
        )

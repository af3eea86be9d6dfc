"""From hidden states to logits, as an architecture makes them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kava_core.errors import KavaError


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


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """KavaError if the model makes its logits in another way than `read_head`.

    By one call on four tokens.
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
            "expected the output of the LM head, scaled, softcapped or as it is. It cannot be "
            "trained; set `training: null` to take it as it is."
        )

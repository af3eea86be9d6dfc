"""Record keys, values and answer-to-CoT attention inside any model's attention, without copies of
the attention matrix and without a subclass per architecture.

A function registered with transformers' `AttentionInterface` computes attention exactly as the
model would (SDPA, or the architecture's own eager function where it caps its logits) and hands the
post-RoPE queries, keys and values of each layer to the active `Recorder` on the way. The mask
function is registered under the same name: without it transformers drops the padding mask. A
recorder that wants attention weights makes them of what it is shown (`attention_weights`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from kava_core.errors import KavaError


class Recorder(Protocol):
    """What the attention of a layer is shown to.

    query [B, H_q, N, D], key and value [B, H, S, D] post-RoPE; mask as transformers hands it to the
    attention function (see `attention_weights`); `scaling` and `softcap` are those the model
    applies to its logits.
    """

    def record(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> None: ...


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Any
) -> None:
    """Hand what an attention function was called with to the active recorder, if there is one."""
    recorder = _active.get()
    if recorder is not None:
        scaling = kwargs.get("scaling")
        recorder.record(
            int(module.layer_idx),  # type: ignore[arg-type]
            query,
            key,
            value,
            mask,
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            kwargs.get("softcap"),
        )


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    show(module, query, key, value, mask, kwargs)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    show(module, query, key, value, mask, kwargs)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **kwargs)


for _name, _function, _mask in (
    ("kava_sdpa", _sdpa, sdpa_mask),
    ("kava_eager", _eager, eager_mask),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)


@contextmanager
def recording(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Inside this context every attention call of `model` is shown to `recorder`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before not in ("sdpa", "eager"):
        raise KavaError(
            f"the model uses {before} attention; load it with sdpa or eager to record its cache."
        )
    config._attn_implementation = f"kava_{before}"
    try:
        with shown_to(recorder):
            yield
    finally:
        config._attn_implementation = before


@contextmanager
def shown_to(recorder: Recorder) -> Iterator[None]:
    """Inside this context attention functions that call `show` do so to `recorder`."""
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


def attention_weights(
    query: Tensor,
    key: Tensor,
    rows: slice,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The attention of some rows of a recorded call: [B, H_q, rows, S], in float32 or wider.

    query [B, H_q, N, D], key [B, H, S, D]; mask [B or 1, H_q or 1, N, S], true where a query may
    look or a number to add to the logit; None: the queries are the last N of S and causal.
    """
    b, hq, n, d = query.shape
    h, s = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    picked = query[:, :, rows].to(wide)  # [B, H_q, R, D]
    r = picked.shape[2]
    logits = picked.reshape(b, h, hq // h * r, d) @ key.to(wide).transpose(2, 3) * scaling
    logits = logits.view(b, hq, r, s)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None:
        column = torch.arange(s, device=key.device)
        mask = (column <= column[s - n :, None])[None, None]
    mask = mask[:, :, rows]
    seen = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return seen.softmax(-1)

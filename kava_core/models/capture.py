"""Record keys, values and answer-to-CoT attention inside any model's attention, without copies of
the attention matrix and without a subclass per architecture.

A function registered with transformers' `AttentionInterface` computes attention exactly as the
model would (SDPA, or the architecture's own eager function where it caps its logits) and hands the
post-RoPE queries, keys and values of each layer to the active `Recorder` on the way. The mask
function is registered under the same name: without it transformers drops the padding mask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from kava_core.errors import KavaError


class Recorder(Protocol):
    """What the attention of a layer is shown to.

    query [B, H_q, S, D], key and value [B, H, S, D] post-RoPE; `scaling` and `softcap` are those
    the model applies to its logits.
    """

    def record(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> None: ...


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def _show(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: Any) -> None:
    recorder = _active.get()
    if recorder is not None:
        scaling = kwargs.get("scaling")
        recorder.record(
            int(module.layer_idx),  # type: ignore[arg-type]
            query,
            key,
            value,
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            kwargs.get("softcap"),
        )


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    _show(module, query, key, value, kwargs)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    _show(module, query, key, value, kwargs)
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
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)
        config._attn_implementation = before

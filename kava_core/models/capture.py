"""Record keys, values and answer-to-CoT attention inside any model's attention, without copies of
the attention matrix and without a subclass per architecture.

A function registered with transformers' `AttentionInterface` computes attention exactly as the
model would (SDPA, or the architecture's own eager function where it caps its logits) and hands the
post-RoPE queries, keys and values of each layer to the active `Recorder` on the way. The mask
function is registered under the same name: without it transformers drops the padding mask. A
recorder that wants attention weights makes them of what it is shown (`AttentionCall.weights`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from kava_core.errors import KavaError

MASKS: dict[str, Callable[..., Any]] = {
    "sdpa": sdpa_mask,
    "eager": eager_mask,
}  # of the two kinds of attention there are


@dataclass(frozen=True)
class AttentionCall:
    """What the attention of a layer was called with.

    query [B, H_q, N, D], key and value [B, H, S, D] post-RoPE; mask [B or 1, H_q or 1, N, S], true
    where a query may look or a number to add to the logit, None: the queries are the last N of S
    and causal; scaling and softcap are those the model applies to its logits.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None

    @classmethod
    def of(
        cls, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        options: dict[str, Any],
    ) -> AttentionCall:  # fmt: skip
        """The call of a transformers attention function, whose keywords are `options`."""
        scaling = options.get("scaling")
        return cls(
            layer=layer_of(module),
            query=query,
            key=key,
            value=value,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=options.get("softcap"),
        )

    def weights(self, rows: slice) -> Tensor:
        """The attention of some rows: [B, H_q, rows, S], in float32 or wider."""
        b, hq, n, d = self.query.shape
        h, s = self.key.shape[1:3]
        wide = torch.promote_types(self.query.dtype, torch.float32)
        picked = self.query[:, :, rows].to(wide)  # [B, H_q, R, D]
        r = picked.shape[2]
        keys = self.key.to(wide).transpose(2, 3)
        logits = picked.reshape(b, h, hq // h * r, d) @ keys * self.scaling
        logits = logits.view(b, hq, r, s)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        mask = self.mask
        if mask is None:
            column = torch.arange(s, device=self.key.device)
            mask = (column <= column[s - n :, None])[None, None]
        mask = mask[:, :, rows]
        seen = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return seen.softmax(-1)


class Recorder(Protocol):
    """What the attention of every layer is shown to."""

    def record(self, call: AttentionCall) -> None: ...


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def layer_of(module: nn.Module) -> int:
    """The number of the layer that an attention module belongs to; KavaError if it has none."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise KavaError(
            f"{type(module).__name__} does not say which layer it belongs to (expected a number, "
            f"layer_idx, found {layer!r}); its cache cannot be recorded. Choose another model."
        )
    return layer


def register_attention(name: str, own_mask: Callable[[int, Tensor], Tensor] | None = None) -> None:
    """Register `<name>_sdpa` and `<name>_eager` with transformers: the model's own functions, whose
    calls are shown to the active recorder.

    own_mask: (layer, query) → the mask, in place of transformers', which then makes none.
    """

    def register(kind: str) -> None:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
            attention_mask: Tensor | None = None, **options: Any,
        ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
            mask = attention_mask  # some models hand it over by this name
            if own_mask is not None:
                if mask is not None:
                    raise KavaError(
                        f"{type(module).__name__} makes an attention mask of its own; it cannot "
                        "read from a compressed cache, whose mask goes by positions alone."
                    )
                mask = own_mask(layer_of(module), query)
            recorder = _active.get()
            if recorder is not None:
                recorder.record(AttentionCall.of(module, query, key, value, mask, options))
            if kind == "sdpa":
                return sdpa_attention_forward(module, query, key, value, mask, **options)
            eager = sys.modules[type(module).__module__].eager_attention_forward
            return eager(module, query, key, value, mask, **options)

        AttentionInterface.register(f"{name}_{kind}", attend)
        if own_mask is None:
            AttentionMaskInterface.register(f"{name}_{kind}", MASKS[kind])

    for kind in MASKS:
        register(kind)


@contextmanager
def attending(config: PreTrainedConfig, name: str, *, to: str) -> Iterator[None]:
    """Inside this context a model of this text configuration attends by functions registered under
    `name`; KavaError, which says what they are wanted `to` do, if it uses attention of another
    kind."""
    before = config._attn_implementation
    if before not in MASKS:
        raise KavaError(f"the model uses {before} attention; load it with sdpa or eager to {to}.")
    config._attn_implementation = f"{name}_{before}"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def recording(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Inside this context every attention call of `model` is shown to `recorder`."""
    config = model.config.get_text_config()
    with attending(config, "kava", to="record its cache"), shown_to(recorder):
        yield


@contextmanager
def shown_to(recorder: Recorder) -> Iterator[None]:
    """Inside this context calls of registered attention functions are shown to `recorder`."""
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


def teacher_forced(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, at: Tensor, **options: Any
) -> tuple[Tensor, Any]:
    """ids, positions [B, S], at [B] → the hidden states of all L+1 levels at column at[b] of row b,
    [B, L+1, E], and all that the decoder, called with `options`, returned.

    Without a mask: causality alone keeps what is right of a token out of it. A level is what the
    next layer is given, the last one what the decoder returns: no other column is kept.
    """
    levels: list[Tensor] = []

    def keep(state: Tensor) -> None:
        row = torch.arange(len(at), device=state.device)
        levels.append(state[row, at.to(state.device)].to(ids.device))

    def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    handles = [
        layer.register_forward_pre_hook(given, with_kwargs=True) for layer in decoder_layers(model)
    ]
    try:
        output = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **options)
    finally:
        for handle in handles:
            handle.remove()
    keep(output.last_hidden_state)
    return torch.stack(levels, dim=1), output


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a decoder: the list whose i-th member has the attention of layer i. KavaError
    if there is none."""
    config = model.config.get_text_config()
    for layers in model.base_model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers:
            numbers = [{getattr(part, "layer_idx", None) for part in x.modules()} for x in layers]
            if all(i in found for i, found in enumerate(numbers)):
                return list(layers)
    raise KavaError(
        f"{config.model_type} has no list of {config.num_hidden_layers} layers that say their "
        "number; its hidden states cannot be recorded. Choose another model."
    )


register_attention("kava")

"""Find out how a model rotates its keys, and prove it before any key is un-rotated."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.rotary import Rotary, rotate

PROBE_POSITIONS = (0, 1, 2, 7)


@torch.no_grad()
def rotary_of(model: PreTrainedModel) -> Rotary:
    """The rotation of every layer of `model`; no frequencies where it does not rotate.

    A short probe records the cosines and sines each attention module receives. They must be those
    of one of the model's own `inv_freq` buffers, and the model's own `apply_rotary_pos_emb` must
    agree with `kava_core.rotary.rotate`. Anything else (interleaved layouts, frequencies that
    depend on the length) is refused, since its keys could not be un-rotated exactly.
    """
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    seen = _probe(model)
    buffers = {
        name: buffer.double().cpu()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }
    if not seen:
        if buffers:
            raise KavaError(
                f"{config.model_type} rotates its keys where this library cannot see it; "
                "its keys cannot be stored without their rotary phase."
            )
        return Rotary(torch.zeros(layers, 0, dtype=torch.float64), torch.ones(layers).double())
    if sorted(seen) != list(range(layers)):
        raise KavaError(
            f"{config.model_type} rotates the keys of layers {sorted(seen)} only, of {layers}; "
            "expected all layers or none."
        )
    _refuse_length_dependent(config)
    frequencies, scalings = [], []
    for layer in range(layers):
        module, cos, sin = seen[layer]
        inv_freq, scaling = _match(config.model_type, layer, cos, sin, buffers)
        _check_layout(config.model_type, module, cos, sin)
        frequencies.append(inv_freq)
        scalings.append(scaling)
    return Rotary(torch.stack(frequencies), torch.tensor(scalings, dtype=torch.float64))


def _probe(model: PreTrainedModel) -> dict[int, tuple[nn.Module, Tensor, Tensor]]:
    """layer → (attention module, cos, sin [S, R]) as handed to it at PROBE_POSITIONS."""
    seen: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pair = kwargs.get("position_embeddings") or next(
            (a for a in args if isinstance(a, tuple) and len(a) == 2), None
        )
        if pair is not None and isinstance(pair[0], Tensor):
            seen[int(module.layer_idx)] = (
                module,
                pair[0][0].float().cpu(),
                pair[1][0].float().cpu(),
            )  # type: ignore[arg-type]

    handles = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "layer_idx") and not hasattr(module, "self_attn")
    ]
    device = next(model.parameters()).device
    positions = torch.tensor([PROBE_POSITIONS], device=device)
    training = model.training
    try:
        model.eval()
        model.base_model(
            input_ids=torch.zeros_like(positions),
            attention_mask=torch.ones_like(positions),
            position_ids=positions,
            use_cache=False,
        )
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


def _match(
    name: str, layer: int, cos: Tensor, sin: Tensor, buffers: dict[str, Tensor]
) -> tuple[Tensor, float]:
    """The buffer [R/2] whose angles the layer received, and the factor on cos and sin."""
    half = cos.shape[-1] // 2
    scaling = float(torch.hypot(cos, sin).double().mean())
    for inv_freq in buffers.values():
        if inv_freq.shape != (half,):
            continue
        angle = torch.tensor(PROBE_POSITIONS, dtype=torch.float64)[:, None] * inv_freq
        # bfloat16 models hand out cosines rounded to 8 bits.
        close = torch.allclose(cos[:, :half].double(), angle.cos() * scaling, atol=1e-2) and (
            torch.allclose(sin[:, :half].double(), angle.sin() * scaling, atol=1e-2)
        )
        if close and torch.equal(cos[:, :half], cos[:, half:]):
            return inv_freq, round(scaling, 6) if abs(scaling - 1) > 5e-3 else 1.0
    raise KavaError(
        f"the rotary embedding of {name}, layer {layer}, is not one this library can undo "
        "(expected half-split frequencies from an inv_freq buffer)."
    )


def _check_layout(name: str, module: nn.Module, cos: Tensor, sin: Tensor) -> None:
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    head_dim = int(getattr(module, "head_dim", cos.shape[-1]))
    if apply is not None and head_dim == cos.shape[-1]:
        keys = torch.randn(1, 1, cos.shape[0], head_dim, generator=torch.Generator().manual_seed(0))
        theirs = apply(keys, keys, cos[None], sin[None])[1]
        half = cos.shape[-1] // 2
        if torch.allclose(theirs, rotate(keys, cos[:, :half], sin[:, :half]), atol=1e-5):
            return
    elif head_dim != cos.shape[-1]:
        return  # partial rotation is half-split inside the rotated part; `_match` has checked it
    raise KavaError(
        f"{name} lays out its rotary embedding in a way this library does not know; "
        "its keys cannot be un-rotated exactly."
    )


def _refuse_length_dependent(config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    for group in groups:
        if group.get("rope_type") in ("dynamic", "longrope"):
            raise KavaError(
                f"{config.model_type} uses rope_type={group['rope_type']}, whose frequencies "
                "change with the sequence length; its keys cannot be un-rotated exactly."
            )

"""Find out how a model rotates its keys, and prove it before any key is un-rotated."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.capture import AttentionCall, recording
from kava_core.rotary import Rotary, unrotate

PROBE_POSITIONS = (0, 1, 2, 7)


@torch.no_grad()
def rotary_of(model: PreTrainedModel) -> Rotary:
    """The rotation of every layer of `model`; no frequencies where it does not rotate.

    A probe reads the same single token at several positions. The cosines and sines that each layer
    receives must be those of one of the model's own `inv_freq` buffers, and since a lone token
    attends to itself alone, its keys without phase must be the same at every position. Anything
    else (interleaved layouts, layers that skip the rotation, frequencies that depend on the
    length) is refused, since its keys could not be un-rotated exactly.
    """
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    _refuse_length_dependent(config)
    probe = _Probe.of(model)
    buffers = _frequencies(model)
    if not probe.angles:
        if buffers:
            raise KavaError(
                f"{config.model_type} rotates its keys where this library cannot see it; "
                "its keys cannot be stored without their rotary phase."
            )
        return Rotary(torch.zeros(layers, 0, dtype=torch.float64), torch.ones(layers).double())
    everywhere = list(range(layers))
    if sorted(probe.angles) != everywhere or sorted(probe.keys) != everywhere:
        raise KavaError(
            f"{config.model_type} shows the rotation of layers {sorted(probe.angles)} and the keys "
            f"of layers {sorted(probe.keys)} only, of {layers}; expected all layers."
        )
    matched = [_match(config.model_type, i, *probe.angles[i], buffers) for i in everywhere]
    rotary = Rotary(
        torch.stack([inv_freq for inv_freq, _ in matched]),
        torch.tensor([scaling for _, scaling in matched], dtype=torch.float64),
    )
    _prove(config.model_type, rotary, probe.keys)
    return rotary


def rotates(config: PreTrainedConfig) -> bool:
    """Whether a model of this text configuration, one that `rotary_of` accepts, rotates its keys;
    no weights are needed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return any(_is_frequency(path) for path, _ in model.named_buffers())


class _Probe:
    """What the layers of a model receive and make of one token at PROBE_POSITIONS, as a batch.

    angles: layer → cos, sin [P, R]; keys: layer → post-RoPE keys [P, H, D]. On the CPU.
    """

    def __init__(self) -> None:
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}
        self.keys: dict[int, Tensor] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Probe:
        probe = cls()
        handles = [
            module.register_forward_pre_hook(probe.receive, with_kwargs=True)
            for module in model.modules()
            if hasattr(module, "layer_idx") and not hasattr(module, "self_attn")
        ]
        device = next(model.parameters()).device
        positions = torch.tensor(PROBE_POSITIONS, device=device)[:, None]
        # Any token will do but the padding token, whose embedding is zero and so are its keys.
        embeddings = cast(Tensor, model.get_input_embeddings().weight)
        token = embeddings.norm(dim=-1).argmax()
        training = model.training
        try:
            model.eval()
            with recording(model, probe):
                model.base_model(
                    input_ids=token.expand_as(positions),
                    attention_mask=torch.ones_like(positions),
                    position_ids=positions,
                    use_cache=False,
                )
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        return probe

    def receive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pair = kwargs.get("position_embeddings")
        if pair is None:
            pair = next((a for a in args if isinstance(a, tuple) and len(a) == 2), None)
        if isinstance(pair, tuple) and isinstance(pair[0], Tensor):
            cos, sin = (x[:, 0].float().cpu() for x in pair)
            self.angles[int(module.layer_idx)] = (cos, sin)  # type: ignore[arg-type]

    def record(self, call: AttentionCall) -> None:
        self.keys[call.layer] = call.key[:, :, 0].cpu()


def _frequencies(model: PreTrainedModel) -> list[tuple[Tensor, float]]:
    """Every rotation the model holds: inv_freq [R/2] float64, and its factor on cos and sin."""
    found = []
    for path, buffer in model.named_buffers():
        module, _, name = path.rpartition(".")
        if _is_frequency(name):
            factor = name.replace("inv_freq", "attention_scaling")
            scaling = float(getattr(model.get_submodule(module), factor, 1.0))
            found.append((buffer.double().cpu(), scaling))
    return found


def _is_frequency(buffer: str) -> bool:
    name = buffer.rpartition(".")[2]
    return name.endswith("inv_freq") and "original" not in name


def _match(
    name: str, layer: int, cos: Tensor, sin: Tensor, buffers: list[tuple[Tensor, float]]
) -> tuple[Tensor, float]:
    """The rotation, of those the model holds, whose cosines and sines the layer received."""
    positions = torch.tensor(PROBE_POSITIONS, dtype=torch.float64)[:, None]
    for inv_freq, scaling in buffers:
        angle = (positions * inv_freq).repeat(1, 2)
        if (
            angle.shape == cos.shape
            # bfloat16 models hand out cosines rounded to 8 bits.
            and torch.allclose(cos.double(), angle.cos() * scaling, atol=1e-2)
            and torch.allclose(sin.double(), angle.sin() * scaling, atol=1e-2)
        ):
            return inv_freq, scaling
    raise KavaError(
        f"the rotary embedding of {name}, layer {layer}, is not one this library can undo "
        "(expected half-split frequencies from an inv_freq buffer)."
    )


def _prove(name: str, rotary: Rotary, keys: dict[int, Tensor]) -> None:
    """KavaError unless the keys [P, H, D] of each layer are, un-rotated, the same everywhere."""
    cos, sin = rotary.cos_sin(torch.tensor(PROBE_POSITIONS))  # [L, P, R/2]
    for layer, rotated in keys.items():
        if rotated.shape[-1] >= 2 * cos.shape[-1]:
            plain = unrotate(rotated.double(), cos[layer, :, None], sin[layer, :, None])
            tolerance = max(1e-4, 8 * torch.finfo(rotated.dtype).eps) * float(plain.abs().max())
            if torch.allclose(plain, plain[:1].expand_as(plain), rtol=0, atol=tolerance):
                continue
        raise KavaError(
            f"{name}, layer {layer}, does not rotate its keys as its frequencies say (an "
            "interleaved layout, or a layer that skips the rotation); its keys cannot be "
            "un-rotated exactly."
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

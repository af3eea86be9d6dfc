"""Affine quantisation of keys, values and endpoint states to 8 or 4 bits.

x ≈ (code − zero) · scale, with scale in bfloat16 and an integer zero point of 16 bits, so that a
range need not contain zero. torchao's primitives do the arithmetic; what is ours is the choice of
scale and zero point from a range, and the packing of 4-bit codes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.store.layout import CODE_BITS, FLOAT_DTYPES, Codec, Geometry, calibration_layout

# A zero point must fit into 16 bits: a scale is never finer than the largest magnitude over this.
ZERO_LIMIT = 32_000


@dataclass(frozen=True)
class EncodedTensor:
    """Numbers as they are stored; dim 0 runs over records (or tokens).

    codes: [..., D] float, uint8 codes, or [..., ⌈D/2⌉] uint8 with two 4-bit codes each.
    scale, zero: broadcastable to the unpacked codes; None for floats.
    shared: the same scale and zero for everything along dim 0 (size 1 there).
    """

    codes: Tensor
    encoding: str
    length: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    shared: bool = False

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, part: slice) -> EncodedTensor:
        """The records (or tokens) of a slice, without copying."""
        if self.scale is None or self.zero is None or self.shared:
            return replace(self, codes=self.codes[part])
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=self.zero[part])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EncodedTensor:
        """The same, on `device`, still encoded."""

        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EncodedTensor:
        """The same in pinned memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> EncodedTensor:
        if self.scale is None or self.zero is None:
            return replace(self, codes=change(self.codes))
        return replace(
            self, codes=change(self.codes), scale=change(self.scale), zero=change(self.zero)
        )

    def dequantise(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[..., D] as numbers, worked out on `device` (default: where the codes are).

        dtype: of the result; by default the stored float dtype, float32 for codes. A float tensor
        that needs no change comes back as it is, not copied.
        """
        here = self if device is None else self.to(device, non_blocking=True)
        if here.scale is None or here.zero is None:
            return here.codes if dtype is None else here.codes.to(dtype)
        codes = here.codes if here.encoding == "uint8" else unpack(here.codes, here.length)
        return dequantise(codes, here.scale, here.zero).to(dtype or torch.float32)


def quantise(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of x [..., D] float32 for the range low … high.

    low, high: float32, as many dimensions as x, each of x's size or 1. Values outside the range are
    clipped; inside it the error is at most scale / 2 (up to rounding in float32).

    Returns codes uint8 [..., D], scale bfloat16 and zero int16 of the shape of `low`.
    """
    scale, zero = scale_and_zero(low, high, bits)
    return encode_with(x, scale, zero, bits), scale, zero


def encode_with(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes uint8 of x [..., D] for a given scale and zero point (broadcastable to x)."""
    quantise_affine, _ = _torchao()
    x = x.float().contiguous()
    block = _block(x, scale)
    return quantise_affine(x, block, scale.float(), zero.int(), torch.uint8, 0, 2**bits - 1)


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(codes − zero) · scale in float32; scale and zero broadcast to the codes."""
    _, dequantise_affine = _torchao()
    codes = codes.contiguous()
    return dequantise_affine(codes, _block(codes, scale), scale.float(), zero.int(), torch.uint8)


def scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """scale bfloat16 and zero point int16 with which `bits`-bit codes cover low … high (float32).

    The scale is rounded up, never down, so that rounding it cannot push a value out of range.
    """
    magnitude = torch.maximum(low.abs(), high.abs())
    step = torch.maximum((high - low) / (2**bits - 1), magnitude / ZERO_LIMIT)
    # The smallest step whose reciprocal is still a float32; all-zero ranges land here too.
    step = step.clamp_min(2.0**-120)
    scale = _bfloat16_up(step)
    zero = -(low / scale.float()).round()
    return scale, zero.to(torch.int16)


def pack(codes: Tensor) -> Tensor:
    """4-bit codes [..., D] → [..., ⌈D/2⌉] uint8; the even one lies in the low half of the byte."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack`: [..., ⌈D/2⌉] → [..., D] with D = `length`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :length].contiguous()


def fake_quantise(
    x: Tensor, encoding: str, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """x [..., D] after a trip through the store, with the gradient passed straight through.

    What comes back is what `encode` and `dequantise` make of x, bit for bit, in x's dtype. scale,
    zero: those of a calibration file, broadcastable to x; None takes the range of each vector of D
    numbers. The straight-through gradient is that of Bengio et al., arXiv 1308.3432: one
    everywhere.
    """
    with torch.no_grad():
        if scale is None or zero is None:
            stored = encode(x, encoding).dequantise(dtype=torch.float32)
        else:
            stored = dequantise(encode_with(x, scale, zero, CODE_BITS[encoding]), scale, zero)
    return _StraightThrough.apply(x, stored.to(x.dtype))


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the first one's gradient."""

    @staticmethod
    def forward(_ctx: Any, _x: Tensor, instead: Tensor) -> Tensor:
        return instead

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True)
class Ranges:
    """Calibrated ranges of keys and values, float32: [L', H, D] per channel, [L'] per tensor."""

    keys_low: Tensor
    keys_high: Tensor
    values_low: Tensor
    values_high: Tensor


def calibrate(
    samples: Iterable[tuple[Tensor, Tensor]], granularity: str, percentile: float = 99.9
) -> Ranges:
    """Ranges from a sample of caches.

    samples: pairs keys, values, each [T, L', H, D], any T. percentile: the share (in percent) of
    the sample's numbers that lie inside a range, half of the rest cut off at either end; 100 keeps
    the extremes.
    """
    if not 50 < percentile <= 100:
        raise KavaError(
            f"percentile must be above 50 and at most 100, found {percentile}. "
            "99.9 cuts off the outermost thousandth."
        )
    pairs = list(samples)
    if not pairs or not sum(len(keys) for keys, _ in pairs):
        raise KavaError("calibration found no token to take ranges from. Give it a larger sample.")
    bounds: list[Tensor] = []
    for column in range(2):
        x = torch.cat([pair[column].float() for pair in pairs])  # [T, L', H, D]
        # one row per range, its sample along the last dimension
        x = x.movedim(0, -1) if granularity == "channel" else x.movedim(1, 0).flatten(1)
        ordered = x.sort(dim=-1).values
        cut = int(ordered.shape[-1] * (100 - percentile) / 200)
        bounds += [ordered[..., cut].contiguous(), ordered[..., -1 - cut].contiguous()]
    return Ranges(*bounds)


def calibration_tensors(
    geometry: Geometry, codec: Codec, ranges: Ranges | None
) -> dict[str, Tensor]:
    """The tensors of the calibration file: scale and zero of keys and values where shared.

    Empty where every token carries its own.
    """
    tensors: dict[str, Tensor] = {}
    layout = calibration_layout(geometry, codec)
    for name in codec.calibrated:
        if ranges is None:
            raise KavaError(
                f"granularity {codec.granularity} needs calibrated ranges for the {name}, found "
                "none. Calibrate on a sample first, or use granularity token."
            )
        low, high = getattr(ranges, f"{name}_low"), getattr(ranges, f"{name}_high")
        expected = layout[f"{name}_scale"].shape
        if tuple(low.shape) != expected or tuple(high.shape) != expected:
            raise KavaError(
                f"ranges of the {name} must have the shape {list(expected)}, found "
                f"{list(low.shape)} and {list(high.shape)}. Calibrate on caches of this geometry."
            )
        bits = CODE_BITS[getattr(codec, name)]
        tensors[f"{name}_scale"], tensors[f"{name}_zero"] = scale_and_zero(low, high, bits)
    return tensors


def encode(x: Tensor, encoding: str, shared: tuple[Tensor, Tensor] | None = None) -> EncodedTensor:
    """x [A, ..., D] as it will be stored.

    shared: scale and zero from the calibration file, [L', H, D] or [L'], dim 1 of x being L';
    None takes the range of each vector of D numbers.
    """
    length = x.shape[-1]
    if encoding in FLOAT_DTYPES:
        return EncodedTensor(x.to(FLOAT_DTYPES[encoding]).contiguous(), encoding, length)
    bits = CODE_BITS[encoding]
    exact = x.float()
    if shared is None:
        low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
        codes, scale, zero = quantise(exact, low, high, bits)
    else:
        scale, zero = (spread(part, x.ndim) for part in shared)
        codes = encode_with(exact, scale, zero, bits)
    codes = codes if bits == 8 else pack(codes)
    return EncodedTensor(codes, encoding, length, scale, zero, shared is not None)


def spread(parameter: Tensor, ndim: int) -> Tensor:
    """[L', H, D] or [L'] with ones put in, to broadcast to [A, L', H, (M,) D]."""
    if parameter.ndim == 1:
        return parameter.view(1, -1, *[1] * (ndim - 2))
    rows, heads, dim = parameter.shape
    return parameter.view(1, rows, heads, *[1] * (ndim - 4), dim)


def _block(x: Tensor, scale: Tensor) -> tuple[int, ...]:
    """How many numbers share a scale, along each dimension."""
    return tuple(
        1 if group == size else size for size, group in zip(x.shape, scale.shape, strict=True)
    )


def _bfloat16_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below x (float32, positive)."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _torchao() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """torchao's quantise and dequantise; imported late, it takes a second."""
    for name in ("torchao", "torch.utils._pytree"):  # kernels it cannot load, enums it registers
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    return quantize_affine, dequantize_affine

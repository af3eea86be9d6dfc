"""Rotation as a pure function: the textbook's formula, and its exact inverse."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kava_core.rotary import Rotary, rotate, unrotate

INV_FREQ = torch.tensor([[1.0, 0.1, 0.01], [0.5, 0.05, 0.005]], dtype=torch.float64)
ROTARY = Rotary(INV_FREQ, torch.tensor([1.0, 1.25], dtype=torch.float64))  # [L=2, R/2=3]


def keys(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_each_pair_turns_by_its_angle_and_the_rest_stays() -> None:
    original = keys(8)  # R = 6 of D = 8
    cos, sin = ROTARY.cos_sin(torch.tensor(7))
    for layer in range(2):
        turned = rotate(original, cos[layer], sin[layer])
        for i in range(3):
            angle, scale = 7 * float(INV_FREQ[layer, i]), float(ROTARY.scaling[layer])
            a, b = float(original[i]), float(original[i + 3])
            expected = complex(a, b) * complex(math.cos(angle), math.sin(angle)) * scale
            assert float(turned[i]) == pytest.approx(expected.real, rel=1e-5, abs=1e-6)
            assert float(turned[i + 3]) == pytest.approx(expected.imag, rel=1e-5, abs=1e-6)
        assert torch.equal(turned[6:], original[6:])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_unrotate_is_the_inverse_at_any_position(dtype: torch.dtype, tolerance: float) -> None:
    positions = torch.tensor([0, 1, 63, 4095, 131_071])
    cos, sin = (x[:, :, None].to(dtype) for x in ROTARY.cos_sin(positions))  # [L, N, 1, R/2]
    original = keys(2, 5, 3, 8, dtype=dtype)
    for there, back in ((rotate, unrotate), (unrotate, rotate)):
        error = back(there(original, cos, sin), cos, sin) - original
        assert float(error.abs().max()) < tolerance


def test_cosines_rounded_by_a_bfloat16_model_are_undone_exactly_in_float32() -> None:
    cos, sin = (x[:, :, None].bfloat16().float() for x in ROTARY.cos_sin(torch.arange(50)))
    original = keys(2, 50, 3, 8, dtype=torch.float32)
    error = unrotate(rotate(original, cos, sin), cos, sin) - original
    assert float(error.abs().max()) < 1e-5


def test_gradient_passes_through() -> None:
    cos, sin = ROTARY.cos_sin(torch.arange(4))
    original = keys(4, 8).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda k: unrotate(k, cos[1].double(), sin[1].double()), (original,)
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    cos, sin = ROTARY.cos_sin(torch.zeros(shape, dtype=torch.long))
    assert cos.shape == sin.shape == (2, *shape, 3)
    assert cos.dtype == torch.float32
    none = Rotary(torch.zeros(2, 0).double(), torch.ones(2).double())
    cos, sin = none.cos_sin(torch.zeros(shape, dtype=torch.long))
    assert cos.shape == sin.shape == (2, *shape, 0)
    original = keys(8)
    assert torch.equal(rotate(original, cos, sin), original)
    assert torch.equal(unrotate(original, cos, sin), original)


@pytest.mark.parametrize(
    "rotary", [ROTARY, Rotary(torch.zeros(2, 0).double(), torch.ones(2).double())]
)
def test_json_keeps_every_bit(rotary: Rotary) -> None:
    again = Rotary.from_json(json.loads(json.dumps(rotary.to_json())))
    assert torch.equal(again.inv_freq, rotary.inv_freq)
    assert again.inv_freq.shape == rotary.inv_freq.shape
    assert torch.equal(again.scaling, rotary.scaling)


def test_some_layers_only() -> None:
    chosen = ROTARY.layers([1, 0, 1])
    assert torch.equal(chosen.inv_freq, INV_FREQ[[1, 0, 1]])
    assert chosen.scaling.tolist() == [1.25, 1.0, 1.25]

"""Quantisation: bounded error, exact packing, small stores, and drift that means what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.store import (
    Codec,
    Geometry,
    Ranges,
    TargetsStore,
    TeacherStore,
    calibrate,
    fake_quantise,
)
from kava_core.store.codec import (
    calibration_tensors,
    dequantise,
    encode,
    pack,
    quantise,
    scale_and_zero,
    spread,
    unpack,
)
from kava_core.store.layout import shard_layout
from kava_core.store.verify import verify
from tests.store.make import (
    make_targets_store,
    make_teacher_store,
    teacher_data,
)

LLAMA = Geometry.plain(layers=16, kv_heads=8, head_dim=64, hidden_size=2048, slots=24)


def layout_bytes(codec: Codec, names: tuple[str, ...]) -> int:
    layout = shard_layout("kv_targets", LLAMA, codec, records=1, tokens=0)
    return sum(
        spec.dtype.itemsize * int(np.prod(spec.shape))
        for name, spec in layout.items()
        if name.startswith(names)
    )


@pytest.mark.parametrize(("bits", "cache_limit", "limit"), [(8, 0.55, 0.60), (4, 0.30, 0.36)])
def test_size_against_bfloat16_at_llama_1b(bits: int, cache_limit: float, limit: float) -> None:
    codec = Codec.from_bits(keys=bits, values=bits, endpoint=8)
    cache = ("keys", "values", "slot")  # scales, zero points, positions and counts included
    assert layout_bytes(codec, cache) / layout_bytes(Codec(), ("keys", "values")) <= cache_limit
    assert layout_bytes(codec, ("",)) / layout_bytes(Codec(), ("",)) <= limit


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.60), (4, 0.36)])
def test_size_of_whole_stores_on_disk_at_llama_1b(tmp_path: Path, bits: int, limit: float) -> None:
    sizes = {}
    for name, codec in (
        ("half", Codec()),
        ("small", Codec.from_bits(keys=bits, values=bits, endpoint=8)),
    ):
        make_targets_store(tmp_path / name, sizes=(32,), geometry=LLAMA, codec=codec)
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    assert sizes["small"] / sizes["half"] <= limit


@settings(deadline=None)  # the first example waits for torchao
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([4, 8]),
    scale=st.floats(-12, 12),
    offset=st.floats(-1000, 1000),
)
def test_error_is_at_most_half_a_step(seed: int, bits: int, scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, 3, 8, generator=generator) + offset) * 10.0**scale
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    codes, step, zero = quantise(x, low, high, bits)
    assert int(codes.max()) < 2**bits
    rounding = x.abs().amax() * 1e-6
    error = (dequantise(codes, step, zero) - x).abs()
    assert (error <= step.float() / 2 + rounding).all()
    # a step is no coarser than the range, or the reach of the zero point, demands
    needed = torch.maximum((high - low) / (2**bits - 1), torch.maximum(-low, high) / 32_000)
    assert (step.float() <= needed * 1.01 + 1e-30).all()


def test_constants_zeros_and_tiny_numbers_survive() -> None:
    for value in (0.0, 1.0, -3.5, 1e-20, -1e20):
        x = torch.full((2, 4), value)
        codes, scale, zero = quantise(x, x[:, :1], x[:, :1], 4)
        assert torch.allclose(dequantise(codes, scale, zero), x, rtol=1e-4, atol=0)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_packing_is_exact(length: int, seed: int) -> None:
    codes = torch.randint(16, (3, length), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes)
    assert packed.shape == (3, (length + 1) // 2)
    assert torch.equal(unpack(packed, length), codes)


def test_calibrated_ranges_are_percentiles_of_the_sample() -> None:
    keys = torch.arange(1000.0).view(1000, 1, 1, 1).expand(1000, 2, 1, 2)
    ranges = calibrate([(keys[:600], -keys[:600]), (keys[600:], -keys[600:])], "channel", 99)
    assert ranges.keys_low.shape == (2, 1, 2)
    assert ranges.keys_low.unique().tolist() == [5]
    assert ranges.keys_high.unique().tolist() == [994]
    assert ranges.values_low.unique().tolist() == [-994]
    whole = calibrate([(keys, keys)], "tensor", 100)
    assert whole.keys_high.tolist() == [999, 999]
    with pytest.raises(KavaError, match="percentile"):
        calibrate([(keys, keys)], "tensor", 40)
    with pytest.raises(KavaError, match="no token"):
        calibrate([], "tensor")


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_calibrated_teacher_store(tmp_path: Path, granularity: str, bits: int) -> None:
    sample = teacher_data(40, seed=5)
    ranges = calibrate([(sample.keys, sample.values)], granularity, 100)
    codec = Codec.from_bits(keys=bits, values=bits, granularity=granularity)
    data = make_teacher_store(tmp_path / "store", codec=codec, ranges=ranges)
    assert (tmp_path / "store" / "calibration.safetensors").exists()
    shard = TeacherStore.open(tmp_path / "store").shard(1)
    low, high = (
        bound.view(1, 3, *([2, 6] if granularity == "channel" else [1, 1]))
        for bound in (ranges.keys_low, ranges.keys_high)
    )
    expected = data[1].keys[2:9]
    inside = (expected >= low) & (expected <= high)
    step = (high - low) / (2**bits - 1)
    got = shard.keys[2:9].dequantise()
    assert ((got - expected).abs() <= step * 0.51)[inside].all()
    assert ((got >= low - step) & (got <= high + 3 * step)).all()  # the rest is clipped


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_calibrated_targets_store(tmp_path: Path, granularity: str) -> None:
    sample = teacher_data(40, seed=5)
    ranges = calibrate([(sample.keys, sample.values + 4)], granularity, 100)
    codec = Codec.from_bits(keys=16, values=8, granularity=granularity)
    data = make_targets_store(tmp_path / "store", codec=codec, ranges=ranges)
    store = TargetsStore.open(tmp_path / "store")
    batch = store.batch([1, 2]).dequantise()
    # per channel [L', H, D] or per tensor [L'], laid over [B, L', H, M, D]
    bound = (3, 2, 1, 6) if granularity == "channel" else (3, 1, 1, 1)
    low, high = ranges.values_low.view(bound), ranges.values_high.view(bound)
    expected = data[0].values[1:3].nan_to_num(0)
    inside = (expected >= low) & (expected <= high) & batch.slot_mask[..., None]
    assert ((batch.values - expected).abs() <= (high - low) / 255 * 0.51)[inside].all()
    assert inside.float().mean() > 0.1
    everything = store.batch(range(7)).dequantise()
    mask = everything.slot_mask[:, 0, ..., None].expand_as(everything.values[:, 0])
    std = everything.values[:, 0][mask].double().std(correction=0).item()
    assert store.manifest.statistics.values_std[0] == pytest.approx(std, rel=1e-6)


def test_calibration_must_fit(tmp_path: Path) -> None:
    codec = Codec.from_bits(keys=8, granularity="channel")
    with pytest.raises(KavaError, match="needs calibrated ranges for the keys"):
        make_teacher_store(tmp_path / "a", codec=codec)
    wrong = Ranges(*[torch.zeros(2, 2, 6)] * 4)
    with pytest.raises(KavaError, match=r"must have the shape \[3, 2, 6\], found \[2, 2, 6\]"):
        make_teacher_store(tmp_path / "b", codec=codec, ranges=wrong)


@pytest.mark.parametrize("bits", [8, 4])
def test_drift_is_what_a_reader_would_measure(tmp_path: Path, bits: int) -> None:
    data = make_targets_store(
        tmp_path / "store", codec=Codec.from_bits(keys=bits, values=bits), sizes=(9, 12)
    )
    store = TargetsStore.open(tmp_path / "store")
    drift = store.manifest.drift
    assert drift is not None
    got = store.batch(range(21)).dequantise()
    for name in ("keys", "values"):
        exact = torch.cat([getattr(shard, name) for shard in data]).nan_to_num(0)
        error = (getattr(got, name) - exact).double().square().sum((0, 2, 3, 4))
        relative = (error / exact.double().square().sum((0, 2, 3, 4))).sqrt()
        assert np.allclose(getattr(drift, f"{name}_relative_l2"), relative, rtol=1e-5)
        changed, total = torch.zeros(3), torch.zeros(3)
        for i, row, head in np.ndindex(21, 3, 2):
            count = int(got.slot_counts[i, row, head])
            if count < 2:
                continue
            before, after = (y[i, row, head, :count] for y in (exact, getattr(got, name)))
            for slot in range(count):
                others = [other for other in range(count) if other != slot]
                nearest = [
                    min(others, key=lambda o, y=y, s=slot: (y[s] - y[o]).square().sum().item())
                    for y in (before, after)
                ]
                changed[row] += nearest[0] != nearest[1]
                total[row] += 1
        assert np.allclose(getattr(drift, f"{name}_neighbour_changed"), changed / total)


def test_four_bits_drift_more_than_eight_and_sixteen_report_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drifts = {}
    for bits in (16, 8, 4):
        make_teacher_store(tmp_path / str(bits), codec=Codec.from_bits(keys=bits, values=bits))
        said = capsys.readouterr().err
        assert ("teacher_kv: drift of keys by quantisation: relative L2 0.0" in said) == (bits < 16)
        drifts[bits] = TeacherStore.open(tmp_path / str(bits)).manifest.drift
    assert drifts[16] is None
    assert drifts[8] is not None
    assert drifts[4] is not None
    assert max(drifts[8].keys_relative_l2) < 0.01 < min(drifts[4].keys_relative_l2) < 0.2


@pytest.mark.parametrize("encoding", ["uint8", "uint4", "bfloat16", "float16", "float32"])
def test_fake_quantisation_is_the_stores_and_lets_gradients_through(encoding: str) -> None:
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    fake = fake_quantise(x, encoding)
    assert torch.equal(fake, encode(x.detach(), encoding).dequantise(dtype=torch.float32))
    assert torch.equal(fake, x) == (encoding == "float32")
    (gradient,) = torch.autograd.grad((fake * 3).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3))
    assert fake_quantise(x.bfloat16(), encoding).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 2, 6), (3,)], ids=["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_fake_quantisation_clips_to_calibrated_ranges(bits: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(5, 3, 2, 4, 6, requires_grad=True)  # [B, L', H, M, D]
    pair = scale_and_zero(torch.full(shape, -0.5), torch.full(shape, 0.5), bits)
    name = {8: "uint8", 4: "uint4"}[bits]
    fake = fake_quantise(x, name, *(spread(part, x.ndim) for part in pair))
    assert torch.equal(fake, encode(x.detach(), name, pair).dequantise())
    assert fake.abs().max() <= 0.55
    (gradient,) = torch.autograd.grad(fake.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))  # where it was clipped too


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Some of the layers, alone or in groups of neighbours that share."""
    layers = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
    kept = [layer for layer, chosen in enumerate(layers) if chosen]
    share = draw(st.sampled_from(["none", "selection", "merged"]))
    size = 1 if share == "none" else draw(st.integers(1, 3))
    return Geometry.model_validate(
        {
            "model_layers": len(layers),
            "layers": tuple(kept),
            "groups": tuple(tuple(kept[i : i + size]) for i in range(0, len(kept), size)),
            "share": share,
            "kv_heads": draw(st.integers(1, 3)),
            "head_dim": draw(st.integers(1, 7)),
            "hidden_size": draw(st.integers(1, 9)),
            "slots": draw(st.integers(1, 6)),
        }
    )


CODECS = st.builds(
    lambda keys, values, endpoint, half, granularity: Codec.from_bits(
        keys=keys, values=values, endpoint=endpoint, half=half, granularity=granularity
    ),
    st.sampled_from([32, 16, 8, 4]), st.sampled_from([32, 16, 8, 4]),
    st.sampled_from([32, 16, 8]), st.sampled_from(["bfloat16", "float16"]),
    st.sampled_from(["token", "channel", "tensor"]),
)  # fmt: skip
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def random_ranges(geometry: Geometry, codec: Codec, seed: int) -> Ranges:
    """Ranges of a sample that is not the data, so that some of it is clipped."""
    rows, heads, dim = len(geometry.rows), geometry.kv_heads, geometry.head_dim
    sample = torch.randn(9, rows, heads, dim, generator=torch.Generator().manual_seed(seed + 1))
    return calibrate([(sample, sample + 1)], codec.granularity, 99)


def stored(
    x: torch.Tensor, name: str, geometry: Geometry, codec: Codec, ranges: Ranges
) -> torch.Tensor:
    """x [A, ...] as numbers after encoding."""
    shared = calibration_tensors(geometry, codec, ranges)
    pair = None
    if name in codec.calibrated:
        pair = shared[f"{name}_scale"], shared[f"{name}_zero"]
    return encode(x, getattr(codec, name), pair).dequantise(dtype=torch.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(geometry=geometries(), codec=CODECS, sizes=SIZES, seed=st.integers(0, 1000))
def test_any_targets_store_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    geometry: Geometry,
    codec: Codec,
    sizes: tuple[int, ...],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("stores") / "store"
    ranges = random_ranges(geometry, codec, seed)
    data = make_targets_store(folder, sizes, geometry, codec, ranges, seed=seed)
    store = TargetsStore.open(folder)
    batch = store.batch(range(len(store))).dequantise()
    for name in ("keys", "values", "endpoint"):
        exact = torch.cat([getattr(shard, name) for shard in data]).nan_to_num(0)
        assert torch.equal(getattr(batch, name), stored(exact, name, geometry, codec, ranges))
    assert verify(folder, full=True) == []
    for name in ("slot_counts", "slot_positions"):
        assert torch.equal(
            getattr(batch, name), torch.cat([getattr(shard, name) for shard in data]).int()
        )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(geometry=geometries(), codec=CODECS, sizes=SIZES, seed=st.integers(0, 1000))
def test_any_teacher_store_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    geometry: Geometry,
    codec: Codec,
    sizes: tuple[int, ...],
    seed: int,
) -> None:
    geometry = geometry.model_copy(update={"slots": 0})
    folder = tmp_path_factory.mktemp("stores") / "store"
    ranges = random_ranges(geometry, codec, seed)
    data = make_teacher_store(folder, sizes, geometry, codec, ranges, seed=seed)
    store = TeacherStore.open(folder)
    for k, expected in enumerate(data):
        shard = store.shard(k)
        assert shard.records == expected.records
        assert torch.equal(shard.importance, expected.importance)
        for name in ("keys", "values", "endpoint"):
            exact = getattr(expected, name)
            assert torch.equal(
                getattr(shard, name).dequantise(dtype=torch.float32),
                stored(exact, name, geometry, codec, ranges),
            )
    assert verify(folder, full=True) == []


def test_unknown_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bits"):
        Codec.from_bits(keys=3)
    with pytest.raises(ValueError, match="uint4"):
        Codec.from_bits(endpoint=4)

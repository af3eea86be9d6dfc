"""METHOD-level formulas written the slow and obvious way: float64, one token pair at a time."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from kava_core.eviction import CacheBatch
from kava_core.rotary import Rotary

MASK = (1 << 64) - 1


def make_batch(
    lengths: list[int],
    *,
    layers: int = 3,
    heads: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CacheBatch:
    """Random caches with a rotation, importance like a captured one, ids r0, r1, …, steps of 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    shape = (tokens, layers, heads, dim)
    shared = torch.randn(1, layers, heads, dim, generator=generator)  # so that cosines are not ~0
    keys = (torch.randn(shape, generator=generator) + shared).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    importance = torch.rand(shape[:3], generator=generator) / max(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inv_freq = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    rotary = Rotary(inv_freq.repeat(layers, 1), torch.ones(layers, dtype=torch.float64))
    return CacheBatch.from_ragged(
        keys,
        values,
        importance,
        offsets,
        [f"r{i}" for i in range(len(lengths))],
        rotary=rotary,
        cot_start=[5 + 3 * i for i in range(len(lengths))],
        step_ends=[[*range(3, n, 3), n] for n in lengths],
        results=[[*range(1, n, 3)] or [0] for n in lengths],
    )


def redundancy(keys: Tensor) -> list[float]:
    """keys [N, D] float64 → softmax_i( −(1/N) Σ_{j≠i} cos(k_i, k_j) )."""
    n = len(keys)

    def cos(a: Tensor, b: Tensor) -> float:
        norms = float(a.norm() * b.norm())
        return float(a @ b) / norms if norms else 0.0

    logits = [-sum(cos(keys[i], keys[j]) for j in range(n) if j != i) / n for i in range(n)]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def turn(key: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """One key [D] at its position, each pair (i, i + D/2) as a complex number."""
    half = len(inv_freq)
    pairs = torch.complex(key[:half], key[half:]) * torch.exp(1j * position * inv_freq)
    return torch.cat((pairs.real, pairs.imag))


def hashed(seed: int, name: str, layer: int, head: int, token: int) -> int:
    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    place = (layer << 48) + (head << 32) + token
    return mix((mix(place) + key) & MASK) & 0xFFFFFF


def scores(
    name: str, settings: dict, batch: CacheBatch, record: int, layer: int, head: int, budget: int
) -> list[float]:
    """The scores of one record, layer of the store and head, under the named policy."""
    first, last = batch.spans[record]
    n = last - first
    keys = batch.keys[first:last, layer, head].double()
    values = batch.values[first:last, layer, head].double()
    if name in ("rkv", "redundancy"):
        compared = keys
        if settings.get("redundancy_phase") == "post_rope":
            start, inv_freq = batch.cot_start[record], batch.rotary.inv_freq[layer]
            compared = torch.stack([turn(key, start + i, inv_freq) for i, key in enumerate(keys)])
        different = redundancy(compared)
    if name in ("rkv", "attention"):
        important = batch.importance[first:last, layer, head].double().tolist()
    match name:
        case "rkv":
            lam = settings.get("lambda_", 0.1)
            return [lam * a + (1 - lam) * b for a, b in zip(important, different, strict=True)]
        case "attention":
            return important
        case "redundancy":
            return different
        case "crop":
            return [float(i < budget) for i in range(n)]
        case "uniform":
            m = min(budget, n)
            if m == 1:
                return [float(i == (n - 1) // 2) for i in range(n)]
            kept = {math.floor(j * (n - 1) / (m - 1) + 0.5) for j in range(m)}
            return [float(i in kept) for i in range(n)]
        case "random":
            seed = settings.get("seed", 0)
            return [float(hashed(seed, batch.ids[record], layer, head, i)) for i in range(n)]
        case "key_norm":
            return (-keys.norm(dim=-1)).tolist()
        case "value_norm":
            return values.norm(dim=-1).tolist()
        case "steps":
            after = [min(e for e in batch.step_ends[record] if e > i) - 1 - i for i in range(n)]
            last = settings.get("last", 1)
            return [i - n * a if a < last else -math.inf for i, a in enumerate(after)]
        case "results":
            return [float(i) if i in batch.results[record] else -math.inf for i in range(n)]
        case "streaming":
            anchors = min(settings.get("first", 4), n)
            order = [*range(anchors), *range(n - 1, anchors - 1, -1)]
            kept = set(order[:budget])
            return [float(i in kept) for i in range(n)]
    raise NotImplementedError(f"write a slow reference for {name}")


def best(values: list[float], budget: int) -> list[int]:
    """The indices of the highest, the earlier of equals, ascending; −∞ is never chosen."""
    choices = [i for i in range(len(values)) if values[i] > -math.inf]
    return sorted(sorted(choices, key=lambda i: (-values[i], i))[:budget])

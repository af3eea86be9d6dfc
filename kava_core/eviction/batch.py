"""Teacher caches of a few records, laid end to end, as a policy sees them.

Traces differ in length, so a batch is *ragged*: the tokens of all records one after the other, as
the teacher store keeps them, with offsets. There is no padding to compute on, to mask or to select
by mistake; a padded cache is cut to its valid tokens on the way in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.rotary import Rotary, rotate

RotaryPhase = Literal["pre_rope", "post_rope"]

# float32 elements of keys that are scored at a time. On a CPU a block should stay in the caches, on
# a GPU it should be worth its kernel launches.
BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class CacheBatch:
    """The chain-of-thought caches of B records, T = ΣN_C tokens in all.

    keys, values: [T, L, H, D] pre-RoPE, any float dtype, of all layers of the store.
    importance:   [T, L, H] the answer's attention to each token (METHOD.md section 2), or None.
    offsets:      B + 1 integers; record b is tokens offsets[b] to offsets[b + 1].
    ids:          the records' names, for messages and for the random policy.
    layers:       the L' layers that take part, as indices into L.
    rotary, cot_start: the rotation of all L layers and the position of each record's first
        chain-of-thought token; needed for post-RoPE keys only.
    budgets:      the slots to fill in each of the L' layers; `evict` sets it before scoring.
    """

    keys: Tensor
    values: Tensor
    importance: Tensor | None
    offsets: tuple[int, ...]
    ids: tuple[str, ...]
    layers: tuple[int, ...]
    rotary: Rotary | None = None
    cot_start: tuple[int, ...] | None = None
    budgets: tuple[int, ...] | None = None

    @classmethod
    def from_ragged(
        cls,
        keys: Tensor,
        values: Tensor,
        importance: Tensor | None,
        offsets: Tensor | Sequence[int],
        ids: Sequence[str],
        *,
        rotary: Rotary | None = None,
        cot_start: Tensor | Sequence[int] | None = None,
    ) -> CacheBatch:
        """A batch over tensors as a teacher shard holds them; nothing is copied.

        keys, values [T, L, H, D], importance [T, L, H], offsets [B + 1], cot_start [B].
        Raises KavaError for shapes that do not fit together and for an empty trace.
        """
        bounds = _integers(offsets)
        starts = None if cot_start is None else _integers(cot_start)
        _check_shapes(keys, values, importance, bounds, ids, starts)
        for name, first, last in zip(ids, bounds[:-1], bounds[1:], strict=True):
            if last <= first:
                raise KavaError(
                    f"record {name!r}: expected a chain of thought of at least one token, found "
                    "none. Remove the problem or give it a trace."
                )
        layers = tuple(range(keys.shape[1]))
        return cls(keys, values, importance, bounds, tuple(ids), layers, rotary, starts)

    @classmethod
    def from_padded(
        cls,
        keys: Tensor,
        values: Tensor,
        importance: Tensor | None,
        lengths: Tensor | Sequence[int],
        ids: Sequence[str],
        *,
        rotary: Rotary | None = None,
        cot_start: Tensor | Sequence[int] | None = None,
    ) -> CacheBatch:
        """A batch from right-padded caches: keys, values [B, L, H, N, D], importance [B, L, H, N].

        Only the first `lengths[b]` tokens of a record are read; what the padding holds is ignored.
        """
        sizes = torch.as_tensor(lengths, dtype=torch.int64).cpu()
        if sizes.shape != keys.shape[:1] or int(sizes.max()) > keys.shape[3]:
            raise KavaError(
                f"expected one length of at most {keys.shape[3]} for each of {keys.shape[0]} "
                f"records, found {sizes.tolist()}."
            )
        valid = (torch.arange(keys.shape[3]) < sizes[:, None]).to(keys.device)  # [B, N]
        return cls.from_ragged(
            keys.permute(0, 3, 1, 2, 4)[valid],
            values.permute(0, 3, 1, 2, 4)[valid],
            None if importance is None else importance.permute(0, 3, 1, 2)[valid],
            [0, *sizes.cumsum(0).tolist()],
            ids,
            rotary=rotary,
            cot_start=cot_start,
        )

    def choose_layers(self, layers: Sequence[int]) -> CacheBatch:
        """The same records with only these layers of the store taking part (nothing is copied)."""
        for layer in layers:
            if not 0 <= layer < self.keys.shape[1]:
                raise KavaError(
                    f"expected layers from 0 to {self.keys.shape[1] - 1}, found {layer}. "
                    "Change the setting `layers`."
                )
        return replace(self, layers=tuple(layers))

    def to(self, device: torch.device | str) -> CacheBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            keys=self.keys.to(device),
            values=self.values.to(device),
            importance=None if self.importance is None else self.importance.to(device),
        )

    @property
    def lengths(self) -> list[int]:
        """N_C of each record."""
        return [last - first for first, last in self.spans]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and one-past-last token of each record."""
        return list(zip(self.offsets[:-1], self.offsets[1:], strict=True))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, L', H): the shape of a score."""
        return self.offsets[-1], len(self.layers), self.keys.shape[2]

    def token_lengths(self) -> Tensor:
        """[T] int64: N_C of the record each token belongs to."""
        sizes = torch.tensor(self.lengths, device=self.keys.device)
        return sizes.repeat_interleave(sizes, output_size=self.offsets[-1])

    def token_indices(self) -> Tensor:
        """[T] int64: each token's place in its own trace, from 0."""
        device = self.keys.device
        sizes = torch.tensor(self.lengths, device=device)
        starts = torch.tensor(self.offsets[:-1], device=device)
        tokens = torch.arange(self.offsets[-1], device=device)
        return tokens - starts.repeat_interleave(sizes, output_size=self.offsets[-1])

    def float_keys(self, phase: RotaryPhase = "pre_rope") -> Tensor:
        """[T, L', H, D] float32: a fresh copy of the keys, as stored or at their positions."""
        keys = self._chosen(self.keys).to(torch.float32, copy=True)
        if phase == "pre_rope":
            return keys
        rotary, cot_start = self.rotation("redundancy_phase: post_rope")
        if rotary.inv_freq.shape[-1] == 0:  # the model does not rotate
            return keys
        starts = torch.tensor(cot_start, device=keys.device)
        sizes = torch.tensor(self.lengths, device=keys.device)
        positions = self.token_indices() + starts.repeat_interleave(sizes)
        cos, sin = rotary.layers(list(self.layers)).cos_sin(positions)  # [L', T, R/2]
        return rotate(keys, cos.transpose(0, 1)[:, :, None], sin.transpose(0, 1)[:, :, None])

    def float_values(self) -> Tensor:
        """[T, L', H, D] float32: a fresh copy of the values."""
        return self._chosen(self.values).to(torch.float32, copy=True)

    def float_importance(self) -> Tensor:
        """[T, L', H] float32; KavaError if the teacher cache was stored without it."""
        if self.importance is None:
            raise KavaError(
                "this policy scores tokens by the answer's attention to them (`importance`), which "
                "the teacher cache does not hold. Run the generate stage with "
                "`generate.importance: true`, or choose a policy that does not need it."
            )
        return self._chosen(self.importance).float()

    def rotation(self, setting: str) -> tuple[Rotary, tuple[int, ...]]:
        """Rotary and first positions; KavaError naming `setting` if the batch came without."""
        if self.rotary is None or self.cot_start is None:
            raise KavaError(
                f"`{setting}` needs the teacher's rotary embedding and the position of each trace, "
                "which this teacher cache does not hold. Use pre_rope."
            )
        return self.rotary, self.cot_start

    def blocks(self) -> Iterator[tuple[CacheBatch, slice, slice]]:
        """Pieces small enough to be scored in float32, with their tokens and layers.

        A block is several whole records, or some layers of a record that is too long. Which layers
        share a block depends on that record alone, never on its neighbours.
        """
        limit = BLOCK_ELEMENTS["cpu" if self.keys.device.type == "cpu" else "cuda"]
        n_layers = len(self.layers)
        per_layer = self.keys.shape[2] * self.keys.shape[3]  # elements of one token in one layer
        first = 0
        while first < len(self.ids):
            last = first + 1
            size = self.offsets[last] - self.offsets[first]
            step = max(1, min(n_layers, limit // (size * per_layer)))
            while (
                last < len(self.ids)
                and (self.offsets[last + 1] - self.offsets[first]) * per_layer * n_layers <= limit
            ):
                last += 1
            for layer in range(0, n_layers, step):
                layers = slice(layer, min(layer + step, n_layers))
                yield self._piece(first, last, layers), self._tokens(first, last), layers
            first = last

    def _piece(self, first: int, last: int, layers: slice) -> CacheBatch:
        tokens = self._tokens(first, last)
        return replace(
            self,
            keys=self.keys[tokens],
            values=self.values[tokens],
            importance=None if self.importance is None else self.importance[tokens],
            offsets=tuple(offset - tokens.start for offset in self.offsets[first : last + 1]),
            ids=self.ids[first:last],
            layers=self.layers[layers],
            cot_start=None if self.cot_start is None else self.cot_start[first:last],
            budgets=None if self.budgets is None else self.budgets[layers],
        )

    def _tokens(self, first: int, last: int) -> slice:
        return slice(self.offsets[first], self.offsets[last])

    def _chosen(self, tensor: Tensor) -> Tensor:
        """tensor [T, L, ...] → [T, L', ...]: a view where the chosen layers are evenly spaced."""
        layers = self.layers
        step = layers[1] - layers[0] if len(layers) > 1 else 1
        if step > 0 and layers == tuple(range(layers[0], layers[-1] + 1, step)):
            return tensor[:, layers[0] : layers[-1] + 1 : step]
        return tensor[:, list(layers)]


def check_phase(setting: str, phase: str) -> None:
    """KavaError naming `setting` unless `phase` is one of the two."""
    if phase not in get_args(RotaryPhase):
        raise KavaError(f"expected `{setting}` to be pre_rope or post_rope, found {phase!r}.")


def _integers(values: Tensor | Sequence[int]) -> tuple[int, ...]:
    return tuple(values.tolist() if isinstance(values, Tensor) else values)


def _check_shapes(
    keys: Tensor,
    values: Tensor,
    importance: Tensor | None,
    offsets: tuple[int, ...],
    ids: Sequence[str],
    cot_start: tuple[int, ...] | None,
) -> None:
    if keys.ndim != 4 or values.shape != keys.shape:
        raise KavaError(
            "expected keys and values of one shape [tokens, layers, heads, head dim], found "
            f"{list(keys.shape)} and {list(values.shape)}."
        )
    if importance is not None and importance.shape != keys.shape[:3]:
        raise KavaError(
            f"expected importance of shape {list(keys.shape[:3])}, found {list(importance.shape)}."
        )
    if not offsets or offsets[0] != 0 or offsets[-1] != keys.shape[0]:
        raise KavaError(
            f"expected offsets from 0 to {keys.shape[0]} tokens, found {list(offsets[:1])} to "
            f"{list(offsets[-1:])}."
        )
    if len(ids) != len(offsets) - 1 or (cot_start is not None and len(cot_start) != len(ids)):
        raise KavaError(
            f"expected an id and a position for each of {len(offsets) - 1} records, found "
            f"{len(ids)} ids and {'no' if cot_start is None else len(cot_start)} positions."
        )

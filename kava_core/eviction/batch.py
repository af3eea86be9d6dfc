"""Teacher caches of a few records, laid end to end, as a policy sees them.

Traces differ in length, so a batch is *ragged*: the tokens of all records one after the other, as
the teacher store keeps them, with offsets. There is no padding to compute on, to mask or to select
by mistake; a padded cache is cut to its valid tokens on the way in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.eviction.policies.base import RotaryPhase
from kava_core.record import Record
from kava_core.rotary import Rotary, rotate

# float32 elements of keys that are worked on at a time. On a CPU a piece should stay in the caches,
# on a GPU it should be worth its kernel launches.
PIECE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


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
    step_ends:    where each record's steps end, as places in its trace after their last tokens;
        the last is N_C. Needed by policies that go by steps.
    results:      the places in each record's trace of the tokens that state a step's result.
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
    step_ends: tuple[tuple[int, ...], ...] | None = None
    results: tuple[tuple[int, ...], ...] | None = None
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
        step_ends: Sequence[Sequence[int]] | None = None,
        results: Sequence[Sequence[int]] | None = None,
    ) -> CacheBatch:
        """A batch over tensors as a teacher shard holds them; nothing is copied.

        keys, values [T, L, H, D], importance [T, L, H], offsets [B + 1], cot_start [B]; step_ends,
        results: of each record. Raises KavaError for shapes that do not fit together and for an
        empty trace.
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
        ends = None if step_ends is None else tuple(map(tuple, step_ends))
        _check_steps(ends, bounds, ids)
        stated = None if results is None else tuple(map(tuple, results))
        return cls(
            keys, values, importance, bounds, tuple(ids), layers, rotary, starts, ends, stated
        )

    @classmethod
    def of_records(
        cls,
        keys: Tensor,
        values: Tensor,
        importance: Tensor | None,
        offsets: Tensor | Sequence[int],
        records: Sequence[Record],
        rotary: Rotary | None,
    ) -> CacheBatch:
        """A batch over the whole caches of `records`, with all that they say of their traces.

        Shapes and errors as in `from_ragged`.
        """
        ends = [record.step_ends for record in records]
        return cls.from_ragged(
            keys,
            values,
            importance,
            offsets,
            [record.id for record in records],
            rotary=rotary,
            cot_start=[len(record.question_ids) for record in records],
            step_ends=ends if all(ends) else None,
            results=[record.results for record in records],
        )

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

    @cached_property
    def token_lengths(self) -> Tensor:
        """[T] int64: N_C of the record each token belongs to."""
        return self.per_token(self.lengths)

    @cached_property
    def token_indices(self) -> Tensor:
        """[T] int64: each token's place in its own trace, from 0."""
        tokens = torch.arange(self.offsets[-1], device=self.keys.device)
        return tokens - self.per_token(self.offsets[:-1])

    @cached_property
    def tokens_to_step_end(self) -> Tensor:
        """[T] int64: how many tokens of its step follow each token, 0 for the last.

        KavaError if the batch came without the ends of steps.
        """
        if self.step_ends is None:
            raise KavaError(
                "this policy goes by the steps of a trace, and this teacher cache does not say "
                "where they end. Run `kava generate` again, or set `policy` to one that does "
                "without."
            )
        ends = [end for record in self.step_ends for end in record]
        sizes = [
            end - start
            for record in self.step_ends
            for start, end in zip((0, *record), record, strict=False)
        ]
        device = self.keys.device
        last = torch.tensor(ends, device=device).repeat_interleave(
            torch.tensor(sizes, device=device), output_size=self.offsets[-1]
        )
        return last - 1 - self.token_indices

    @cached_property
    def is_result(self) -> Tensor:
        """[T] bool: the tokens that state a step's result.

        KavaError if the batch came without them, naming a record that has none.
        """
        unknown = list(self.ids)
        if self.results is not None:
            unknown = [name for name, at in zip(self.ids, self.results, strict=True) if not at]
        if self.results is None or unknown:
            raise KavaError(
                f"record {unknown[0]!r}: this policy keeps the results of steps, and the trace "
                "does not say which of its tokens these are. Use `prepare.traces: equations` or "
                "`results`, or another `policy`."
            )
        found = torch.zeros(self.offsets[-1], dtype=torch.bool, device=self.keys.device)
        spans = zip(self.offsets, self.results, strict=False)
        places = [first + i for first, at in spans for i in at]
        found[places] = True
        return found

    def empty_scores(self) -> Tensor:
        """[T, L', H] float32 to be filled."""
        return torch.empty(self.shape, device=self.keys.device)

    def pieces(self) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
        """Slices of the T tokens small enough to be worked on in float32, in order.

        A piece is several whole records, or a part of one that is too long; with it come the
        records in it and the part of the piece that is theirs. How a record is cut depends on that
        record alone, never on its neighbours.
        """
        limit = PIECE_ELEMENTS["cpu" if self.keys.device.type == "cpu" else "cuda"]
        size = max(1, limit // (len(self.layers) * self.keys.shape[2] * self.keys.shape[3]))
        start = 0
        parts: list[tuple[int, slice]] = []
        for record, (first, last) in enumerate(self.spans):
            if parts and last - start > size:
                yield slice(start, first), parts
                parts = []
            if last - first > size:
                for token in range(first, last, size):
                    stop = min(token + size, last)
                    yield slice(token, stop), [(record, slice(0, stop - token))]
                continue
            start = start if parts else first
            parts.append((record, slice(first - start, last - start)))
        if parts:
            yield slice(start, self.offsets[-1]), parts

    def float_keys(self, tokens: slice, phase: RotaryPhase = "pre_rope") -> Tensor:
        """[tokens, L', H, D] float32: a fresh copy of the keys, as stored or at their positions."""
        keys = self._chosen(self.keys[tokens]).to(torch.float32, copy=True)
        if phase == "pre_rope":
            return keys
        rotary, positions = self.rotation("redundancy_phase: post_rope")
        cos, sin = rotary.layers(list(self.layers)).cos_sin(positions[tokens])  # [L', tokens, R/2]
        return rotate(keys, cos.transpose(0, 1)[:, :, None], sin.transpose(0, 1)[:, :, None])

    def float_values(self, tokens: slice) -> Tensor:
        """[tokens, L', H, D] float32: a fresh copy of the values."""
        return self._chosen(self.values[tokens]).to(torch.float32, copy=True)

    def float_importance(self) -> Tensor:
        """[T, L', H] float32; KavaError if the teacher cache was stored without it."""
        if self.importance is None:
            raise KavaError(
                "this policy scores tokens by the answer's attention to them (`importance`), which "
                "this teacher cache does not hold. The generate stage stores it: run that again, "
                "or set `policy` to one that does without."
            )
        return self._chosen(self.importance).float()

    def rotation(self, setting: str) -> tuple[Rotary, Tensor]:
        """The rotation and the position of each token, [T] int64, in the teacher's sequence.

        KavaError naming `setting` if the batch came without.
        """
        if self.rotary is None or self.cot_start is None:
            raise KavaError(
                f"`{setting}` needs the teacher's rotary embedding and the position of each trace, "
                "which this teacher cache does not hold. Use pre_rope."
            )
        return self.rotary, self._positions

    @cached_property
    def _positions(self) -> Tensor:
        return self.token_indices + self.per_token(self.cot_start or ())

    def per_token(self, values: Sequence[int]) -> Tensor:
        """One value per record → [T] int64, repeated for each of its tokens."""
        device = self.keys.device
        sizes = torch.tensor(self.lengths, device=device)
        return torch.tensor(values, device=device).repeat_interleave(
            sizes, output_size=self.offsets[-1]
        )

    def _chosen(self, tensor: Tensor) -> Tensor:
        """tensor [T, L, ...] → [T, L', ...]: a view where the chosen layers are evenly spaced."""
        layers = self.layers
        step = layers[1] - layers[0] if len(layers) > 1 else 1
        if step > 0 and layers == tuple(range(layers[0], layers[-1] + 1, step)):
            return tensor[:, layers[0] : layers[-1] + 1 : step]
        return tensor[:, list(layers)]


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


def _check_steps(
    step_ends: tuple[tuple[int, ...], ...] | None, offsets: tuple[int, ...], ids: Sequence[str]
) -> None:
    """KavaError naming the first record whose steps do not make up its trace."""
    if step_ends is None:
        return
    lengths = [last - first for first, last in pairwise(offsets)]
    if len(step_ends) != len(ids):
        raise KavaError(f"expected the steps of {len(ids)} records, found {len(step_ends)}.")
    for name, ends, length in zip(ids, step_ends, lengths, strict=True):
        if not ends or ends[-1] != length or list(ends) != sorted(set(ends)) or ends[0] < 1:
            raise KavaError(
                f"record {name!r}: expected steps that end one after the other, the last with the "
                f"trace of {length} tokens, found {list(ends)}. Run the generate stage again."
            )

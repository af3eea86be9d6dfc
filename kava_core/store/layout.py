"""What a store holds: geometry, encodings, and the tensors of a shard that follow from them.

Writer, reader, verification and `docs/store-format.md` all go by `shard_layout`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

LIMIT = 1 << 63  # no length or number of anything reaches it
Count = Annotated[int, Field(gt=0, lt=LIMIT)]
Kind = Literal["teacher_kv", "kv_targets"]
RotaryPhase = Literal["pre_rope", "post_rope"]
Share = Literal["none", "selection", "merged"]
Granularity = Literal["token", "channel", "tensor"]
Encoding = Literal["float32", "bfloat16", "float16", "uint8", "uint4"]
EndpointEncoding = Literal["float32", "bfloat16", "float16", "uint8"]

INDEX_FILE = "index.arrow"
MANIFEST_FILE = "manifest.json"
CALIBRATION_FILE = "calibration.safetensors"
FLOAT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CODE_BITS = {"uint8": 8, "uint4": 4}
PIECE = 1 << 14  # slots that are looked at together


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys and never converts a wrong type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Geometry(StrictModel):
    """The shapes of a store.

    model_layers L, kv_heads H, head_dim D, hidden_size E: of the teacher.
    layers: the teacher layers (counted from 0) whose cache is kept, ascending.
    groups: `layers` cut into runs of neighbours; one layer each unless something is shared.
    share: `none`; `selection`, the layers of a group keep the same positions; `merged`, one cache
        stands for all the layers of a group.
    slots: M, the cache slots kept per row and head; 0 in a teacher store, which keeps every token.
    """

    model_layers: Count
    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    share: Share = "none"
    kv_heads: Count
    head_dim: Count
    hidden_size: Count
    slots: Annotated[int, Field(ge=0, lt=LIMIT)] = 0

    @classmethod
    def plain(
        cls, *, layers: int, kv_heads: int, head_dim: int, hidden_size: int, slots: int = 0
    ) -> Self:
        """All `layers` = L layers of the teacher, nothing shared."""
        return cls(
            model_layers=layers,
            layers=tuple(range(layers)),
            groups=tuple((layer,) for layer in range(layers)),
            kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
            slots=slots,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        inside = all(0 <= layer < self.model_layers for layer in self.layers)
        if not self.layers or not inside or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"layers must be ascending numbers from 0 to {self.model_layers - 1}, "
                f"found {list(self.layers)}"
            )
        if [layer for group in self.groups for layer in group] != list(self.layers):
            raise ValueError("groups must be the layers, in order, cut into runs")
        if not all(self.groups):
            raise ValueError("a group must have at least one layer")
        if self.share == "none" and len(self.groups) != len(self.layers):
            raise ValueError("share none needs groups of one layer each")
        return self

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """For each of the L' cache rows stored per record, the teacher layers it stands for."""
        if self.share == "merged":
            return self.groups
        return tuple((layer,) for layer in self.layers)

    @property
    def layer_map(self) -> dict[int, int]:
        """Teacher layer → cache row that holds its target; layers left out are absent."""
        return {layer: row for row, layers in enumerate(self.rows) for layer in layers}


class Codec(StrictModel):
    """How keys, values and endpoint states are written.

    Floats are stored as they are. `uint8` and `uint4` are affine codes, x ≈ (code − zero) · scale,
    with one scale and zero point per `token` (the D numbers of one token, row and head), per
    `channel` (row, head, dimension) or per `tensor` (row); see `kava_core.store.codec`. An endpoint
    in `uint8` always has one scale per level and record.
    """

    keys: Encoding = "bfloat16"
    values: Encoding = "bfloat16"
    endpoint: EndpointEncoding = "bfloat16"
    granularity: Granularity = "token"

    @classmethod
    def from_bits(
        cls,
        *,
        keys: int = 16,
        values: int = 16,
        endpoint: int = 16,
        half: str = "bfloat16",
        granularity: str = "token",
    ) -> Self:
        """The codec for these bit widths: 32, 16, 8 or 4; endpoint 32, 16 or 8.

        half: the 16-bit dtype, `bfloat16` or `float16`.
        """
        names = {32: "float32", 16: half, 8: "uint8", 4: "uint4"}
        return cls.model_validate(
            {
                "keys": names.get(keys, f"{keys} bits"),
                "values": names.get(values, f"{values} bits"),
                "endpoint": names.get(endpoint, f"{endpoint} bits"),
                "granularity": granularity,
            }
        )

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Those of `keys`, `values` whose scale and zero point lie in the calibration file."""
        if self.granularity == "token":
            return ()
        return tuple(name for name in ("keys", "values") if getattr(self, name) in CODE_BITS)


class TensorSpec(NamedTuple):
    """dtype and shape of one tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def code_length(encoding: str, length: int) -> int:
    """Stored elements along the last dimension for `length` numbers."""
    return (length + 1) // 2 if encoding == "uint4" else length


def shard_layout(
    kind: str, geometry: Geometry, codec: Codec, *, records: int, tokens: int
) -> dict[str, TensorSpec]:
    """Every tensor of a shard with `records` = N records and `tokens` = ΣN_C trace tokens.

    `tokens` matters in a teacher store only. L' is the number of `geometry.rows`.
    """
    rows, heads = len(geometry.rows), geometry.kv_heads
    levels = geometry.model_layers + 1
    if kind == "teacher_kv":
        lead: tuple[int, ...] = (tokens, rows, heads)
        layout = {
            "importance": TensorSpec(torch.float32, lead),
            "offsets": TensorSpec(torch.int64, (records + 1,)),
        }
    else:
        lead = (records, rows, heads, geometry.slots)
        layout = {
            "slot_counts": TensorSpec(torch.int32, lead[:-1]),
            "slot_positions": TensorSpec(torch.int32, lead),
        }
    for name, encoding in (("keys", codec.keys), ("values", codec.values)):
        own_scale = codec.granularity == "token"
        layout |= _encoded(name, encoding, lead, geometry.head_dim, own_scale)
    layout |= _encoded("endpoint", codec.endpoint, (records, levels), geometry.hidden_size, True)
    return layout


def calibration_layout(geometry: Geometry, codec: Codec) -> dict[str, TensorSpec]:
    """The tensors of the calibration file; none where every record has its own ranges."""
    shape: tuple[int, ...] = (len(geometry.rows),)
    if codec.granularity == "channel":
        shape = (len(geometry.rows), geometry.kv_heads, geometry.head_dim)
    return {
        f"{name}_{part}": TensorSpec(dtype, shape)
        for name in codec.calibrated
        for part, dtype in (("scale", torch.bfloat16), ("zero", torch.int16))
    }


def _encoded(
    name: str, encoding: str, lead: tuple[int, ...], length: int, own_scale: bool
) -> dict[str, TensorSpec]:
    if encoding in FLOAT_DTYPES:
        return {name: TensorSpec(FLOAT_DTYPES[encoding], (*lead, length))}
    layout = {name: TensorSpec(torch.uint8, (*lead, code_length(encoding, length)))}
    if own_scale:
        layout[f"{name}_scale"] = TensorSpec(torch.bfloat16, lead)
        layout[f"{name}_zero"] = TensorSpec(torch.int16, lead)
    return layout


def wrong_slots(counts: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> int | None:
    """The first of N records whose slots are not as the format wants them; None if all are.

    counts: [N, L', H], positions: [N, L', H, M], lengths N_C: [N]; integers. Of the M slots the
    first `counts` are valid, at least one, at places in the trace that ascend; the others have −1.
    """
    # Some records at once: arrays of a whole shard leave holes in the heap.
    step = max(1, PIECE // max(1, positions[:1].size))
    for first in range(0, len(positions), step):
        part = slice(first, first + step)
        right = _right_slots(counts[part], positions[part], lengths[part])
        if not right.all():
            return first + int(right.argmin())
    return None


def _right_slots(counts: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which of N records have slots as `wrong_slots` says, [N] bool."""
    slots = positions.shape[-1]
    valid = np.arange(slots) < counts[..., None]  # [N, L', H, M]
    inside = (positions >= 0) & (positions < lengths[:, None, None, None])
    right = np.where(valid, inside, positions == -1)
    right[..., 1:] &= (positions[..., 1:] > positions[..., :-1]) | ~valid[..., 1:]
    possible = (counts >= 1) & (counts <= slots)
    return right.all((1, 2, 3)) & possible.all((1, 2))


def describe(spec: Any) -> str:
    """`float32 [2, 3]`, of a tensor or a TensorSpec."""
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"

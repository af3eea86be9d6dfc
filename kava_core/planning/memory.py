"""Peak memory of a worker and of a trainer, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kava_core.models.loading import DTYPES
from kava_core.planning.architecture import Architecture
from kava_core.planning.costs import Call
from kava_core.planning.lengths import Lengths, longest
from kava_core.settings import Pipeline, Training

# Entries of logits that a loss over a whole chain holds at once (`models.head`).
_PIECE = 2**24


def generate_bytes(settings: Pipeline, teacher: Architecture, lengths: Lengths) -> int:
    """A worker of generate: weights, a batch as it passes a layer, and the caches of a shard.

    What the batches before gave lies there in pieces, which are joined before they are written; the
    shard before may still be on its way to the disk.
    """
    generate = settings.generate
    size = DTYPES[generate.model_dtype].itemsize
    a, rows = teacher, min(generate.rows, generate.shard_size)
    kv = a.kv_heads * a.head_dim
    traces = float(lengths.trace.mean())
    tokens = rows * longest(lengths.whole, rows)
    layer = tokens * (2 * a.hidden_size + 3 * a.intermediate_size) * size
    recorded = rows * traces * a.layers * kv * 2 * size
    # float32 keys, values in the model's dtype, importance
    token = a.layers * (kv * (4 + size) + 4 * a.kv_heads)
    shard = traces * min(generate.shard_size, lengths.problems) * token
    before = shard if lengths.problems > generate.shard_size else 0
    return round(a.parameters * size + before + shard + max(layer + recorded, shard))


def trainer_bytes(
    architecture: Architecture,
    training: Training,
    calls: Sequence[Call],
    where: str,
) -> int:
    """A process of a training run: weights, gradients, AdamW, and what the backward pass reads.

    calls: of one batch of this process.
    """
    a = architecture
    trainable = a.trainable(training, where)
    adapters = trainable if training.lora else 0
    half = training.precision == "bfloat16"
    size = torch.bfloat16.itemsize if half else 4
    # Autocast keeps a half-precision copy of the weights it multiplies by.
    weights = 4 * (a.parameters + adapters) + (size * a.parameters if half else 0)
    learning = 4 * trainable * 3
    kept = sum(_kept(a, call, size, recomputed=training.gradient_checkpointing) for call in calls)
    logits = 0.0
    for call in calls:
        made = call.rows * call.logits * a.vocabulary
        logits += min(made, float(_PIECE)) if call.pieced else made
    return round(weights + learning + kept + logits * (size + 8))


def _kept(a: Architecture, call: Call, size: int, *, recomputed: bool) -> float:
    """Bytes of activations that the backward pass of a call needs.

    Per token and layer: two norms (input, float32 copy, result), queries, keys and values before
    and after the rotary embedding and repeated over their group, the attention's output, and the
    gate, its activation, the other half and their product; or the layer's input alone where the
    rest is made again.
    """
    tokens = call.rows * call.columns
    if recomputed:
        layer = _layer(a, size)
        return tokens * (a.layers * a.hidden_size * size + layer)
    return tokens * a.layers * _layer(a, size)


def _layer(a: Architecture, size: int) -> float:
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    norms = 2 * a.hidden_size * (4 + 2 * size)
    attention = (5 * queries + 6 * keys) * size
    return norms + attention + (2 * a.hidden_size + 4 * a.intermediate_size) * size

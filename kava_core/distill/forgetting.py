"""A teacher that learns to do without what eviction will take from it.

In a part of its training records, drawn anew each time, no token sees an earlier step of the chain
but for the tokens of it that are kept. So what a later step needs must be found in kept tokens,
and these are what targets are cut from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kava_core.distill.losses import chain_loss
from kava_core.distill.terms import Batch, Terms
from kava_core.errors import KavaError
from kava_core.models.batching import pad
from kava_core.record import Record
from kava_core.settings.teacher import Forgets


def check_forgets(config: object) -> None:
    """KavaError for a model with a sliding window, whose layers would need masks of their own."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if getattr(config, "sliding_window", None) is not None and "sliding_attention" in kinds:
        raise KavaError(
            "teacher.forgets: expected a model whose layers all see the whole sequence, found one "
            "with a sliding window. Leave it out, or choose another model."
        )


def forgetful_terms(forgets: Forgets) -> Terms:
    """The teacher's loss, of a `ChainDataset` with steps. Measured on records that are held out, it
    is that of the whole chain."""

    def terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ids, taught = batch["input_ids"], batch["taught"]
        if not model.training:
            return {"chain": chain_loss(model, ids, batch["mask"], taught)}
        forgetting = torch.rand(len(ids)).to(ids.device) < forgets.share
        seen = visible(batch["steps"], batch["kept"], forgetting)
        return {"chain": chain_loss(model, ids, _as_mask(model, seen), taught)}

    return terms


def visible(steps: Tensor, kept: Tensor, forgetting: Tensor) -> Tensor:
    """Which tokens each token sees, [B, N, N]: those before it, and itself; in records that are
    `forgetting` [B] of these the question, its own step, and what is kept of other steps.

    steps [B, N]: 0 for the question, k for the k-th step, and one more for what follows the chain;
    kept [B, N].
    """
    own = steps[:, :, None] == steps[:, None, :]
    always = ((steps == 0) | (kept == 1))[:, None, :]
    before = torch.ones(steps.shape[1], steps.shape[1], device=steps.device).tril().bool()
    return before & (own | always | ~forgetting[:, None, None])


def steps_of(records: Sequence[Record], keeps: str) -> dict[str, Tensor]:
    """`steps` and `kept` of `visible` for whole sequences, right-padded with 0.

    keeps: `results`, or `steps` for the last token of each. KavaError for a record that does not
    say where they are.
    """
    steps, kept = [], []
    for record in records:
        ends = record.step_ends
        places = record.results if keeps == "results" else [end - 1 for end in ends]
        if not ends or not places:
            raise KavaError(
                f"record {record.id} does not say where its {keeps} are, which teacher.forgets "
                "goes by. Choose other traces, or leave it out."
            )
        question, rest = len(record.question_ids), len(record.answer_prompt_ids + record.answer_ids)
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        numbered = [n for n, length in enumerate(lengths, 1) for _ in range(length)]
        steps.append([0] * question + numbered + [len(ends) + 1] * rest)
        kept.append([0] * len(steps[-1]))
        for place in places:
            kept[-1][question + place] = 1
    return {"steps": pad(steps, "right")[0], "kept": pad(kept, "right")[0]}


def _as_mask(model: nn.Module, seen: Tensor) -> Tensor:
    """[B, 1, N, N], as the model's attention takes it."""
    decoder = cast(PreTrainedModel, getattr(model, "module", model))
    seen = seen[:, None]
    if decoder.config._attn_implementation == "sdpa":
        return seen
    dtype = next(decoder.parameters()).dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )

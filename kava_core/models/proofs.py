"""Prove, before anything is made with a model, that what this library does with it is sound.

A teacher is read through its attention, a student is driven through embeddings and a cache. Nothing
in transformers promises that an architecture can be used in either way, and some give wrong numbers
without an error. The proofs run a few tokens through the model itself and compare. Nothing here is
a list of architectures: docs/models.md has what the proofs say of those that there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kava_core.errors import KavaError
from kava_core.models.batching import pad
from kava_core.models.capture import AttentionCall, recording, teacher_forced
from kava_core.models.context import attention_windows
from kava_core.models.latent import LatentReasoner, Reasoning
from kava_core.models.loading import cache_shape
from kava_core.models.phase import rotary_of
from kava_core.rotary import Rotary

TOLERANCE = 1e-3  # of the largest entry; in float32. Two ways to compute one thing differ by 1e-5
SHARED = 4  # tokens that both rows of the capture probe begin with
ROWS = [[5, 9, 7, 3, 11, 8], [5, 9, 7, 3, 6, 10]]
ENDS = [5, 3]  # of each, where its hidden states are kept
QUESTION = 4  # columns that are read at once before the others follow one by one


@torch.no_grad()
def prove_teacher(model: PreTrainedModel) -> Rotary:
    """The rotation of a model's keys, after proof that its cache can be recorded and asked of it.

    KavaError unless each layer calls attention once per pass, with keys and values of the size that
    the configuration says, all layers alike; these are what its cache holds; positions see only
    what came before; the rotation can be undone; and it can be asked (`prove_asked`).
    """
    rotary = prove_capture(model)
    prove_asked(model)
    return rotary


@torch.no_grad()
def prove_capture(model: PreTrainedModel) -> Rotary:
    """The part of `prove_teacher` that is about recording."""
    config = model.config.get_text_config()
    name = config.model_type
    windows = attention_windows(config)
    ids = torch.tensor(ROWS, device=model.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    witness = _Witness()
    with _tried(model, "read while its attention is recorded"):
        with recording(model, witness):
            states = model.base_model(
                input_ids=ids, position_ids=positions, output_hidden_states=True, use_cache=False
            ).hidden_states
        cache = DynamicCache()
        model.base_model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
        )
    _prove_once(name, witness, config.num_hidden_layers)
    calls = [witness.calls[i][0] for i in range(config.num_hidden_layers)]
    _prove_shapes(name, calls, cache_shape(config))
    for call in calls:
        _prove_mask(name, call)
    if len(cache.layers) != len(calls):
        raise KavaError(
            f"{name} has {len(calls)} layers and caches keys and values for {len(cache.layers)} "
            "(some share those of another layer); a store holds one per layer."
        )
    for layer, call in enumerate(calls):
        reach = min(ids.shape[1], windows.get(layer, ids.shape[1]))
        held: Any = cache.layers[layer]
        for what, seen, kept in (
            ("keys", call.key, held.keys),
            ("values", call.value, held.values),
        ):
            if not _near(kept[:, :, -reach:], seen[:, :, -reach:]):
                raise KavaError(
                    f"{name}, layer {layer}, attends with other {what} than those in its cache; "
                    "they cannot be recorded."
                )
    width, levels = config.hidden_size, len(calls) + 1
    if [tuple(h.shape) for h in states] != [(*ids.shape, width)] * levels:
        raise KavaError(
            f"{name} gives hidden states {[tuple(h.shape) for h in states]}, expected {levels} "
            f"of {(*ids.shape, width)}; its endpoint cannot be recorded."
        )
    for state in states:
        if not _near(state[1, :SHARED], state[0, :SHARED]):
            raise KavaError(
                f"{name} looks ahead: what it makes of a token depends on later ones. Expected a "
                "causal language model."
            )
    _prove_endpoint(model, ids, positions)
    return prove_rotary(model)


@torch.no_grad()
def prove_asked(model: PreTrainedModel) -> None:
    """KavaError unless a model that reads embeddings at explicit positions in a padded batch, one
    token after another from its cache, gives what it gives when it reads each row's ids at once."""
    config = model.config.get_text_config()
    attention_windows(config)
    with _tried(model, "driven through embeddings and a cache"):
        alone = [model(torch.tensor([row], device=model.device)).logits[0] for row in ROWS]
        short = ROWS[1][2:]
        alone[1] = model(torch.tensor([short], device=model.device)).logits[0]
        ids, mask = (x.to(model.device) for x in pad([ROWS[0], short], "left"))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        steps = []
        for first, last in ((0, QUESTION), *((i, i + 1) for i in range(QUESTION, len(ROWS[0])))):
            columns = slice(first, last)
            output = model(
                inputs_embeds=model.get_input_embeddings()(ids[:, columns]),
                attention_mask=mask[:, :last],
                position_ids=positions[:, columns],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            steps.append(output.logits[:, -1])
    read = torch.stack(steps, 1)  # [2, columns from the question's last on, V]
    expected = torch.stack([logits[-read.shape[1] :] for logits in alone])
    if not _near(read, expected):
        raise KavaError(
            f"{config.model_type} gives other logits when it reads embeddings from a cache, in a "
            "padded batch, than for the same tokens at once; it cannot be asked or taught."
        )


@torch.no_grad()
def prove_latents(student: LatentReasoner) -> None:
    """KavaError unless a student thinks in a padded batch as it does alone."""
    batch, alone = _thoughts(student)
    if not _near(batch.logits, torch.cat([one.logits for one in alone])):
        raise KavaError(
            f"{student.decoder.config.model_type} thinks otherwise in a padded batch than alone; "
            "it cannot be taught to think in latents."
        )


@torch.no_grad()
def prove_slots(student: LatentReasoner) -> None:
    """KavaError unless the keys and values of a student's latents can be compared with targets:
    [B, H, M, D] per layer, of which the rotation can be undone."""
    config = student.decoder.config.get_text_config()
    name = config.model_type
    batch, alone = _thoughts(student)
    kv_heads, head_dim = cache_shape(config)
    for layer in range(config.num_hidden_layers):
        for what in ("keys", "values"):
            held = getattr(batch, what)
            found = (held[layer].shape[1], held[layer].shape[3]) if layer < len(held) else None
            if found != (kv_heads, head_dim):
                heads = "none" if found is None else f"{found[0]} heads × {found[1]}"
                raise KavaError(
                    f"{name}, layer {layer}, caches {what} of {heads}, expected {kv_heads} × "
                    f"{head_dim} as its configuration says: targets are of one size in all layers."
                )
            if not _near(held[layer], torch.cat([getattr(one, what)[layer] for one in alone])):
                raise KavaError(
                    f"{name}, layer {layer}, caches other {what} in a padded batch than alone; "
                    "they cannot be compared with targets."
                )
    prove_rotary(student.decoder)


def prove_rotary(model: PreTrainedModel) -> Rotary:
    """`rotary_of`, with a sentence for a model that cannot even be looked at."""
    with _tried(model, "read at several positions"):
        return rotary_of(model)


def _thoughts(student: LatentReasoner) -> tuple[Reasoning, list[Reasoning]]:
    """Of a padded batch of two, and of each alone."""
    questions = [ROWS[0][:5], ROWS[1][2:5]]
    training = student.training
    attention_windows(student.decoder.config.get_text_config())
    with _tried(student.decoder, "taught to think in latents"):
        try:
            student.eval()
            answers = torch.tensor([[7, 9], [10, 4]], device=student.device)
            ones = torch.ones_like(answers)
            ids, mask = (x.to(student.device) for x in pad(questions, "left"))
            alone = [
                student(
                    torch.tensor([question], device=student.device),
                    ones.new_ones(1, len(question)),
                    answers[i : i + 1],
                    ones[i : i + 1],
                )
                for i, question in enumerate(questions)
            ]
            return student(ids, mask, answers, ones), alone
        finally:
            student.train(training)


class _Witness:
    """Every attention call, by layer."""

    def __init__(self) -> None:
        self.calls: dict[int, list[AttentionCall]] = {}

    def record(self, call: AttentionCall) -> None:
        self.calls.setdefault(call.layer, []).append(call)


def _prove_once(name: str, witness: _Witness, layers: int) -> None:
    counts = {i: len(witness.calls.get(i, [])) for i in {*range(layers), *witness.calls}}
    if max(counts) >= layers:
        raise KavaError(
            f"{name} has attention in layer {max(counts)}, and its configuration says that there "
            f"are {layers} layers; its cache cannot be recorded."
        )
    odd = {i: n for i, n in sorted(counts.items()) if n != 1}
    if odd:
        layer, n = next(iter(odd.items()))
        raise KavaError(
            f"{name}, layer {layer}, calls transformers' attention interface {n} times in one "
            f"forward pass, expected once ({len(odd)} of {layers} layers do not); its cache cannot "
            "be recorded."
        )


def _prove_shapes(name: str, calls: list[AttentionCall], expected: tuple[int, int]) -> None:
    for call in calls:
        for what, tensor in (("keys", call.key), ("values", call.value)):
            found = (tensor.shape[1], tensor.shape[3])
            if found != expected:
                raise KavaError(
                    f"{name}, layer {call.layer}, keeps {what} of {found[0]} heads × {found[1]}, "
                    f"expected {expected[0]} × {expected[1]} as its configuration says: a store "
                    "holds keys and values of one size in all layers."
                )


def _prove_mask(name: str, call: AttentionCall) -> None:
    """A mask may hide; one that adds something to logits changes what attention is."""
    mask = call.mask
    if mask is None or mask.dtype == torch.bool:
        return
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise KavaError(
            f"{name}, layer {call.layer}, adds numbers of its own to its attention's logits; the "
            "answer's attention to the trace cannot be recorded."
        )


def _prove_endpoint(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> None:
    """What is kept of a pass is, to the bit, what the model returns of the same pass."""
    with _tried(model, "watched from layer to layer"):
        kept, output = teacher_forced(
            model, ids, positions, torch.tensor(ENDS), output_hidden_states=True
        )
    returned = torch.stack([h.to(ids.device)[[0, 1], ENDS] for h in output.hidden_states], dim=1)
    if not torch.equal(kept, returned):
        raise KavaError(
            f"{model.config.get_text_config().model_type} hands its layers other hidden states "
            "than those that it returns; its endpoint cannot be recorded. Choose another model."
        )


def _near(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    loose = 64 * torch.finfo(actual.dtype).eps  # half precision
    scale = float(expected.abs().max())
    return bool(((actual - expected).abs() <= max(TOLERANCE, loose) * scale).all())


@contextmanager
def _tried(model: PreTrainedModel, how: str) -> Iterator[None]:
    """What an architecture stumbles over becomes a sentence."""
    training = model.training
    model.eval()
    try:
        yield
    except KavaError:
        raise
    except Exception as error:  # anything: this is what the proof is for
        why = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise KavaError(
            f"{model.config.get_text_config().model_type} cannot be {how} "
            f"({type(error).__name__}: {why:.200}). Choose another model."
        ) from None
    finally:
        model.train(training)

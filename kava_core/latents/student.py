"""A student's latent loop as it runs: what every pass feeds, gives, and looks at.

The loop itself is `LatentReasoner`'s own, in its own forward and `generate`. Hooks on its decoder
see each call; which of its columns are latents follows from the columns fed before it, so that
Jacobi and sequential reasoning are looked at in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kava_core.models.batching import pad
from kava_core.models.capture import AttentionCall, recording
from kava_core.models.latent import LatentReasoner, Reasoning
from kava_core.record import Record

QUESTION_PARTS = ("numbers", "words", "other")
PARTS = (*QUESTION_PARTS, "<bot>", "latents", "answer prompt", "answer")
BOT, LATENTS, PROMPT, ANSWER, NOTHING = range(len(QUESTION_PARTS), len(PARTS) + 1)


def question_parts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The part of each question token, as an index into PARTS.

    numbers: tokens with a digit; words: others with a letter; other: marks, spaces, line ends.
    """
    found = []
    for text in (str(tokenizer.decode([i])) for i in ids):
        number, word = any(map(str.isdigit, text)), any(map(str.isalpha, text))
        found.append(0 if number else 1 if word else 2)
    return found


@dataclass(frozen=True)
class Observation:
    """What the latents of B traces were while the student was teacher-forced.

    I counts iterations: the T + 1 passes of Jacobi reasoning, or 1 of sequential reasoning, which
    feeds every latent once.

    hidden: [I, B, M, E], the last hidden states at the latents, normed
    key_norms, value_norms: [I, B, L, M], L2 norms of the D numbers, mean over the H heads
    attention: [I, B, M+1, P], share of attention on each of PARTS, mean over layers and query
        heads, of each latent and last of the answer: the mean over the places that predict its
        tokens, which stand in the last iteration only (NaN elsewhere)
    reasoning: what the student's forward gave
    """

    hidden: Tensor
    key_norms: Tensor
    value_norms: Tensor
    attention: Tensor
    reasoning: Reasoning


@torch.no_grad()
def observe(
    student: LatentReasoner, traces: Sequence[Record], parts: Sequence[Sequence[int]]
) -> Observation:
    """Watch the student reason about B questions; parts: of each question (`question_parts`).

    A student that writes the answer prompt itself is given it as the beginning of its answer.
    """
    device = student.device
    questions, question_mask = pad([t.question_ids for t in traces], "left")
    prompted = bool(student.config.answer_prompt_ids)
    leads = [[] if prompted else t.answer_prompt_ids for t in traces]
    tails = [lead + t.answer_ids for lead, t in zip(leads, traces, strict=True)]
    answers, answer_mask = pad(tails, "right")
    watch = _Watch(student, questions.shape[1], *_columns(student, parts, questions, leads, tails))
    with recording(student.decoder, watch), watch.hooked():
        reasoning = student(*(x.to(device) for x in (questions, question_mask)),
                            *(x.to(device) for x in (answers, answer_mask)))  # fmt: skip
    return Observation(watch.hidden, watch.key_norms, watch.value_norms, watch.attention, reasoning)


@contextmanager
def latents_fed(
    student: LatentReasoner, width: int, change: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Inside this context `change` sees the latents that make the cache the answer reads.

    width: of the padded questions. change(i, z) is given the input embeddings z [B, n, E] of
    latents i … i + n − 1 just before they are fed for the last time, and what it returns is fed.
    """
    calls = _Calls(student, width)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        calls.advance(kwargs)
        if calls.slots and calls.iteration == calls.iterations - 1:
            embeds = kwargs["inputs_embeds"].clone()
            embeds[:, calls.rows] = change(calls.slots.start, embeds[:, calls.rows])
            kwargs = {**kwargs, "inputs_embeds": embeds}
        return args, kwargs

    handle = student.decoder.base_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Calls:
    """Which latents the decoder's current call feeds, and in which of its columns.

    slots: a range of latents; rows: their columns among those fed.
    """

    def __init__(self, student: LatentReasoner, width: int) -> None:
        self.first = width + 1  # question, <bot>
        self.latents: int = student.config.latents
        self.sequential = student.config.reasoning == "sequential"
        self.iterations: int = 1 if self.sequential else student.config.iterations + 1
        self.number = -1
        self.slots = range(0)
        self.rows = slice(0, 0)

    @property
    def iteration(self) -> int:
        return 0 if self.sequential else self.number

    def advance(self, kwargs: dict[str, Any]) -> None:
        """kwargs: of the call; its mask covers what was fed before and what is fed."""
        self.number += 1
        fed = kwargs["inputs_embeds"].shape[1]
        past = kwargs["attention_mask"].shape[1] - fed
        start, stop = max(past, self.first), min(past + fed, self.first + self.latents)
        self.slots = range(start - self.first, max(start, stop) - self.first)
        self.rows = slice(start - past, max(start, stop) - past)


class _Watch:
    """Collects an `Observation` while the decoder runs."""

    def __init__(
        self, student: LatentReasoner, width: int, parts: Tensor, answer_rows: Tensor
    ) -> None:
        """parts: [B, S, P] one-hot, zero for padding; answer_rows: [B, S] columns that predict an
        answer token; S: columns of the whole sequence."""
        self.calls = _Calls(student, width)
        self.decoder = student.decoder
        self.parts, self.answer_rows = parts.to(student.device), answer_rows.to(student.device)
        config = student.decoder.config.get_text_config()
        self.layers: int = config.num_hidden_layers
        i, b, m = self.calls.iterations, len(parts), self.calls.latents

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(i, b, *shape, device=student.device)

        self.hidden = zeros(m, config.hidden_size).to(student.dtype)
        self.key_norms, self.value_norms = zeros(self.layers, m), zeros(self.layers, m)
        self.attention = zeros(m + 1, len(PARTS))
        self.attention[:-1, :, m] = torch.nan

    @contextmanager
    def hooked(self) -> Iterator[None]:
        base = self.decoder.base_model
        handles = (
            base.register_forward_pre_hook(
                lambda _, __, kwargs: self.calls.advance(kwargs), with_kwargs=True
            ),
            base.register_forward_hook(self._after),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, call: AttentionCall) -> None:
        calls = self.calls
        if not calls.slots:
            return
        at = (calls.iteration, slice(None), slice(calls.slots.start, calls.slots.stop))
        columns = slice(calls.first + calls.slots.start, calls.first + calls.slots.stop)
        for norms, x in ((self.key_norms, call.key), (self.value_norms, call.value)):
            norm = torch.linalg.vector_norm(x[:, :, columns].float(), dim=-1)  # [B, H, n]
            fed = slice(calls.slots.start, calls.slots.stop)
            norms[calls.iteration, :, call.layer, fed] = norm.mean(1)
        total = call.key.shape[2]
        behind = total > calls.first + calls.latents  # the answer follows
        rows = slice(calls.rows.start, call.query.shape[2] if behind else calls.rows.stop)
        weights = call.weights(rows).mean(1)  # [B, R, S]
        shares = weights.float() @ self.parts[:, :total] / self.layers  # [B, R, P]
        self.attention[at] += shares[:, : len(calls.slots)]
        if behind:
            counted = self.answer_rows[:, columns.start : total]  # [B, R]
            mean = (shares * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
            self.attention[calls.iteration, :, calls.latents] += mean

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        calls = self.calls
        if calls.slots:
            hidden = output.last_hidden_state[:, calls.rows]
            self.hidden[calls.iteration, :, calls.slots.start : calls.slots.stop] = hidden


def _columns(
    student: LatentReasoner,
    parts: Sequence[Sequence[int]],
    questions: Tensor,
    leads: Sequence[Sequence[int]],
    tails: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """The part of every column, one-hot [B, S, P], and which predict an answer token, [B, S].

    The student's sequence: question (left-padded), <bot>, latents, <eot>, the prompt that it is
    given, and the tail, which begins with a prompt (`leads`) where it writes that itself. `<eot>`
    counts as part of the prompt.
    """
    width, m = questions.shape[1], student.config.latents
    prompt = 1 + len(student.config.answer_prompt_ids)
    tail = width + 1 + m + prompt  # first column
    columns = tail + max(map(len, tails))
    labels = torch.full((len(parts), columns), NOTHING)
    answer_rows = torch.zeros(len(parts), columns)
    labels[:, width], labels[:, width + 1 : width + 1 + m] = BOT, LATENTS
    for row, (question, lead, written) in enumerate(zip(parts, leads, tails, strict=True)):
        labels[row, width - len(question) : width] = torch.tensor(question)
        answer = tail + len(lead)
        labels[row, tail - prompt : answer] = PROMPT
        labels[row, answer : tail + len(written)] = ANSWER
        answer_rows[row, answer - 1 : tail + len(written) - 1] = 1
    one_hot = nn.functional.one_hot(labels, len(PARTS) + 1)[..., :NOTHING]
    return one_hot.float(), answer_rows

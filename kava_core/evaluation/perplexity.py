"""How surprised a system is by the gold answer, once it has reasoned in its own way.

The answer (its end of sequence included) is teacher-forced behind

- question, the system's own latents and the answer prompt, for a student with latents;
- the same and the steps that it wrote itself, for one whose latents stand for a part of the trace;
- question and answer prompt, for a system that answers at once;
- question and what the system itself wrote, up to its last answer prompt, for one that writes its
  chain of thought. Where it never wrote the prompt, the prompt is put behind all that it wrote.

So the gold chain is never seen, and a wrong chain of one's own makes the gold answer surprising.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.evaluation.asking import Reply
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder

LARGEST_PIECE = 1 << 26  # numbers of a batch's logits that are taken in float64 at once


@dataclass(frozen=True)
class Forced:
    """What a system is teacher-forced on, in the order of the problems.

    contexts: token ids before its latents; leads: those between them and the gold answer, which it
    wrote itself; answers: leads and gold answers.
    """

    problems: list[Problem]
    contexts: list[list[int]]
    leads: list[list[int]]
    answers: list[list[int]]

    @classmethod
    def of(
        cls,
        system: LatentReasoner,
        encoder: TraceEncoder,
        problems: Sequence[Problem],
        replies: Sequence[Reply],
    ) -> Forced:
        """replies: what `system` answered to these problems."""
        contexts = encoder.encode_questions([p.question for p in problems])
        answers = encoder.encode_answers([p.answer for p in problems])
        leads: list[list[int]] = [[] for _ in problems]
        if not system.config.answer_prompt_ids:
            chains = [_own_chain(reply.written, encoder) for reply in replies]
            if system.config.latents:  # which come before anything written
                leads = chains
                answers = [chain + answer for chain, answer in zip(chains, answers, strict=True)]
            else:
                contexts = [q + chain for q, chain in zip(contexts, chains, strict=True)]
        return cls(list(problems), contexts, leads, answers)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Indices of problems that share a forward."""
        return by_length([len(context) for context in self.contexts], batch_size)

    @torch.no_grad()
    def nll(self, system: LatentReasoner, chosen: Sequence[int]) -> list[list[float]]:
        """−log p of each token of the gold answers of one batch, in nats.

        KavaError names a problem whose answer has no finite probability.
        """
        ids, mask = (x.to(system.device) for x in pad([self.contexts[i] for i in chosen], "left"))
        gold, kept = (x.to(system.device) for x in pad([self.answers[i] for i in chosen], "right"))
        logits = system(ids, mask, gold, kept).logits[:, :-1]  # [B, A, V]
        found = []
        for i, row in zip(chosen, _nll(logits, gold).tolist(), strict=True):
            found.append(row[len(self.leads[i]) : len(self.answers[i])])
            if not all(map(math.isfinite, found[-1])):
                raise KavaError(
                    f"problem {self.problems[i].id}: expected a finite probability of the answer "
                    f"{self.problems[i].answer!r}, found {found[-1]}. The system's weights are "
                    "damaged: train it again."
                )
        return found


def gold_nll(
    system: LatentReasoner,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    replies: Sequence[Reply],
    *,
    batch_size: int,
) -> list[list[float]]:
    """−log p of each token of each gold answer, in nats; list i has N_A numbers of problem i.

    replies: what `system` answered to these problems. KavaError names a problem whose answer
    has no finite probability.
    """
    forced = Forced.of(system, encoder, problems, replies)
    found: dict[int, list[float]] = {}
    for chosen in forced.batches(batch_size):
        found.update(zip(chosen, forced.nll(system, chosen), strict=True))
    return [found[i] for i in range(len(problems))]


def _nll(logits: Tensor, gold: Tensor) -> Tensor:
    """−log p of gold [B, A] by logits [B, A, V], [B, A] float64; a few rows at a time, since in
    float64 all of them take four times the logits and more."""
    rows = max(1, LARGEST_PIECE // (logits.shape[1] * logits.shape[2]))
    pieces = [
        -few.double().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        for few, wanted in zip(logits.split(rows), gold.split(rows), strict=True)
    ]
    return torch.cat(pieces)


def perplexity(nll: Sequence[Sequence[float]]) -> float:
    """exp of the mean over all tokens of all answers."""
    tokens = [value for row in nll for value in row]
    return math.exp(sum(tokens) / len(tokens))


def _own_chain(written: Sequence[int], encoder: TraceEncoder) -> list[int]:
    """What was written up to and including the last answer prompt, which is added if missing."""
    prompt = encoder.answer_prompt_ids
    for end in range(len(written), len(prompt) - 1, -1):
        if list(written[end - len(prompt) : end]) == prompt:
            return list(written[:end])
    chain = list(written)
    return (chain[:-1] if chain[-1:] == [encoder.eos] else chain) + prompt

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

import torch

from kava_core.errors import KavaError
from kava_core.evaluation.asking import Reply
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder


@torch.no_grad()
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
    questions = encoder.encode_questions([p.question for p in problems])
    answers = encoder.encode_answers([p.answer for p in problems])
    leads: list[list[int]] = [[] for _ in problems]
    if not system.config.answer_prompt_ids:
        chains = [_own_chain(reply.written, encoder) for reply in replies]
        if system.config.latents:  # which come before anything written
            leads = chains
            answers = [chain + answer for chain, answer in zip(chains, answers, strict=True)]
        else:
            questions = [q + chain for q, chain in zip(questions, chains, strict=True)]
    found: dict[int, list[float]] = {}
    for chosen in by_length([len(q) for q in questions], batch_size):
        ids, mask = (x.to(system.device) for x in pad([questions[i] for i in chosen], "left"))
        gold, kept = (x.to(system.device) for x in pad([answers[i] for i in chosen], "right"))
        logits = system(ids, mask, gold, kept).logits[:, :-1]  # [B, A, V]
        nll = -logits.double().log_softmax(-1).gather(-1, gold[..., None])[..., 0]  # [B, A]
        for i, row in zip(chosen, nll.tolist(), strict=True):
            found[i] = row[len(leads[i]) : len(answers[i])]
            if not all(map(math.isfinite, found[i])):
                raise KavaError(
                    f"problem {problems[i].id}: expected a finite probability of the answer "
                    f"{problems[i].answer!r}, found {found[i]}. The system's weights are damaged: "
                    "train it again."
                )
    return [found[i] for i in range(len(problems))]


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

"""A tiny system that answers in random digits, and problems to ask it."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import LlamaConfig

from kava_core.evaluation.examination import Examination, Examiner, ProblemSet
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from tests.tiny import COMMON, tiny_model


def problems() -> list[Problem]:
    words = ["ian has 4 apples", "mo", "a train of 31 cars leaves", "liz sells", "x", "9 cups of"]
    return [
        Problem(f"p{i}", f"{text} . how many ?", ("<<1+1=2>>",) * (1 + i % 3), "5", "toy", f"t{i}")
        for i, text in enumerate(words * 2)
    ]


def some(encoder: TraceEncoder) -> ProblemSet:
    """Twelve problems of no, one and two steps."""
    chains = [(), ("<<4/2=2>>",), ("<<9-4=5>>", "<<5+5=10>>")]
    return ProblemSet.of(
        "toy", [replace(p, steps=chains[i % 3]) for i, p in enumerate(problems())], encoder
    )


def make_encoder() -> TraceEncoder:
    return TraceEncoder(train_tokenizer([p.question for p in problems()], 300))


def make_talker(encoder: TraceEncoder) -> LatentReasoner:
    """Answers in random digits of random number, since nothing else has a logit but the end."""
    tokenizer = encoder.tokenizer
    model = tiny_model(LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))
    digits = [tokenizer.encode(str(n), add_special_tokens=False)[0] for n in range(10)]
    with torch.no_grad():
        kept = model.lm_head.weight[[*digits, encoder.eos]].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[digits] = kept[:10]
        model.lm_head.weight[encoder.eos] = 1.3 * kept[10]
    return LatentReasoner.from_teacher(
        model,
        latents=3,
        iterations=2,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=0,
    ).eval()


def examine(
    asked: LatentReasoner,
    encoder: TraceEncoder,
    test_set: ProblemSet,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Examination:
    """All parts of an examination, one after another."""
    examiner = Examiner(
        asked, encoder, test_set, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    replies, nll = {}, {}
    for number, chosen in enumerate(examiner.batches):
        replies.update(zip(chosen, examiner.ask(number), strict=True))
    ordered = [replies[i] for i in range(len(replies))]
    forced = examiner.forced(ordered)
    for chosen in forced.batches(batch_size):
        nll.update(zip(chosen, forced.nll(asked, chosen), strict=True))
    return Examination(ordered, [nll[i] for i in range(len(nll))], examiner.peak_bytes(), {})


def system(talker: LatentReasoner, encoder: TraceEncoder, kind: str) -> LatentReasoner:
    if kind == "latent":
        return talker
    prompt = encoder.answer_prompt_ids if kind == "at once" else []
    return LatentReasoner.plain(talker.decoder, answer_prompt_ids=prompt, eos_token_id=encoder.eos)

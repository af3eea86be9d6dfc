"""Changed latents: against answers made one by one, and where what they carry is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from kava_core.answers import same_answer
from kava_core.errors import KavaError
from kava_core.evaluation.asking import ask
from kava_core.findings.differences import paired_bootstrap
from kava_core.findings.evaluation import Difference
from kava_core.findings.latents import INERT_PERCENT, Changed
from kava_core.findings.scores import wilson
from kava_core.latents.interventions import _others, donors_of, interventions
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import make_talker, problems
from tests.latents.test_student import naive_answer, naive_passes
from tests.tiny import COMMON, tiny_model

M = 3  # latents of the talker
ASKED = {"batch_size": 5, "max_new_tokens": 4}


def answered(talker: LatentReasoner, encoder: TraceEncoder) -> list[Problem]:
    """Problems, every other of which the talker answers as the gold answer says."""
    told = ask(talker, encoder, problems(), **ASKED)
    return [
        replace(p, answer=said.answer or p.answer) if i % 2 else p
        for i, (p, said) in enumerate(zip(problems(), told, strict=True))
    ]


# --- against answers made one by one ------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("reasoning", ["jacobi", "sequential"])
def test_every_intervention_is_what_feeding_those_latents_gives(
    encoder: TraceEncoder, reasoning: str
) -> None:
    talker = make_talker(encoder)
    talker.config.reasoning = reasoning
    asked = answered(talker, encoder)
    found = interventions(talker, encoder, asked, **ASKED)
    questions = encoder.encode_questions([p.question for p in asked])
    fed = torch.stack([naive_passes(talker, question)[-1][-M:] for question in questions])
    assert found.n == 12
    told = ask(talker, encoder, asked, **ASKED)
    assert found.none == pytest.approx(100 * sum(p.correct for p in told) / 12)
    assert found.ci95 == pytest.approx(wilson(sum(p.correct for p in told), 12))
    assert found.none >= 50
    unchanged = [naive_answer(talker, question, 4, lambda _, z: z) for question in questions]
    ended = [len(written) for written in unchanged if written[-1] == encoder.eos]
    limit = max(ended, default=4)

    def texts(written: Sequence[list[int]]) -> list[str]:
        return [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]

    golds = [p.answer for p in asked]
    untouched = texts([ids[:limit] for ids in unchanged])
    theirs = [golds[(i + 3) % 12] for i in range(12)]  # as many steps: every third

    def check(changed: Changed, texts: list[str]) -> None:
        marks = [text == gold for text, gold in zip(texts, golds, strict=True)]
        before = [text == gold for text, gold in zip(untouched, golds, strict=True)]
        assert changed.exact_match == pytest.approx(100 * sum(marks) / 12)
        assert changed.ci95 == wilson(sum(marks), 12)
        assert changed.difference == paired_bootstrap(marks, before)
        others = sum(a != b for a, b in zip(texts, untouched, strict=True))
        assert changed.changed == pytest.approx(100 * others / 12)

    def instead(others: Tensor, slots: Sequence[int]) -> list[str]:
        return texts(
            [
                naive_answer(
                    talker,
                    question,
                    limit,
                    lambda s, z, i=i: others[i, s] if s in slots else z,
                )
                for i, question in enumerate(questions)
            ]
        )

    orders = [_others(M, p.id) for p in asked]
    others = {
        "removed": torch.zeros_like(fed),
        "mean": fed.mean(0, keepdim=True).expand_as(fed),
        "donor": torch.stack([fed[(i + 3) % 12] for i in range(12)]),
    }
    shuffled = torch.stack([fed[i, order] for i, order in enumerate(orders)])
    check(found.together.shuffled, instead(shuffled, range(M)))  # type: ignore[arg-type]
    seen = 0
    for kind, latents in others.items():
        for place, slots in [
            (getattr(found.together, kind), range(M)),
            *((getattr(found.alone, kind)[slot], [slot]) for slot in range(M)),
        ]:
            said = instead(latents, slots)
            check(place, said)
            seen += place.changed > 0
            if kind == "donor":
                counted = [i for i in range(12) if not same_answer(theirs[i], golds[i])]
                follow = [said[i] == theirs[i] for i in counted]
                assert place.follows.n == len(follow) > 0
                assert place.follows.share == pytest.approx(100 * sum(follow) / len(follow))
                assert place.follows.ci95 == wilson(sum(follow), len(follow))
                by_chance = [untouched[i] == theirs[i] for i in counted]
                assert place.follows.untouched == 100 * sum(by_chance) / len(by_chance)
    assert seen
    assert len(found.iterations) == (2 if reasoning == "jacobi" else 0)
    for iteration, changed in enumerate(found.iterations):
        talker.config.iterations = iteration
        written = [naive_answer(talker, question, limit, lambda _, z: z) for question in questions]
        check(changed, texts(written))


# --- where what latents carry is known ----------------------------------------------------------


def make_copier(
    encoder: TraceEncoder, *, through_latents: bool, latents: int = 2
) -> LatentReasoner:
    """Answers with the one digit of the question, which it reads in its latents or by itself.

    One layer that attends to everything alike. Of the hidden numbers, ten say which digit a token
    is; attention carries them to ten others, which latents are made of, and those on to ten that
    the answer is read from. Without latents it carries them to the last ten at once.
    """
    tokenizer, size = encoder.tokenizer, 32
    config = {
        **COMMON,
        "vocab_size": len(tokenizer),
        "hidden_size": size,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
    }
    model = tiny_model(LlamaConfig(**config))
    token, latent, answer = range(10), range(10, 20), range(20, 30)
    attention, head = model.model.layers[0].self_attn, model.lm_head
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        attention.v_proj.weight.copy_(torch.eye(size))
        ways = [(token, latent), (latent, answer)] if through_latents else [(token, answer)]
        for source, target in ways:
            attention.o_proj.weight[list(target), list(source)] = 1
        for i in range(len(tokenizer)):
            text = str(tokenizer.decode([i])).strip()
            if text in list("0123456789"):
                model.get_input_embeddings().weight[i, token[int(text)]] = 1
        for digit in range(10):
            (i,) = tokenizer.encode(str(digit), add_special_tokens=False)
            head.weight[i, answer[digit]] = 1
        head.weight[encoder.eos, list(token)] = 100  # behind a digit
    student = LatentReasoner.from_teacher(
        model,
        latents=latents,
        iterations=1,
        reasoning="jacobi",
        projection=False,
        per_position=True,
        answer_prompt_ids=encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=0,
    ).eval()
    for parameter in (student.bot, student.eot, student.initial_latents):
        parameter.data.zero_()
    return student


def digits() -> list[Problem]:
    return [
        Problem(f"p{i}", f"mo sells {i} . how many ?", ("<<1+1=2>>",), str(i), "toy", "")
        for i in range(10)
    ]


def test_an_answer_that_is_in_the_latents_follows_the_donor(encoder: TraceEncoder) -> None:
    copier = make_copier(encoder, through_latents=True)
    found = interventions(copier, encoder, digits(), batch_size=4, max_new_tokens=4)
    assert found.none == 100
    donor = found.together.donor
    assert donor is not None and donor.follows is not None
    assert (donor.exact_match, donor.changed, donor.inert) == (0, 100, False)
    assert donor.follows.share == 100 and donor.follows.n == 10 and donor.follows.untouched == 0
    assert donor.follows.ci95 == wilson(10, 10)
    assert not found.together.removed.inert and not found.together.mean.inert
    # Either latent says it all, so that changing their places changes nothing.
    assert found.together.shuffled is not None and found.together.shuffled.inert
    assert all(latent.inert for latent in found.alone.removed)
    (first,) = found.iterations  # nothing has been read then
    assert first.exact_match <= 10 and not first.inert
    assert found.model_dump(mode="json")["together"]["donor"]["inert"] is False


def test_latents_that_the_answer_does_not_read_are_inert(encoder: TraceEncoder) -> None:
    copier = make_copier(encoder, through_latents=False)
    found = interventions(copier, encoder, digits(), batch_size=4, max_new_tokens=4)
    assert found.none == 100
    together, alone = found.together, found.alone
    assert together.shuffled is not None and together.donor is not None and alone.donor is not None
    every = [together.removed, together.mean, together.shuffled, together.donor]
    for changed in [*every, *alone.removed, *alone.mean, *alone.donor, *found.iterations]:
        assert (changed.exact_match, changed.changed, changed.inert) == (100, 0, True)
    for donated in (together.donor, *alone.donor):
        assert donated.follows is not None and donated.follows.share == 0
        assert donated.follows.n == 10


def test_a_single_latent_is_followed_alone_and_has_no_other_place(encoder: TraceEncoder) -> None:
    copier = make_copier(encoder, through_latents=True, latents=1)
    found = interventions(copier, encoder, digits(), batch_size=4, max_new_tokens=4)
    assert found.together.shuffled is None
    assert found.alone.donor is not None and found.alone.donor == [found.together.donor]
    follows = found.alone.donor[0].follows
    assert follows is not None and follows.share == 100


def test_one_problem_or_one_gold_answer_has_nothing_to_follow(encoder: TraceEncoder) -> None:
    copier = make_copier(encoder, through_latents=True)
    found = interventions(copier, encoder, digits()[:1], batch_size=4, max_new_tokens=4)
    assert found.together.donor is None and found.alone.donor is None
    alike = [replace(p, answer="7") for p in digits()]
    found = interventions(copier, encoder, alike, batch_size=4, max_new_tokens=4)
    assert found.together.donor is not None and found.together.donor.follows is None
    with pytest.raises(KavaError, match="no problems to ask"):
        interventions(copier, encoder, [], batch_size=4, max_new_tokens=4)


@pytest.mark.parametrize(
    ("low", "high", "changed", "inert"),
    [
        (-1.0, 2.0, INERT_PERCENT, True),
        (0.0, 2.0, 0.0, True),
        (-1.0, 2.0, INERT_PERCENT + 0.1, False),
        (-4.0, -0.5, 4.0, False),
        (0.5, 4.0, 4.0, False),
    ],
)
def test_inert_is_no_clear_difference_and_the_same_answers(
    low: float, high: float, changed: float, inert: bool
) -> None:
    difference = Difference(difference=(low + high) / 2, ci95=(low, high), p_value=0.5)
    found = Changed(exact_match=50, ci95=(40, 60), difference=difference, changed=changed)
    assert found.inert == inert


# --- who gives to whom --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "donors"),
    [
        ([], None),
        ([3], []),
        ([3, 4], [1, 0]),
        ([2, 2, 2], [1, 2, 0]),
        ([2, 3, 2, 3], [2, 3, 0, 1]),
        ([4, 2, 2, 3, 3, 3], None),  # 4 is alone and highest: joins the 3s
        ([2, 3, 4, 4, 5], None),
    ],
)
def test_donors_are_others_with_as_many_steps(steps: list[int], donors: list[int] | None) -> None:
    found = donors_of(steps) if steps else []
    assert donors is None or found == donors
    if len(steps) > 1:
        assert sorted(found) == list(range(len(steps)))
        assert all(i != donor for i, donor in enumerate(found))
        for i, donor in enumerate(found):
            if min(steps.count(steps[i]), steps.count(steps[donor])) > 1:
                assert steps[i] == steps[donor]


def test_shuffled_slots_are_all_in_other_places_and_always_in_the_same() -> None:
    orders = [_others(5, str(seed)) for seed in range(20)]
    for order in orders:
        assert sorted(order) == list(range(5))
        assert all(i != slot for i, slot in enumerate(order))
    assert len(set(map(tuple, orders))) > 5
    assert _others(5, "p0") == [2, 3, 4, 0, 1]

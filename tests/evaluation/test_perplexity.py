"""The gold answer's tokens are as surprising as they are behind the system's own reasoning."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from kava_core.errors import KavaError
from kava_core.evaluation import perplexity as module
from kava_core.evaluation.asking import Reply, ask
from kava_core.evaluation.perplexity import Forced, gold_nll, perplexity
from kava_core.memory import peak_tensor_bytes
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import make_talker, problems, system
from tests.tiny import COMMON, tiny_model

GOLDS = ["5", "123", "70", "8 9", "1/2"]


def todo() -> list[Problem]:
    """Answers of several lengths; some problems have no steps."""
    return [
        replace(p, answer=GOLDS[i % len(GOLDS)], steps=p.steps if i % 3 else ())
        for i, p in enumerate(problems())
    ]


def answered(asked: LatentReasoner, encoder: TraceEncoder) -> list[Reply]:
    return ask(asked, encoder, todo(), batch_size=5, max_new_tokens=6)


def test_a_batch_of_logits_is_taken_in_pieces_and_the_numbers_are_the_same(
    encoder: TraceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 30_000
    model = tiny_model(LlamaConfig(**{**COMMON, "vocab_size": vocabulary}), torch.float32)
    asked = LatentReasoner.plain(
        model, answer_prompt_ids=encoder.answer_prompt_ids, eos_token_id=encoder.eos
    )
    replies = [Reply(p.id, (), "", "", False, 1, 0.0) for p in todo()]
    forced = Forced.of(asked, encoder, todo(), replies)
    (chosen,) = forced.batches(100)
    columns = 1 + max(len(answer) for answer in forced.answers)
    logits = 4 * vocabulary * len(chosen) * columns

    def peak() -> int:
        return peak_tensor_bytes(lambda: forced.nll(asked, chosen), asked.device)

    whole, expected = peak(), forced.nll(asked, chosen)
    monkeypatch.setattr(module, "LARGEST_PIECE", vocabulary * columns)
    assert logits < peak() < 2 * logits < 4 * logits < whole
    assert forced.nll(asked, chosen) == expected


def near(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@torch.no_grad()
def behind(model: torch.nn.Module, prefix: list[int], answer: list[int]) -> list[float]:
    """−log p of each answer token from a plain decoder, everything read anew for each of them."""
    found = []
    for i, token in enumerate(answer):
        logits = model(torch.tensor([prefix + answer[:i]])).logits[0, -1]
        found.append(-float(logits.double().log_softmax(-1)[token]))
    return found


def test_of_a_chain_writer_it_is_behind_the_chain_it_wrote(
    talker: LatentReasoner, encoder: TraceEncoder
) -> None:
    asked = system(talker, encoder, "with a chain")
    replies = answered(asked, encoder)
    prompt, chain = encoder.answer_prompt_ids, encoder.encode_chains([["<<1+1=2>>"]])[0]
    replies[0] = replace(replies[0], written=(*chain, *prompt, *chain, encoder.eos))
    replies[1] = replace(replies[1], written=(*prompt, *chain, *prompt))  # cut off there
    replies[2] = replace(replies[2], written=(*chain, *prompt[:-1]))  # cut off before
    replies[3] = replace(replies[3], written=(encoder.eos,))
    found = gold_nll(asked, encoder, todo(), replies, batch_size=5)
    expected = []
    for i, (problem, reply) in enumerate(zip(todo(), replies, strict=True)):
        own = [token for token in reply.written if token != encoder.eos] + prompt
        own = {0: chain + prompt, 1: prompt + chain + prompt}.get(i, own)
        (question,) = encoder.encode_questions([problem.question])
        (answer,) = encoder.encode_answers([problem.answer])
        expected.append(behind(talker.decoder, question + own, answer))
    near(found, expected)


def test_of_one_that_answers_at_once_it_is_behind_question_and_prompt(
    talker: LatentReasoner, encoder: TraceEncoder
) -> None:
    asked = system(talker, encoder, "at once")
    found = gold_nll(asked, encoder, todo(), answered(asked, encoder), batch_size=5)
    questions = encoder.encode_questions([p.question for p in todo()])
    answers = encoder.encode_answers([p.answer for p in todo()])
    near(
        found,
        [
            behind(talker.decoder, question + encoder.answer_prompt_ids, answer)
            for question, answer in zip(questions, answers, strict=True)
        ],
    )


@torch.no_grad()
def test_of_a_latent_student_it_is_behind_its_latents(
    talker: LatentReasoner, encoder: TraceEncoder
) -> None:
    found = gold_nll(talker, encoder, todo(), answered(talker, encoder), batch_size=5)
    expected = []
    for problem in todo():  # alone, the answer one token at a time
        ids = torch.tensor(encoder.encode_questions([problem.question]))
        (answer,) = encoder.encode_answers([problem.answer])
        row = []
        for i, token in enumerate(answer):
            read = torch.tensor([answer[:i]], dtype=torch.long).view(1, -1)
            logits = talker(ids, torch.ones_like(ids), read, torch.ones_like(read)).logits[0, -1]
            row.append(-float(logits.double().log_softmax(-1)[token]))
        expected.append(row)
    near(found, expected)


@pytest.mark.parametrize("kind", ["latent", "at once", "with a chain"])
def test_the_batch_changes_nothing(
    talker: LatentReasoner, encoder: TraceEncoder, kind: str
) -> None:
    asked = system(talker, encoder, kind)
    replies = answered(asked, encoder)
    one_by_one = gold_nll(asked, encoder, todo(), replies, batch_size=1)
    near(gold_nll(asked, encoder, todo(), replies, batch_size=100), one_by_one)
    near(gold_nll(asked, encoder, todo()[::-1], replies[::-1], batch_size=5)[::-1], one_by_one)


def test_perplexity_is_per_token_over_all_answers() -> None:
    assert perplexity([[1.0], [2.0, 3.0, 6.0]]) == pytest.approx(math.exp(3.0))


def test_weights_that_give_no_number_are_refused_by_the_problem(encoder: TraceEncoder) -> None:
    broken = make_talker(encoder)
    replies = answered(broken, encoder)
    with torch.no_grad():
        broken.decoder.lm_head.weight[5] = float("nan")
    with pytest.raises(KavaError, match=r"problem p\d+: expected a finite probability"):
        gold_nll(broken, encoder, todo(), replies, batch_size=5)

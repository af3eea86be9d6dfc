"""What a system does with a test set, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from kava_core.errors import KavaError
from kava_core.evaluation.asking import ask
from kava_core.evaluation.examination import ProblemSet
from kava_core.evaluation.perplexity import gold_nll
from kava_core.models.latent import LatentReasoner
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import examine, problems, some, system
from tests.tiny import COMMON, tiny_model


def test_a_set_knows_what_its_traces_are_like(encoder: TraceEncoder) -> None:
    found = some(encoder)
    assert found.operations[:3] == [["none"], ["÷"], ["+", "−"]]
    assert found.trace_tokens[0] == 0
    assert found.trace_tokens[2] == len(encoder.encode(found.problems[2]).cot_ids)


def test_every_kind_of_system_is_examined(encoder: TraceEncoder, talker: LatentReasoner) -> None:
    test_set = some(encoder)
    peaks = {}
    for kind in ("latent", "at once", "with a chain"):
        asked = system(talker, encoder, kind)
        found = examine(asked, encoder, test_set, batch_size=5, max_new_tokens=6)
        assert found.replies == [
            replace(reply, seconds=other.seconds)
            for reply, other in zip(
                ask(asked, encoder, test_set.problems, batch_size=5, max_new_tokens=6),
                found.replies,
                strict=True,
            )
        ]
        assert found.nll == gold_nll(
            asked, encoder, test_set.problems, found.replies, batch_size=5
        )  # to the last bit: what shares a batch is the same
        assert [p.id for p in found.replies] == [p.id for p in test_set.problems]
        assert [len(row) for row in found.nll] == [len(encoder.encode_answers(["5"])[0])] * 12
        peaks[kind] = found.peak_bytes
    assert min(peaks.values()) > 0


def test_what_cannot_be_scored_is_refused_with_name_and_number(encoder: TraceEncoder) -> None:
    with pytest.raises(KavaError, match="test set svamp is empty"):
        ProblemSet.of("svamp", [], encoder)
    words = [replace(p, answer="a banana") for p in problems()]
    with pytest.raises(KavaError, match=r"test set svamp: expected .* none in 12 .*'a banana'"):
        ProblemSet.of("svamp", words, encoder)
    assert ProblemSet.of("svamp", [*words, problems()[0]], encoder).name == "svamp"


def test_a_problem_beyond_the_context_is_named(encoder: TraceEncoder) -> None:
    test_set = some(encoder)
    vocabulary = len(encoder.tokenizer)
    short = tiny_model(
        LlamaConfig(**{**COMMON, "vocab_size": vocabulary, "max_position_embeddings": 16})
    )
    asked = LatentReasoner.plain(short, answer_prompt_ids=[], eos_token_id=encoder.eos)
    with pytest.raises(KavaError, match=r"toy, problem p\d+ takes \d+ .* context is 16"):
        examine(asked, encoder, test_set, batch_size=5, max_new_tokens=6)


@pytest.mark.parametrize("kind", ["at once", "with a chain"])
def test_learned_positions_bound_what_may_be_written(encoder: TraceEncoder, kind: str) -> None:
    from transformers import GPT2Config

    model = tiny_model(
        GPT2Config(
            vocab_size=len(encoder.tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64
        )
    )
    prompt = encoder.answer_prompt_ids if kind == "at once" else []
    asked = LatentReasoner.plain(model, answer_prompt_ids=prompt, eos_token_id=encoder.eos)
    examine(asked, encoder, some(encoder), batch_size=5, max_new_tokens=5)
    with pytest.raises(KavaError, match=r"lower evaluate\.max_new_tokens"):
        examine(asked, encoder, some(encoder), batch_size=5, max_new_tokens=64)


def test_latents_that_stand_apart_take_more_of_the_context(encoder: TraceEncoder) -> None:
    size, context = len(encoder.tokenizer), 64
    config = LlamaConfig(**{**COMMON, "vocab_size": size, "max_position_embeddings": context})
    test_set = some(encoder)
    longest = max(
        len(question) + len(answer)
        for question, answer in zip(
            encoder.encode_questions([p.question for p in test_set.problems]),
            encoder.encode_answers([p.answer for p in test_set.problems]),
            strict=True,
        )
    )
    left = context - longest - len(encoder.answer_prompt_ids) - 2
    for stride, fits in ((left // 2, True), (left // 2 + 1, False)):
        asked = LatentReasoner.from_teacher(
            tiny_model(config),
            latents=2,
            iterations=1,
            reasoning="jacobi",
            projection=True,
            per_position=True,
            answer_prompt_ids=encoder.answer_prompt_ids,
            eos_token_id=encoder.eos,
            seed=0,
            stride=stride,
        ).eval()
        if fits:
            examine(asked, encoder, test_set, batch_size=5, max_new_tokens=2)
            continue
        with pytest.raises(KavaError, match=rf"takes \d+ .* context is {context}"):
            examine(asked, encoder, test_set, batch_size=5, max_new_tokens=2)

"""The watched latent loop, against every pass recomputed alone with eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kava_core.latents.student import (
    ANSWER,
    BOT,
    LATENTS,
    PARTS,
    PROMPT,
    latents_fed,
    observe,
    question_parts,
)
from kava_core.models.latent import LatentReasoner
from kava_core.record import Record
from tests.evaluation.talker import make_encoder
from tests.tiny import ARCHITECTURES, assert_near, pad, tiny_student, tiny_trace

# The last question is longer than the sliding windows of the tiny models.
TRACES = [tiny_trace("a", 9, 1, 4, 1), tiny_trace("b", 3, 1, 2, 2), tiny_trace("c", 70, 1, 3, 3)]
SETTINGS = [
    *((name, {}) for name in ARCHITECTURES),
    ("llama", {"iterations": 0}),
    ("llama", {"latents": 1}),
    ("qwen2", {"reasoning": "sequential"}),
    ("gpt2", {"answer_prompt_ids": []}),
]
Change = Callable[[int, Tensor], Tensor]  # slot, latent [E] → what is fed instead


def parts_of(trace: Record) -> list[int]:
    return [token % 3 for token in trace.question_ids]


def same(_: int, latent: Tensor) -> Tensor:
    return latent


def hidden_of(student: LatentReasoner, embeds: Tensor) -> Tensor:
    return student.decoder.base_model(inputs_embeds=embeds[None]).last_hidden_state[0]  # [N, E]


def naive_passes(
    student: LatentReasoner, question: list[int], change: Change = same
) -> list[Tensor]:
    """What each iteration feeds in all, [N, E]: question, <bot> and latents."""
    config = student.config
    embedded = student.get_input_embeddings()(torch.tensor(question))
    start = torch.cat((embedded, student.bot[None]))
    if config.reasoning == "sequential":
        for slot in range(config.latents):
            latent = change(slot, student.projection(hidden_of(student, start)[-1]))
            start = torch.cat((start, latent[None]))
        return [start]
    latents = [student.initial_latents[i] for i in range(config.latents)]
    passes = []
    for iteration in range(config.iterations + 1):
        if iteration == config.iterations:
            latents = [change(i, z) for i, z in enumerate(latents)]
        passes.append(torch.cat((start, torch.stack(latents))))
        hidden = hidden_of(student, passes[-1])
        latents = [student.projection(hidden[len(question) + i]) for i in range(config.latents)]
    return passes


def naive_answer(student: LatentReasoner, question: list[int], limit: int, change: Change) -> list:
    thought = torch.cat((naive_passes(student, question, change)[-1], student.eot[None]))
    written: list[int] = []
    while len(written) < limit and written[-1:] != [student.config.eos_token_id]:
        ids = torch.tensor([*student.config.answer_prompt_ids, *written], dtype=torch.long)
        embeds = torch.cat((thought, student.get_input_embeddings()(ids)))
        written.append(int(student.decoder(inputs_embeds=embeds[None]).logits[0, -1].argmax()))
    return written


@torch.no_grad()
@pytest.mark.parametrize(("name", "setting"), SETTINGS, ids=str)
def test_every_pass_is_seen_as_it_is(name: str, setting: dict) -> None:
    student = tiny_student(name, **setting)
    m, given = student.config.latents, student.config.answer_prompt_ids
    seen = observe(student, TRACES, [parts_of(t) for t in TRACES])
    eager = copy.deepcopy(student.decoder)
    eager.set_attn_implementation("eager")
    for row, trace in enumerate(TRACES):
        lead = [] if given else trace.answer_prompt_ids
        passes = naive_passes(student, trace.question_ids)
        tail = torch.tensor([*given, *lead, *trace.answer_ids])
        passes[-1] = torch.cat(
            (passes[-1], student.eot[None], student.get_input_embeddings()(tail))
        )
        prompt = 1 + len(given) + len(lead)
        labels = [*parts_of(trace), BOT, *[LATENTS] * m, *[PROMPT] * prompt]
        labels += [ANSWER] * len(trace.answer_ids)
        first = len(trace.question_ids) + 1
        answers = range(first + m + prompt - 1, first + m + prompt - 1 + len(trace.answer_ids))
        assert len(seen.hidden) == len(passes)
        for iteration, embeds in enumerate(passes):
            cache = DynamicCache()
            output = eager(
                inputs_embeds=embeds[None],
                past_key_values=cache,
                output_attentions=True,
                output_hidden_states=True,
            )
            slots = slice(first, first + m)
            assert_near(seen.hidden[iteration, row], output.hidden_states[-1][0, slots])
            for got, kind in ((seen.key_norms, "keys"), (seen.value_norms, "values")):
                cached = torch.stack([getattr(layer, kind)[0] for layer in cache.layers])
                assert_near(got[iteration, row], cached[:, :, slots].norm(dim=-1).mean(1))
            mean = torch.stack([a[0] for a in output.attentions]).mean((0, 1))  # [N, N]
            shares = torch.stack(
                [
                    mean[:, [i for i in range(len(mean)) if labels[i] == part]].sum(1)
                    for part in range(len(PARTS))
                ],
                1,
            )  # [N, P]
            assert_near(seen.attention[iteration, row, :m], shares[slots])
            if iteration < len(passes) - 1:
                assert bool(seen.attention[iteration, row, m].isnan().all())
            else:
                assert_near(seen.attention[iteration, row, m], shares[list(answers)].mean(0))
    last = seen.attention[-1].sum(-1)
    assert_near(last, torch.ones_like(last))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gpt2", {"iterations": 0}),
        ("qwen3", {"reasoning": "sequential"}),
    ],
    ids=str,
)
def test_a_changed_latent_is_the_one_that_the_answer_reads(name: str, setting: dict) -> None:
    student = tiny_student(name, eos_token_id=-1, **setting)
    ids, mask = pad([t.question_ids for t in TRACES], "left")
    before = student.generate(ids, mask, max_new_tokens=5)[:, ids.shape[1] :].tolist()

    def change(slot: int, z: Tensor) -> Tensor:
        return 3 * z.flip(-1) if slot == 2 else z

    told: list[int] = []

    def batched(first: int, z: Tensor) -> Tensor:
        told.extend(range(first, first + z.shape[1]))
        return torch.stack([change(first + i, x) for i, x in enumerate(z.unbind(1))], 1)

    with latents_fed(student, ids.shape[1], batched):
        after = student.generate(ids, mask, max_new_tokens=5)[:, ids.shape[1] :].tolist()
    assert told == [0, 1, 2, 3]
    assert after == [naive_answer(student, t.question_ids, 5, change) for t in TRACES]
    assert after != before == [naive_answer(student, t.question_ids, 5, same) for t in TRACES]
    assert student.generate(ids, mask, max_new_tokens=5)[:, ids.shape[1] :].tolist() == before


def test_question_tokens_are_sorted_by_what_they_show() -> None:
    encoder = make_encoder()
    ids = encoder.encode_questions(["ian has 14 apples . how many ?"])[0]
    shown = [encoder.tokenizer.decode([i]) for i in ids]
    for text, part in zip(shown, question_parts(ids, encoder.tokenizer), strict=True):
        digit, letter = any(c in "0123456789" for c in text), any("a" <= c <= "z" for c in text)
        assert PARTS[part] == ("numbers" if digit else "words" if letter else "other"), text

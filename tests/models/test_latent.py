"""The student, batched, padded and cached, against one problem at a time without any cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner, Reasoning
from tests.models.plain_keys import plain_keys
from tests.tiny import (
    ARCHITECTURES,
    PROMPT,
    VOCABULARY,
    assert_near,
    pad,
    tiny_model,
    tiny_student,
    tiny_trace,
)

QUESTIONS = [tiny_trace("q", n, 1, 1, seed=n).question_ids for n in (9, 3, 6)]
ANSWERS = [[11, 12, 13, 2], [14, 2], [15, 16, 2]]
JACOBI = [(0, 0), (1, 0), (1, 1), (1, 3), (4, 0), (4, 1), (4, 3)]  # (M, T)
SETTINGS = [
    *({"latents": m, "iterations": t} for m, t in JACOBI),
    {"latents": 1, "reasoning": "sequential"},
    {"latents": 4, "reasoning": "sequential"},
    {"projection": False, "per_position": False},
    {"latents": 4, "iterations": 3, "stride": 5},
    {"latents": 3, "iterations": 0, "stride": 2},
    {"latents": 3, "reasoning": "sequential", "stride": 4},
]


def setting_id(setting: dict) -> str:
    return "-".join(f"{name}={value}" for name, value in setting.items())


# --- the slow, obvious student -----------------------------------------------------------------


@dataclass
class Naive:
    logits: Tensor  # [A+1, V]
    keys: Tensor  # [L, H, M, D]
    values: Tensor
    endpoint: Tensor  # [L+1, E]


def places(student: LatentReasoner, read: int, columns: int) -> Tensor:
    """Positions [1, columns] of a sequence whose question has `read` tokens, counted one by one."""
    first = read + 1  # behind <bot>
    at, found = -1, []
    for column in range(columns):
        latent = first <= column < first + student.config.latents
        at += student.config.stride if latent else 1
        found.append(at)
    return torch.tensor([found])


def run(
    student: LatentReasoner, embeds: Tensor, read: int
) -> tuple[Tensor, list[Tensor], DynamicCache]:
    """The decoder over a whole sequence [1, N, E] that begins with a question of `read` tokens: no
    mask, a cache only to read."""
    cache = DynamicCache()
    output = student.decoder(
        inputs_embeds=embeds,
        position_ids=places(student, read, embeds.shape[1]),
        output_hidden_states=True,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[0], [h[0] for h in output.hidden_states], cache


def last_hidden(student: LatentReasoner, embeds: Tensor, read: int) -> Tensor:
    return run(student, embeds, read)[1][-1]  # [N, E]


def naive_sequence(student: LatentReasoner, question: list[int]) -> Tensor:
    """The embeddings of `Q <bot> z <eot>` [1, N, E], each iteration computed from the start."""
    config, embed = student.config, student.get_input_embeddings()
    start = embed(torch.tensor([question]))
    if not config.latents:
        return start
    start = torch.cat((start, student.bot[None, None]), 1)
    bot = start.shape[1] - 1
    if config.reasoning == "sequential":
        sequence = start
        for _ in range(config.latents):
            latent = student.projection(last_hidden(student, sequence, len(question))[-1])
            sequence = torch.cat((sequence, latent[None, None]), 1)
        return torch.cat((sequence, student.eot[None, None]), 1)
    rows = student.initial_latents
    latents = [rows[i if config.per_position else 0] for i in range(config.latents)]
    for _ in range(config.iterations):
        whole = torch.cat((start, torch.stack(latents)[None]), 1)
        hidden = last_hidden(student, whole, len(question))
        latents = [student.projection(hidden[bot + i]) for i in range(config.latents)]
    return torch.cat((start, torch.stack(latents)[None], student.eot[None, None]), 1)


def naive(student: LatentReasoner, question: list[int], answer: list[int]) -> Naive:
    sequence = naive_sequence(student, question)
    prompt = torch.tensor([student.config.answer_prompt_ids + answer])
    whole = torch.cat((sequence, student.get_input_embeddings()(prompt)), 1)
    logits, hidden, cache = run(student, whole, len(question))
    endpoint = sequence.shape[1] + len(student.config.answer_prompt_ids) - 1
    slots = slice(len(question) + 1, len(question) + 1 + student.config.latents)
    return Naive(
        logits=logits[endpoint:],
        keys=torch.stack([layer.keys[0, :, slots] for layer in cache.layers]),
        values=torch.stack([layer.values[0, :, slots] for layer in cache.layers]),
        endpoint=torch.stack([h[endpoint] for h in hidden]),
    )


def naive_answer(student: LatentReasoner, question: list[int], limit: int) -> list[int]:
    """Greedy, everything recomputed for every token."""
    answer: list[int] = []
    while len(answer) < limit and answer[-1:] != [student.config.eos_token_id]:
        answer.append(int(naive(student, question, answer).logits[-1].argmax()))
    return answer


def reason(student: LatentReasoner, side: str, questions: list[list[int]]) -> Reasoning:
    return student(*pad(questions, side), *pad(ANSWERS[: len(questions)]))


# --- exactness ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_padded_batch_equals_each_problem_recomputed_alone(name: str, setting: dict) -> None:
    student = tiny_student(name, **setting)
    expected = [naive(student, q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    for side in ("left", "right"):
        got = reason(student, side, QUESTIONS)
        for row, (one, question) in enumerate(zip(expected, QUESTIONS, strict=True)):
            assert_near(got.logits[row, : len(ANSWERS[row]) + 1], one.logits)
            assert_near(got.endpoint[row], one.endpoint)
            assert got.latent_positions[row].tolist() == [
                len(question) + student.config.stride * (i + 1)
                for i in range(student.config.latents)
            ]
            if student.config.latents:
                assert_near(torch.stack(got.keys, 1)[row], one.keys)
                assert_near(torch.stack(got.values, 1)[row], one.values)
            else:
                assert got.keys == got.values == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_padding_is_no_distance_in_a_sliding_window(name: str) -> None:
    student = tiny_student(name)  # windows of 48 and 64
    questions = [tiny_trace("q", n, 1, 1, seed=n).question_ids for n in (90, 40)]
    for side in ("left", "right"):
        got = reason(student, side, questions)
        for row, question in enumerate(questions):
            one = naive(student, question, ANSWERS[row])
            assert_near(got.logits[row, : len(ANSWERS[row]) + 1], one.logits)
            assert_near(torch.stack(got.keys, 1)[row], one.keys)


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing() -> None:
    student = tiny_student("llama")
    question, mask = pad(QUESTIONS, "left", filler=3)
    answer, answer_mask = pad(ANSWERS, filler=3)
    one = student(question, mask, answer, answer_mask)
    other = student(
        question.where(mask == 1, 40), mask, answer.where(answer_mask == 1, 41), answer_mask
    )
    assert torch.equal(torch.stack(one.keys), torch.stack(other.keys))
    for row, answer_ids in enumerate(ANSWERS):
        real = len(answer_ids) + 1
        assert torch.equal(one.logits[row, :real], other.logits[row, :real])


@torch.no_grad()
def test_boolean_masks_are_masks() -> None:
    student = tiny_student("llama")
    (question, mask), (answer, answer_mask) = pad(QUESTIONS, "right"), pad(ANSWERS)
    one = student(question, mask, answer, answer_mask, answer, answer_mask)
    other = student(question, mask.bool(), answer, answer_mask.bool(), answer, answer_mask.bool())
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.chain_losses, other.chain_losses)
    tokens = student.generate(question, mask, return_dict_in_generate=True).tokens
    assert torch.equal(
        student.generate(question, mask.bool(), return_dict_in_generate=True).tokens, tokens
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_jacobi_with_an_iteration_per_latent_equals_sequential_reasoning(name: str) -> None:
    sequential = reason(tiny_student(name, reasoning="sequential"), "left", QUESTIONS)
    for iterations in (4, 6):
        jacobi = reason(tiny_student(name, iterations=iterations), "left", QUESTIONS)
        assert_near(jacobi.logits, sequential.logits)
        assert_near(torch.stack(jacobi.keys), torch.stack(sequential.keys))


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chain_losses_are_the_decoders_own(name: str) -> None:
    student = tiny_student(name)
    chains = [tiny_trace("c", n, 1, 1, seed=50 + n).question_ids for n in (4, 7, 5)]
    for side in ("left", "right"):
        got = student(*pad(QUESTIONS, side), *pad(ANSWERS), *pad(chains)).chain_losses
        assert got.shape == (3, 7)
        for row, (question, chain) in enumerate(zip(QUESTIONS, chains, strict=True)):
            plain = student.decoder(torch.tensor([question + chain])).logits[0]
            logs = plain[len(question) - 1 : -1].log_softmax(-1)
            assert_near(got[row, : len(chain)], -logs[range(len(chain)), chain])
            assert not got[row, len(chain) :].any()
    assert reason(student, "left", QUESTIONS).chain_losses is None


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pre_rope_slot_keys_are_what_the_key_projection_gave(name: str) -> None:
    student = tiny_student(name)
    got = reason(student, "left", QUESTIONS)
    post, pre = student.slot_keys(got, "post_rope"), student.slot_keys(got, "pre_rope")
    assert post.shape == pre.shape == (3, 3, 4 if name == "gpt2" else 2, 4, 8)
    assert torch.equal(post, torch.stack(got.keys, 1))
    if name == "gpt2":
        assert torch.equal(pre, post)
        return
    with plain_keys(student.decoder) as plain:
        alone = reason(student, "left", QUESTIONS[:1])
    for layer, keys in plain.items():
        # The last call fed z <eot> prompt answer, the latents first.
        got_keys = student.slot_keys(alone, "pre_rope")[0, layer]
        assert_near(got_keys, keys[0, :4].transpose(0, 1))


# --- generation --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("setting", [SETTINGS[0], *SETTINGS[4:9]], ids=setting_id)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_equals_greedy_recomputation(name: str, setting: dict) -> None:
    student = tiny_student(name, **setting, eos_token_id=-1)
    free = [naive_answer(student, q, 5) for q in QUESTIONS]
    # The second token of one row ends the sequence: rows then stop at different times.
    student.config.eos_token_id = eos = free[1][1]
    expected = [a[: a.index(eos) + 1] if eos in a else a for a in free]
    calls: list[object] = []
    student.decoder.base_model.register_forward_hook(lambda *_: calls.append(None))
    for side in ("left", "right"):
        calls.clear()
        got = student.generate(
            *pad(QUESTIONS, side), max_new_tokens=5, return_dict_in_generate=True
        )
        assert len(calls) == int(got.passes.max())
        for row, answer in enumerate(expected):
            filled = answer + [eos] * (got.tokens.shape[1] - len(answer))
            assert got.tokens[row].tolist() == filled
            assert got.passes[row] == student.latent_passes + len(answer) - 1
    calls.clear()
    alone = student.generate(
        torch.tensor(QUESTIONS[:1]), max_new_tokens=5, return_dict_in_generate=True
    )
    assert alone.tokens[0].tolist() == expected[0]
    assert alone.passes.tolist() == [len(calls)]


@pytest.mark.parametrize(
    ("setting", "passes"),
    [
        ({"latents": 0}, 1),
        ({"iterations": 0}, 1),
        ({"iterations": 3}, 4),
        ({"reasoning": "sequential"}, 5),
    ],
)
def test_passes_before_the_answer(setting: dict, passes: int) -> None:
    assert tiny_student("llama", **setting).latent_passes == passes


@torch.no_grad()
@pytest.mark.parametrize("setting", [{}, *SETTINGS[:3], *SETTINGS[-2:]], ids=setting_id)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_has_the_logits_of_the_training_forward(name: str, setting: dict) -> None:
    student = tiny_student(name, eos_token_id=-1, **setting)
    question = pad(QUESTIONS, "left")
    seen: list[Tensor] = []
    hook = student.decoder.register_forward_hook(lambda *call: seen.append(call[2].logits[:, -1]))
    tokens = student.generate(*question, max_new_tokens=6, return_dict_in_generate=True).tokens
    hook.remove()
    forward = student(*question, tokens, torch.ones_like(tokens))
    assert_near(torch.stack(seen, 1), forward.logits[:, :-1], 1e-5)
    assert torch.equal(forward.logits[:, :-1].argmax(-1), tokens)


MANY = [tiny_trace("q", 2 + n % 5, 1, 1, seed=n).question_ids for n in range(12)]


def ending(free: list[list[int]]) -> int:
    """The token at which most rows, had they not been stopped, end, though not all at once."""
    ends = {
        token: [row.index(token) for row in free if token in row]
        for token in sorted({token for row in free for token in row})
    }
    return max(ends, key=lambda token: len(ends[token]) * (len(set(ends[token])) > 1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sampled"), [("llama", False), ("llama", True), ("gpt2", True), ("gemma3", True)]
)
def test_rows_that_ended_leave_the_batch_and_change_no_other(name: str, sampled: bool) -> None:
    student = tiny_student(name, eos_token_id=-1)
    sizes: list[int] = []
    student.decoder.register_forward_hook(lambda *call: sizes.append(len(call[2].logits)))

    def generate(eos: int) -> tuple[list[list[int]], list[int]]:
        student.config.eos_token_id = eos
        sizes.clear()
        torch.manual_seed(0)
        found = student.generate(
            *pad(MANY, "left"),
            max_new_tokens=40,
            do_sample=sampled,
            temperature=1.5,
            top_p=0.95,
            return_dict_in_generate=True,
        )
        return found.tokens.tolist(), found.passes.tolist()

    free, _ = generate(-1)
    assert sizes == [12] * 40
    eos = ending(free)
    ends = [row.index(eos) if eos in row else 40 for row in free]
    tokens, passes = generate(eos)
    longest = min(max(ends) + 1, 40)
    for end, row, stopped, number in zip(ends, free, tokens, passes, strict=True):
        assert stopped == (row[: end + 1] + [eos] * 40)[:longest]
        assert number == student.latent_passes + min(end, 39)
    size, expected = 12, []
    for step in range(longest):
        left = sum(end >= step for end in ends)
        size = left if 2 * left <= size else size
        expected.append(size)
    assert sizes == expected and len(set(sizes)) > 1


@torch.no_grad()
def test_sampling_follows_the_training_forwards_distribution() -> None:
    student = tiny_student("llama")
    rows = 1000
    ids = torch.tensor(QUESTIONS[:1]).expand(rows, -1)
    logits = reason(student, "left", QUESTIONS[:1]).logits[0, 0]
    torch.manual_seed(0)
    tokens = student.generate(ids, max_new_tokens=1, do_sample=True, temperature=2.0, top_k=0)[
        :, -1
    ]
    share = torch.bincount(tokens, minlength=VOCABULARY) / rows
    expected = (logits / 2).softmax(-1)
    assert float((share - expected).abs().max()) < 5 * (0.25 / rows) ** 0.5


@torch.no_grad()
def test_sampling_is_seeded_and_narrows_to_greedy() -> None:
    student = tiny_student("qwen2")
    question = pad(QUESTIONS, "left")

    def sample(seed: int, **options: float) -> list[list[int]]:
        torch.manual_seed(seed)
        return student.generate(
            *question, max_new_tokens=6, do_sample=True, return_dict_in_generate=True, **options
        ).tokens.tolist()

    greedy = student.generate(
        *question, max_new_tokens=6, return_dict_in_generate=True
    ).tokens.tolist()
    assert sample(1, temperature=3.0) == sample(1, temperature=3.0) != sample(2, temperature=3.0)
    assert sample(1, temperature=1e-4) == greedy
    assert sample(1, top_p=1e-6) == greedy


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_plain_model_without_prompt_writes_what_it_would_write(name: str) -> None:
    model = tiny_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = LatentReasoner.plain(model, answer_prompt_ids=[], eos_token_id=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for side in ("left", "right"):
        got = plain.generate(*pad(QUESTIONS, side), max_new_tokens=5, return_dict_in_generate=True)
        for row, question in enumerate(QUESTIONS):
            text = list(question)
            for _ in range(5):
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
                if text[-1] == 2:
                    break
            written = text[len(question) :]
            assert got.tokens[row].tolist()[: len(written)] == written
            assert int(got.passes[row]) == len(written)


def test_a_plain_model_with_prompt_equals_no_cot() -> None:
    model = tiny_model("llama")
    plain = LatentReasoner.plain(model, answer_prompt_ids=PROMPT, eos_token_id=2)
    student = tiny_student("llama", latents=0)
    assert torch.equal(
        reason(plain, "left", QUESTIONS).logits, reason(student, "left", QUESTIONS).logits
    )


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_options_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(KavaError, match=r"a temperature above 0 and a top_p above 0, at most 1"):
        tiny_student("llama").generate(torch.tensor(QUESTIONS[:1]), do_sample=True, **options)


def test_unknown_reasoning_and_absurd_iterations_are_refused() -> None:
    with pytest.raises(KavaError, match=r"jacobi or sequential, not 'parallel'"):
        tiny_student("llama", reasoning="parallel")
    with pytest.raises(KavaError, match=r"at most 256 iterations, found 257\. More than there are"):
        tiny_student("llama", iterations=257)

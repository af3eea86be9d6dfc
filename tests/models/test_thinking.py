"""A student's folder in transformers: without consent a decoder, with it one that thinks."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    dynamic_module_utils,
)
from transformers.generation import BaseStreamer

from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from tests.tiny import COMMON, EOS, PROMPT, pad, tiny_model, tiny_student

QUESTIONS = [[11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]
BATCH = pad(QUESTIONS, "left")
WIDTH = 5


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers copies the code that it was allowed to run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "modules"


Ways = tuple[LatentReasoner, Callable[..., Any]]


def both(folder: Path, name: str = "llama", **settings: Any) -> Ways:
    """A saved student, opened by us, and transformers' `generate` in its decoder."""
    return saved(folder, tiny_student(name, **settings))


def saved(folder: Path, student: LatentReasoner) -> Ways:
    student.save_pretrained(folder)
    decoder = AutoModelForCausalLM.from_pretrained(folder)

    def generate(*question: Tensor, **options: Any) -> Any:
        ids, mask = question if len(question) == 2 else (question[0], None)
        return decoder.generate(
            input_ids=ids,
            attention_mask=mask,
            custom_generate=str(folder),
            trust_remote_code=True,
            **options,
        )

    return LatentReasoner.from_pretrained(folder), generate


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reasoning": "sequential"},
        {"iterations": 0},
        {"projection": False, "per_position": False},
        {"latents": 0},
    ],
    ids=["jacobi", "sequential", "no iterations", "bare", "no latents"],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_every_way_to_ask_gives_the_same_tokens(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    trained = tiny_student(name, **settings)
    loaded, theirs = both(tmp_path / "student", name, **settings)
    for side in ("left", "right"):
        question = pad(QUESTIONS, side)
        expected = trained.generate(*question, max_new_tokens=6)
        assert torch.equal(loaded.generate(*question, max_new_tokens=6), expected)
        assert torch.equal(theirs(*question, max_new_tokens=6), expected)
        # transformers' own loop, which a streamer asks for
        assert torch.equal(theirs(*question, max_new_tokens=6, streamer=Heard()), expected)
    for row, text in enumerate(QUESTIONS):
        alone = theirs(torch.tensor([text]), max_new_tokens=6)[0, len(text) :].tolist()
        assert expected[row, WIDTH:].tolist()[: len(alone)] == alone


def test_half_precision_is_the_same_everywhere(tmp_path: Path) -> None:
    tiny_student("qwen2").save_pretrained(tmp_path / "student")
    loaded = LatentReasoner.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    found = decoder.generate(
        input_ids=BATCH[0],
        attention_mask=BATCH[1],
        custom_generate=str(tmp_path / "student"),
        trust_remote_code=True,
        max_new_tokens=6,
        return_dict_in_generate=True,
    )
    assert found.latents.dtype == torch.bfloat16
    assert torch.equal(loaded.generate(*BATCH, max_new_tokens=6), found.sequences)


def test_without_consent_nothing_of_the_folder_runs_or_is_written(
    tmp_path: Path, modules: Path
) -> None:
    folder = tmp_path / "student"
    tiny_student("llama").save_pretrained(folder)
    (folder / "custom_generate/generate.py").write_text("raise SystemExit('ran')\n")
    before = sorted(file for file in folder.rglob("*"))
    LatentReasoner.from_pretrained(folder).generate(*BATCH, max_new_tokens=2)
    decoder = AutoModelForCausalLM.from_pretrained(folder)
    decoder.generate(input_ids=BATCH[0], attention_mask=BATCH[1], max_new_tokens=2)
    with pytest.raises(ValueError, match="trust_remote_code"):
        decoder.generate(input_ids=BATCH[0], custom_generate=str(folder), trust_remote_code=False)
    assert sorted(file for file in folder.rglob("*")) == before
    assert not modules.exists() or not list(modules.rglob("generate.py"))


def test_consent_given_when_loading_makes_generate_think(tmp_path: Path) -> None:
    student = tiny_student("llama")
    student.save_pretrained(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=True)
    expected = student.generate(*BATCH, max_new_tokens=5)
    assert torch.equal(
        model.generate(BATCH[0], attention_mask=BATCH[1], max_new_tokens=5), expected
    )
    assert not any("latents" in name for name in model.state_dict())


def test_the_code_needs_nothing_of_this_package(tmp_path: Path) -> None:
    student = tiny_student("qwen2")
    student.save_pretrained(tmp_path / "student")
    expected = student.generate(*BATCH, max_new_tokens=5).tolist()
    code = f"""
import sys
sys.modules["kava_core"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "student")!r})
ids, mask = torch.tensor({BATCH[0].tolist()}), torch.tensor({BATCH[1].tolist()})
print(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5,
    custom_generate={str(tmp_path / "student")!r}, trust_remote_code=True).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(expected)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class NotFive(LogitsProcessor):
    """Of the even rows of the batch only: it must see all rows all the time."""

    def __init__(self, banned: int) -> None:
        self.banned = banned

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        assert len(input_ids) == len(QUESTIONS)
        scores[::2, self.banned] = -torch.inf
        return scores


class After(StoppingCriteria):
    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.columns)


class InTurn(StoppingCriteria):
    """Ends the first row when it is asked for the first time, the second at the second."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.asked += 1
        return torch.arange(len(input_ids)) < self.asked


@pytest.fixture(params=["ours", "transformers"])
def generate(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Nothing ends an answer but its length."""
    student, theirs = both(tmp_path / "student", eos_token_id=EOS)
    return student.generate if request.param == "ours" else theirs


def answers(generate: Callable[..., Any], **options: Any) -> list[list[int]]:
    return generate(*BATCH, **options)[:, WIDTH:].tolist()


def test_a_streamer_hears_the_question_and_every_token(generate: Callable[..., Any]) -> None:
    heard = Heard()
    question = torch.tensor(QUESTIONS[:1])
    whole = generate(question, max_new_tokens=6, streamer=heard)
    assert heard.ended
    assert [i for part in heard.heard for i in part] == whole[0].tolist()
    assert heard.heard[0] == QUESTIONS[0]


def test_lengths_count_as_they_do_in_transformers(generate: Callable[..., Any]) -> None:
    free = answers(generate, max_new_tokens=6, eos_token_id=63)
    for options in (
        {"max_length": WIDTH + 6},
        {"generation_config": GenerationConfig(max_length=WIDTH + 6)},
        {"generation_config": GenerationConfig(max_new_tokens=6)},
        {"max_length": WIDTH + 6, "streamer": Heard()},
    ):
        if "generation_config" in options:
            options["generation_config"].eos_token_id = 63
        else:
            options["eos_token_id"] = 63
        assert answers(generate, **options) == free
    for more in ({}, {"streamer": Heard()}):
        first = free[0][0]
        ended = answers(generate, max_new_tokens=6, eos_token_id=first, pad_token_id=0, **more)
        assert ended[0] == [first, *[0] * (len(ended[0]) - 1)]
        longer = answers(
            generate, max_length=WIDTH + 6, eos_token_id=first, min_length=WIDTH + 3, **more
        )
        assert first not in longer[0][:3]
    with pytest.raises((KavaError, ValueError), match="the question has 5 tokens already"):
        generate(*BATCH, max_length=5)


def test_lengths_of_the_model_count_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    tiny_student("llama").save_pretrained(folder)
    decoder = AutoModelForCausalLM.from_pretrained(folder)

    def asked(**options: Any) -> list[int]:
        options |= {"custom_generate": str(folder), "trust_remote_code": True}
        return decoder.generate(torch.tensor(QUESTIONS[:1]), **options)[0, WIDTH:].tolist()

    free = asked(max_new_tokens=6, eos_token_id=63)
    ways: list[dict[str, Any]] = [{}, {"streamer": Heard()}, {"num_beams": 2}]
    decoder.generation_config = GenerationConfig(max_length=WIDTH + 4, eos_token_id=63)
    assert [len(asked(**way)) for way in ways] == [4, 4, 4]
    assert [len(asked(max_new_tokens=3, **way)) for way in ways] == [3, 3, 3]
    decoder.generation_config = GenerationConfig(
        max_new_tokens=6, min_length=WIDTH + 3, eos_token_id=free[0]
    )
    for way in ways:
        assert free[0] not in asked(**way)[:3]
    decoder.generation_config = GenerationConfig(max_length=3)
    for way in ways:
        with pytest.raises(ValueError, match="max_length is 3, and the question has 5 tokens"):
            asked(**way)


def test_several_ids_may_end_an_answer(generate: Callable[..., Any]) -> None:
    free = answers(generate, max_new_tokens=6, eos_token_id=63)
    ends = [free[0][1], free[1][2]]
    found = generate(
        *BATCH, max_new_tokens=6, eos_token_id=ends, pad_token_id=0, return_dict_in_generate=True
    )
    for row, tokens, passes in zip(free, found.tokens.tolist(), found.passes.tolist(), strict=True):
        stop = min([row.index(end) + 1 for end in ends if end in row], default=6)
        assert tokens == (row[:stop] + [0] * 6)[: len(tokens)]
        assert passes == 3 + stop - 1


def test_processors_and_criteria_are_asked_and_see_every_row(generate: Callable[..., Any]) -> None:
    free = answers(generate, max_new_tokens=6, eos_token_id=63)
    banned = free[0][0]
    changed = answers(
        generate,
        max_new_tokens=6,
        eos_token_id=63,
        logits_processor=LogitsProcessorList([NotFive(banned)]),
    )
    assert banned not in changed[0]
    assert changed[1] == free[1]
    short = answers(
        generate,
        max_new_tokens=6,
        eos_token_id=63,
        stopping_criteria=StoppingCriteriaList([After(WIDTH + 2)]),
    )
    assert short == [row[:2] for row in free]
    # a setting that punishes what was written, the question included
    punished = answers(generate, max_new_tokens=6, eos_token_id=63, repetition_penalty=50.0)
    for row, question in zip(punished, QUESTIONS, strict=True):
        assert len({*row, *question}) == len(row) + len(question)


def test_a_row_that_criteria_stop_passes_no_more(generate: Callable[..., Any]) -> None:
    more: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": 63, "pad_token_id": 0}
    free = answers(generate, **more)

    def passes(**options: Any) -> tuple[list[list[int]], list[int]]:
        found = generate(*BATCH, **more, **options, return_dict_in_generate=True)
        return found.tokens.tolist(), (found.passes - 2).tolist()

    tokens, written = passes(stopping_criteria=[InTurn()])
    assert written == [1, 2, 3]
    assert tokens == [row[:n] + [0] * (3 - n) for row, n in zip(free, written, strict=True)]
    # the length that transformers' own criterion names comes before max_new_tokens
    tokens, written = passes(stopping_criteria=[MaxLengthCriteria(WIDTH + 4), InTurn()])
    assert (len(tokens[0]), written) == (3, [1, 2, 3])
    tokens, written = passes(stopping_criteria=[MaxLengthCriteria(WIDTH + 8)])
    assert (len(tokens[0]), written) == (8, [8, 8, 8])
    words = {"abcdef": 0} | {f"t{i}": i for i in range(1, 64)}  # the first is transformers' wish
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "abcdef")))
    stop = free[1][2]
    tokens, written = passes(stop_strings=[f"t{stop}"], tokenizer=tokenizer)
    assert written == [row.index(stop) + 1 if stop in row else 6 for row in free]
    assert min(written) < 6


def test_more_than_one_answer_and_sampling(generate: Callable[..., Any]) -> None:
    options = {"max_new_tokens": 5, "eos_token_id": 63, "do_sample": True, "temperature": 3.0}
    for more in ({}, {"streamer": Heard()}):
        torch.manual_seed(0)
        found = generate(*BATCH, num_return_sequences=4, return_dict_in_generate=True,
                         **options, **more)  # fmt: skip
        assert found.sequences.shape == (12, WIDTH + 5)
        assert torch.equal(found.sequences[:, :WIDTH], BATCH[0].repeat_interleave(4, 0))
        assert len({tuple(row) for row in found.tokens.tolist()}) > 6
        for row, passes in zip(found.tokens.tolist(), found.passes.tolist(), strict=True):
            assert passes == 3 - 1 + (row.index(63) + 1 if 63 in row else 5)
        assert torch.equal(found.latents[0], found.latents[3])
        assert found.latents.shape == found.thoughts.shape == (12, 4, 32)
        # as cold as can be, all are the greedy one
        cold = generate(*BATCH, num_return_sequences=2, **{**options, "temperature": 1e-4}, **more)
        greedy = generate(*BATCH, max_new_tokens=5, eos_token_id=63)
        assert torch.equal(cold, greedy.repeat_interleave(2, 0))


def test_beams_search_behind_the_latents(tmp_path: Path) -> None:
    student, theirs = both(tmp_path / "student", eos_token_id=63)
    options = {"max_new_tokens": 3, "num_beams": 64**2, "return_dict_in_generate": True}
    question = torch.tensor(QUESTIONS[1:2])
    found = student.generate(question, output_scores=True, **options)
    # as many beams as there are pairs of tokens: nothing likelier than the best is left out
    assert torch.equal(theirs(question, **options).sequences, found.sequences)
    greedy = student.generate(question, max_new_tokens=3, return_dict_in_generate=True)

    def likelihood(tokens: Tensor) -> float:
        with torch.no_grad():
            logits = student(
                question, torch.ones_like(question), tokens, torch.ones_like(tokens)
            ).logits[:, :-1]
        return float(logits.log_softmax(-1).gather(-1, tokens[..., None]).sum())

    assert likelihood(found.tokens) >= likelihood(greedy.tokens)
    assert found.passes.tolist() == [3 + 2]
    several = student.generate(*BATCH, max_new_tokens=3, num_beams=4, num_return_sequences=2)
    assert several.shape[0] == 6


def test_the_dict_has_what_was_asked_for(generate: Callable[..., Any]) -> None:
    found = generate(
        *BATCH,
        max_new_tokens=3,
        eos_token_id=63,
        output_logits=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert len(found.logits) == 3
    assert torch.stack(found.logits, 1).argmax(-1).tolist() == found.tokens.tolist()
    assert len(found.hidden_states[0]) == 4


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reasoning": "sequential"},
        {"iterations": 0},
        {"projection": False, "per_position": False},
        {"latents": 0},
    ],
    ids=["jacobi", "sequential", "no iterations", "bare", "no latents"],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2"])
def test_a_stock_decoder_answers_from_prompt_embeddings(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What a server gets that takes embeddings as prompts, and knows nothing of latents."""
    student = tiny_student(name, **settings)
    head = student.get_output_embeddings()
    torch.manual_seed(0)  # one tied to the embeddings writes the same token again and again
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    student.decoder.config.tie_word_embeddings = False
    student.decoder.save_pretrained(tmp_path / "decoder")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    for side in ("left", "right"):
        question = pad(QUESTIONS, side)
        tokens = student.generate(*question, max_new_tokens=6, return_dict_in_generate=True).tokens
        for row, embeds in enumerate(student.prompt_embeddings(*question)):
            assert len(embeds) == len(QUESTIONS[row]) + len(student.config.answer_prompt_ids) + (
                student.config.latents + 2 if student.config.latents else 0
            )
            written = stock.generate(
                inputs_embeds=embeds[None], max_new_tokens=6, eos_token_id=EOS, pad_token_id=EOS
            )[0].tolist()
            assert tokens[row].tolist()[: len(written)] == written
    assert len({tuple(row) for row in tokens.tolist()}) > 1


def test_latents_that_stand_apart_have_no_prompt_embeddings() -> None:
    student = tiny_student("llama", stride=3)
    with pytest.raises(KavaError, match="latents of this student are 3 apart"):
        student.prompt_embeddings(*BATCH)


def test_what_asks_for_nothing_changes_nothing(generate: Callable[..., Any]) -> None:
    idle = {
        "cache_implementation": "dynamic",
        "guidance_scale": 1.0,
        "num_beam_groups": 1,
        "encoder_repetition_penalty": 1.0,
        "encoder_no_repeat_ngram_size": 0,
    }
    for way in ({}, {"num_beams": 2}, {"output_scores": True}):
        options = {"max_new_tokens": 4, **way}
        expected = answers(generate, **options)
        assert answers(generate, **options, **idle) == expected
        config = GenerationConfig(**options, cache_implementation="dynamic", eos_token_id=EOS)
        assert answers(generate, generation_config=config) == expected


def test_token_ids_may_be_of_any_size_of_integer(generate: Callable[..., Any]) -> None:
    expected = generate(*BATCH, max_new_tokens=3)
    for way in ({}, {"streamer": Heard()}):
        small = generate(*(x.int() for x in BATCH), max_new_tokens=3, **way)
        assert torch.equal(small, expected)
    with pytest.raises((KavaError, ValueError), match=r"expected token ids .*float32"):
        generate(BATCH[0].float(), BATCH[1])


def test_padding_without_a_mask_is_found_or_warned_about(generate: Callable[..., Any]) -> None:
    filler = int(BATCH[0][1, 0])
    expected = answers(generate, max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in ("left", "right"):
            found = generate(pad(QUESTIONS, side)[0], max_new_tokens=4, pad_token_id=filler)
            assert found[:, WIDTH:].tolist() == expected
        generate(torch.tensor(QUESTIONS[:1]), max_new_tokens=4)
    with pytest.warns(UserWarning, match="without an attention_mask"):
        generate(BATCH[0], max_new_tokens=4, pad_token_id=EOS)


@pytest.mark.parametrize(
    "latents_and_iterations", [(4, 256), (300, 300), (4, 257), (300, 301), (4, 2**31 - 1)]
)
def test_more_iterations_than_can_change_anything_are_refused(
    latents_and_iterations: tuple[int, int], tmp_path: Path
) -> None:
    latents, iterations = latents_and_iterations
    _, theirs = both(tmp_path / "student", latents=latents, per_position=False)
    file = tmp_path / "student" / "latents.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "iterations": iterations}))
    most = max(latents, 256)
    if iterations <= most:
        assert LatentReasoner.from_pretrained(tmp_path / "student").config.iterations == iterations
        return
    said = f"expected at most {most} iterations, found {iterations}"
    with pytest.raises(KavaError, match=said):
        LatentReasoner.from_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=said):
        theirs(*BATCH)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache_implementation": "static"}, "`cache_implementation` cannot be had with latents"),
        ({"use_cache": False}, "`use_cache` cannot be False"),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens` cannot be had"),
        ({"guidance_scale": 1.5}, "answer without the latents"),
        ({"num_beam_groups": 2, "num_beams": 2}, "beams in groups are another custom_generate"),
        ({"encoder_repetition_penalty": 1.9}, "`encoder_repetition_penalty` cannot be had"),
        ({"encoder_no_repeat_ngram_size": 1}, "where transformers' own loops get embeddings"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "`inputs_embeds` cannot be had"),
        ({"labels": torch.zeros(1, 2)}, "`labels` cannot be had with latents"),
        ({"do_sample": True, "top_p": 2.0}, "top_p above 0, at most 1"),
    ],
)
def test_what_cannot_be_had_with_latents_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    student, theirs = both(tmp_path / "student")
    with pytest.raises(KavaError, match=said):
        student.generate(*BATCH, **options)
    with pytest.raises(ValueError, match=said):
        theirs(*BATCH, **options)


def test_a_model_from_elsewhere_is_refused(tmp_path: Path) -> None:
    student = tiny_student("llama")
    student.save_pretrained(tmp_path / "student")
    student.decoder.save_pretrained(tmp_path / "bare")
    bare: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"there is no latents\.json there"):
        bare.generate(BATCH[0], custom_generate=str(tmp_path / "student"), trust_remote_code=True)


def test_a_question_that_fills_the_context_is_refused(tmp_path: Path) -> None:
    student, theirs = both(tmp_path / "student")
    question = torch.full((1, 512 - 4 - 2 - 3 + 1), 11)
    for generate, error in ((student.generate, KavaError), (theirs, ValueError)):
        with pytest.raises(error, match="takes 513 positions with latents and answer prompt"):
            generate(question)


SHORT = GPT2Config(
    vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=63
)
AROUND = 4 + 2 + 3  # latents, <bot> and <eot>, answer prompt


def short_student(folder: Path, model: str | PreTrainedConfig = SHORT, **settings: Any) -> Ways:
    """Of 32 positions that are learned, where nothing ends an answer."""
    plain = {"iterations": 2, "reasoning": "jacobi", "projection": True, "per_position": True}
    student = LatentReasoner.from_teacher(
        tiny_model(model),
        **{**plain, "latents": 4, "answer_prompt_ids": PROMPT, "eos_token_id": 63, "seed": 0}
        | settings,
    )
    student.decoder.lm_head.weight.data[63] = 0
    return saved(folder, student)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"output_scores": True}])
def test_an_answer_ends_at_the_last_position_that_was_learned(
    more: dict[str, Any], tmp_path: Path
) -> None:
    question = torch.arange(11, 31)[None]
    room = 32 - 20 - AROUND
    student, theirs = short_student(tmp_path / "student")
    for generate in (student.generate, theirs):
        for options in ({"max_new_tokens": 30}, {}):
            assert generate(question, **options, **more).shape == (1, 20 + room)
        assert generate(question, max_new_tokens=2, **more).shape == (1, 22)


def test_each_question_has_the_room_that_it_has_alone(tmp_path: Path) -> None:
    student, theirs = short_student(tmp_path / "student")
    questions = [list(range(11, 31)), [16, 17], [18, 19, 20, 21, 22]]
    for generate in (student.generate, theirs):
        found = generate(*pad(questions, "left"), max_new_tokens=30, return_dict_in_generate=True)
        for row, text in enumerate(questions):
            alone = generate(torch.tensor([text]), max_new_tokens=30)[0, len(text) :].tolist()
            room = 32 - AROUND - len(text)
            assert len(alone) == room == found.passes[row] - 2
            assert found.tokens[row].tolist() == alone + [63] * (23 - 2 - room)
        several = generate(
            *pad(questions, "left"), max_new_tokens=30, do_sample=True, num_return_sequences=2
        )
        assert several.shape == (6, 20 + 32 - AROUND - 2)


def test_a_stride_takes_the_room_of_an_answer(tmp_path: Path) -> None:
    student, _ = short_student(tmp_path / "student", stride=3)
    question = torch.arange(11, 21)[None]
    assert student.generate(question, max_new_tokens=30).shape == (1, 32 - 4 * 2 - AROUND)


def test_a_model_that_rotates_writes_on_past_its_context(tmp_path: Path) -> None:
    config = LlamaConfig(**{**COMMON, "max_position_embeddings": 32})
    student, theirs = short_student(tmp_path / "student", config)
    question = torch.arange(11, 31)[None]
    for generate in (student.generate, theirs):
        assert generate(question, max_new_tokens=30).shape == (1, 50)


def test_the_teachers_way_of_writing_is_not_the_students(tmp_path: Path) -> None:
    """An instruct model's generation_config may sample and punish repetition."""
    student = tiny_student("llama")
    expected = student.generate(*BATCH)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=1.5)
    student.decoder.generation_config = own
    assert torch.equal(student.generate(*BATCH), expected)
    student.save_pretrained(tmp_path)
    assert student.decoder.generation_config is own
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.do_sample is False


@pytest.mark.slow
def test_a_compiled_decoder_thinks_the_same_thoughts_and_is_compiled_for_all_lengths() -> None:
    graphs: list[None] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(None)
        return graph.forward

    student = tiny_student("llama", eos_token_id=-1).requires_grad_(False)
    longer = pad([[*QUESTIONS[0], 21, 22, 23], QUESTIONS[1]], "left")
    asked = ((BATCH, 6), (BATCH, 6), (longer, 9))
    expected = [student.generate(*question, max_new_tokens=n) for question, n in asked]
    for part in (student.decoder.base_model, student.decoder):
        part.forward = torch.compile(part.forward, dynamic=True, backend=backend)
    compiled = []
    for (question, n), tokens in zip(asked, expected, strict=True):
        assert torch.equal(student.generate(*question, max_new_tokens=n), tokens)
        compiled.append(len(graphs))
    assert compiled[0] == compiled[-1] > 0

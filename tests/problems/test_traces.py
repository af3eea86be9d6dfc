"""Tokenizers and traces: exact spans, and text that survives."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from kava_core.errors import KavaError
from kava_core.problems.prompt import ANSWER_PROMPT
from kava_core.problems.records import Problem
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder

PROBLEMS = Synthetic(style="prose").splits(300, 0, 0, seed=0).train
TEXTS = [text for p in PROBLEMS for text in (p.question + "\n", "".join(p.steps), ANSWER_PROMPT)]
TOKENIZER = train_tokenizer(TEXTS, 600)


def test_a_digit_is_a_token_of_its_own_with_the_space_before_it() -> None:
    assert TOKENIZER.tokenize("Ian has 1052 apples.") == [
        *TOKENIZER.tokenize("Ian"),
        "Ġhas",
        "Ġ1",
        *"052",
        "Ġapples",
        ".",
    ]
    for token in TOKENIZER.get_vocab():
        assert len(token.removeprefix("Ġ")) == 1 or not any(sign.isdigit() for sign in token)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_text_survives_the_trained_tokenizer(text: str) -> None:
    ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from kava_core.problems.sources.synthetic import Synthetic\n"
        "from kava_core.problems.tokenizer import train_tokenizer\n"
        "train = Synthetic().splits(200, 0, 0, seed=0).train\n"
        "train_tokenizer((p.question for p in train), 500).save_pretrained(sys.argv[1])"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
            check=True,
        )
    files = [(tmp_path / seed / "tokenizer.json").read_bytes() for seed in ("1", "2")]
    assert files[0] == files[1]


def test_a_saved_tokenizer_beside_a_model_loads_as_it_was(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        TOKENIZER.eos_token_id,
        TOKENIZER.pad_token_id,
    )


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(KavaError, match="at least 258 tokens"):
        train_tokenizer(TEXTS, 257)


def test_the_pieces_of_a_trace_are_its_texts() -> None:
    for traces, text in (("equations", "<<1+1=2>><<2*2=4>>"), ("sentences", "1 + 1 = 2\n2 * 2\n")):
        steps = tuple(text.splitlines()) if traces == "sentences" else (text[:9], text[9:])
        problem = Problem("p", "How many?", steps, "4", "hand", "sums")
        trace = TraceEncoder(TOKENIZER, traces).encode(problem)  # type: ignore[arg-type]
        assert TOKENIZER.decode(trace.question_ids) == "How many?\n"
        assert TOKENIZER.decode(trace.cot_ids) == text
        assert TOKENIZER.decode(trace.answer_prompt_ids) == ANSWER_PROMPT
        assert TOKENIZER.decode(trace.answer_prompt_ids[-1:]) == ":"
        assert TOKENIZER.decode(trace.answer_ids) == " 4" + TOKENIZER.eos_token
        assert (trace.id, trace.source, trace.topic, trace.n_steps, trace.answer) == (
            "p",
            "hand",
            "sums",
            2,
            "4",
        )


def test_many_problems_are_encoded_as_one_by_one() -> None:
    encoder = TraceEncoder(TOKENIZER)
    assert encoder.encode_all(PROBLEMS[:30]) == [encoder.encode(p) for p in PROBLEMS[:30]]
    assert encoder.encode_all([]) == []
    assert encoder.encode_questions([PROBLEMS[0].question]) == [
        encoder.encode(PROBLEMS[0]).question_ids
    ]


def with_bos(adds: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


def test_a_sequence_begins_with_bos_once_where_the_tokenizer_would_add_it() -> None:
    plain = TraceEncoder(TOKENIZER).encode(PROBLEMS[0])
    tokenizer = with_bos(adds=True)
    trace = TraceEncoder(tokenizer).encode(PROBLEMS[0])
    assert trace.question_ids == [tokenizer.bos_token_id, *plain.question_ids]
    assert (trace.cot_ids, trace.answer_ids) == (plain.cot_ids, plain.answer_ids)
    assert TraceEncoder(with_bos(adds=False)).encode(PROBLEMS[0]) == plain


def test_an_empty_trace_or_answer_is_an_error_that_names_the_problem() -> None:
    encoder = TraceEncoder(TOKENIZER)
    with pytest.raises(KavaError, match="synthetic-train-000000 has an empty trace"):
        encoder.encode(replace(PROBLEMS[0], steps=()))
    with pytest.raises(KavaError, match="synthetic-train-000000 has an empty answer"):
        encoder.encode(replace(PROBLEMS[0], answer=" "))


def test_a_text_that_holds_a_special_token_is_refused() -> None:
    poisoned = replace(PROBLEMS[0], question="How many? <|eos|>")
    with pytest.raises(KavaError, match=r"synthetic-train-000000.*special tokens.*eos"):
        TraceEncoder(TOKENIZER).encode(poisoned)


def test_a_tokenizer_that_cannot_end_an_answer_is_refused() -> None:
    backend = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    with pytest.raises(KavaError, match="end-of-sequence token"):
        TraceEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    words = {word: i for i, word in enumerate(["[UNK]", "[EOS]", "The", "answer", "is", ":"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]")
    with pytest.raises(KavaError, match=r"synthetic-train-000000.*special tokens"):
        TraceEncoder(lossy).encode(PROBLEMS[0])
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]")
    with pytest.raises(KavaError, match="synthetic-train-000000 does not survive"):
        TraceEncoder(silent).encode(PROBLEMS[0])

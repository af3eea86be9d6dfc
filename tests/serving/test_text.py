"""Pieces of text that no later token changes."""

from __future__ import annotations

import time
import tracemalloc
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kava_core.problems.tokenizer import train_tokenizer
from kava_core.serving.text import Text

TEXT = "9 cups of Möhren, 4 κ and 7 𝛌 make <<9+4=13>> and more"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["9 cups of cake and 4 make <<9+4=13>> and more"] * 3, 300)


def pieces(text: Text, written: str) -> list[str]:
    found = []
    for token in text.tokenizer.encode(written, add_special_tokens=False):
        found.append(text.add(token))
        if text.stopped:
            break
    return [*found, text.rest()]


def test_together_they_are_what_the_tokenizer_makes_of_all(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = Text(tokenizer)
    found = pieces(text, TEXT)
    assert "".join(found) == tokenizer.decode(text.ids) == TEXT
    assert "" in found  # a letter of several bytes waits for its last
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([">>"], "9 cups of Möhren, 4 κ and 7 𝛌 make <<9+4=13"),
        (["κ and"], "9 cups of Möhren, 4 "),
        (["nothing of it", "make", " m"], "9 cups of Möhren, 4 κ and 7 𝛌"),
        (["more!"], TEXT),
    ],
)
def test_nothing_is_handed_out_of_a_stop_or_behind_it(
    tokenizer: PreTrainedTokenizerBase, stops: list[str], expected: str
) -> None:
    text = Text(tokenizer, stops)
    assert "".join(pieces(text, TEXT)) == expected
    assert text.stopped == (expected != TEXT)


def test_a_long_stop_costs_no_more_than_what_is_written(tokenizer: PreTrainedTokenizerBase) -> None:
    text = Text(tokenizer, ["x" * 100_000])
    tracemalloc.start()
    try:
        assert "".join(pieces(text, "9 xx")) == "9 xx"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000  # it is never held again to be compared


# --- whatever the tokenizer -----------------------------------------------------------------------

WORDS = ["9 cups of cake and 4 make 13", "a  cake , and (more) ' s ."] * 3
ALPHABET = [" ", "κ", "\N{REPLACEMENT CHARACTER}", *"abcdefghijklmnopqrstuvwxyz0123456789,.'()"]


def made(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )
    assert found.decode(found.encode("a cake")).strip()
    return found


def sentencepiece(byte_fallback: bool) -> PreTrainedTokenizerBase:
    """As Llama-2's: words begin with their space, and letters it does not know are bytes."""
    alphabet = [x.replace(" ", "▁") for x in ALPHABET]
    trainer = trainers.BpeTrainer(
        vocab_size=120,
        special_tokens=["</s>", *(f"<0x{i:02X}>" for i in range(256) if byte_fallback)],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(WORDS, trainer)
    if not byte_fallback:
        trained.decoder = decoders.Metaspace()
        return made(trained)
    bytes_as_text = made(trained).get_vocab()
    tokenizer = Tokenizer(
        models.BPE(vocab=bytes_as_text, merges=[], byte_fallback=True, unk_token="</s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made(tokenizer)


def pieces_of_words() -> PreTrainedTokenizerBase:
    """As BERT's: what goes on with a word begins with ##."""
    tokenizer = Tokenizer(models.WordPiece({"</s>": 0}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.decoder = decoders.WordPiece()
    return made(tokenizer)


TOKENIZERS = {
    "bytes": train_tokenizer(WORDS, 300),
    "sentencepiece": sentencepiece(False),
    "sentencepiece with bytes": sentencepiece(True),
    "pieces of words": pieces_of_words(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_ids_give_the_text_of_all_up_to_the_first_stop(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = st.one_of(
        st.lists(st.integers(0, len(tokenizer) - 1), max_size=24),
        st.text(st.sampled_from([*"ab 9,.'", "κ", "𝛌"]), max_size=24).map(tokenizer.encode),
    )
    letters = st.text(st.sampled_from("ab 9,.'κ"), min_size=1, max_size=4)
    text = Text(tokenizer, data.draw(st.lists(letters, max_size=2)))
    found = ""
    for token in chain.from_iterable(data.draw(st.lists(ids, max_size=3))):
        found += text.add(token)
        if text.stopped:
            break
    found += text.rest()
    whole = tokenizer.decode(text.ids, skip_special_tokens=True)
    ends = [whole.find(stop) for stop in text.stops if stop in whole]
    assert found == whole[: min(ends, default=len(whole))]
    assert text.stopped == bool(ends)


def test_a_special_token_does_not_end_a_run_of_bytes() -> None:
    tokenizer = TOKENIZERS["sentencepiece with bytes"]
    ids = tokenizer.convert_tokens_to_ids(["<0x00>", "</s>", "<0x80>"])
    text = Text(tokenizer)
    found = "".join([*(text.add(token) for token in ids), text.rest()])
    assert found == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_long_answer_costs_what_its_tokens_do(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("9 cups of cake and 4 make 13", add_special_tokens=False)
    text = Text(tokenizer, ["never"])
    began = time.process_time()
    for number in range(8192):
        text.add(ids[number % len(ids)])
    assert time.process_time() - began < 2  # decoded anew for each token: more than six

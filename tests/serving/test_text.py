"""Pieces of text that no later token changes."""

from __future__ import annotations

import tracemalloc

import pytest
from transformers import PreTrainedTokenizerBase

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

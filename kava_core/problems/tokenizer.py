"""A byte-level BPE tokenizer for models trained from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kava_core.errors import KavaError

PAD, EOS = "<|pad|>", "<|eos|>"
_BYTES = 256

# The pieces that merges may not cross, first match first: an English contraction; a word with at
# most one character (usually the space) before it; one digit, with the space before it; a run of
# other signs with the space before and the line ends after it; line ends; other white space, of
# which the last is left to the word that follows. So does the Qwen2 tokenizer cut text, but for the
# space before a number: as a token of its own it would be a sixth of a short problem, and the first
# token of every answer would say nothing.
_PIECES = "|".join(
    (
        r"(?i:'(?:s|t|re|ve|m|ll|d))",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own.

    The vocabulary holds `<|pad|>`, `<|eos|>`, the 256 bytes (so that any text can be encoded) and
    the most frequent merges up to `vocab_size`, fewer if the texts hold no more. The same texts
    give the same files. KavaError if `vocab_size` leaves no room for the bytes.
    """
    specials = [PAD, EOS]
    if vocab_size < _BYTES + len(specials):
        raise KavaError(
            f"Expected a vocabulary of at least {_BYTES + len(specials)} tokens (the bytes and "
            f"{len(specials)} special tokens), found {vocab_size}. Raise `vocab_size`."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )

"""Tiny tokenizers with chat templates of the published kinds."""

from __future__ import annotations

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer

# As Qwen2.5's and SmolLM2's, with the message trimmed, as Llama-3's and Gemma's.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROBLEMS = Synthetic().splits(60, 0, 0, seed=0).train
TOKENIZER = train_tokenizer([p.question for p in PROBLEMS], 320)


def chat_tokenizer(
    template: str | None = CHATML, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """One that knows the words of synthetic problems; `<|im_start|>` has no name in it."""
    backend = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token="<|pad|>", chat_template=template
    )

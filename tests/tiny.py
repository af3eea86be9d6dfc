"""Tiny real models with random weights, one per architecture the product promises to handle."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import attention_implementation
from kava_core.record import Record

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {**COMMON, "head_dim": 8, "sliding_window": 48, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama-tied-scaled": LlamaConfig(
        **COMMON,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "mistral": MistralConfig(**COMMON, sliding_window=64),
    "gemma2": Gemma2Config(**GEMMA),
    "gemma3": Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
ARCHITECTURES = sorted(CONFIGS)


PROMPT = [5, 6, 7]
EOS = 2


def exact_dtype(name: str) -> torch.dtype:
    """float64, but for Gemma-2: its eager mask turns padding rows into NaN there."""
    return torch.float32 if name == "gemma2" else torch.float64


def tiny_model(
    name: str | PreTrainedConfig, dtype: torch.dtype | None = None, seed: int = 0
) -> PreTrainedModel:
    """A causal LM of the named architecture; weights large enough that attention is uneven."""
    torch.manual_seed(seed)
    config = CONFIGS[name] if isinstance(name, str) else name
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention_implementation(config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    if dtype is None:
        dtype = exact_dtype(name) if isinstance(name, str) else torch.float64
    for parameter in model.parameters():  # not the rotary frequencies, which stay float32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tiny_student(name: str, **settings: Any) -> LatentReasoner:
    """A student of the named architecture: 4 latents, 2 Jacobi iterations unless told."""
    return LatentReasoner.from_teacher(
        tiny_model(name),
        **{
            "latents": 4,
            "iterations": 2,
            "reasoning": "jacobi",
            "projection": True,
            "per_position": True,
            "answer_prompt_ids": PROMPT,
            "eos_token_id": EOS,
            "seed": 0,
            **settings,
        },
    ).eval()


def tiny_trace(name: str, question: int, cot: int, answer: int, seed: int = 0) -> Record:
    """A trace of random tokens with the given lengths, in steps of 3 of which the second token is
    the result; the answer's length includes its last token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(8, VOCABULARY, (n,), generator=generator).tolist()

    return Record(
        id=name,
        question_ids=ids(question),
        cot_ids=ids(cot),
        answer_prompt_ids=PROMPT,
        answer_ids=[*ids(answer - 1), EOS],
        source="tiny",
        topic="",
        n_steps=1,
        answer="",
        step_ends=[*range(3, cot, 3), cot],
        results=[*range(1, cot, 3)] or [0],
    )


def pad(rows: list[list[int]], side: str = "right", filler: int = 3) -> tuple[Tensor, Tensor]:
    """ids and mask [B, longest], padded with an ordinary token, which only the mask gives away."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), filler), torch.zeros(len(rows), longest).long()
    for i, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, span], mask[i, span] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for `tolerance` of the largest expected entry; nothing but finite numbers."""
    assert actual.shape == expected.shape
    assert bool(expected.isfinite().all())
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = max(float(expected.abs().max()), 1e-30)
    error = float((actual - expected).abs().max()) / scale
    assert error <= tolerance, f"{error:.1e} of the largest entry, allowed {tolerance:.0e}"

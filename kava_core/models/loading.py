"""Load, save and fingerprint causal language models and their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from kava_core.artefacts import file_digest, fingerprint
from kava_core.errors import KavaError

Model = TypeVar("Model", bound=nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_device(model: Model) -> Model:
    """The model on CUDA where there is one, on the CPU elsewhere, in evaluation mode."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def attention_implementation(config: PreTrainedConfig) -> str:
    """SDPA, or eager where the architecture caps its attention logits (SDPA cannot)."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def load_config(path: str) -> PreTrainedConfig:
    """The text configuration of a model folder or Hub id; KavaError if there is none."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise KavaError(f"no model configuration could be read from {path}: {error}") from None
    return config.get_text_config()


def cache_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Key/value heads H and head dimension D of a text configuration."""
    heads = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def load_model(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM from a folder or a Hub id, in evaluation mode, on the CPU.

    Remote code is never run: a model that needs it is refused by transformers and reported here.
    """
    config = load_config(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention_implementation(config)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise KavaError(f"no causal language model could be loaded from {path}: {error}") from None
    return model.eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; KavaError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise KavaError(f"no tokenizer could be loaded from {path}: {error}") from None
    if tokenizer.eos_token_id is None:
        raise KavaError(f"the tokenizer of {path} has no end-of-sequence token; answers need one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_llama(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    context_length: int,
    rope_theta: float,
    seed: int,
) -> LlamaForCausalLM:
    """A small Llama with tied embeddings and random weights that depend on `seed` alone."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=context_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Weights (safetensors), configuration and tokenizer, as Hugging Face users expect them."""
    model.save_pretrained(folder, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def model_fingerprint(path: str) -> str:
    """A hash of what the model computes: its weight files and its configuration.

    A Hub id is hashed by its resolved local files, so that the same weights have the same name
    wherever they came from.
    """
    folder = _local_folder(path)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise KavaError(f"{folder} holds no .safetensors weights. Save the model as safetensors.")
    config: dict[str, Any] = load_config(path).to_dict()
    # Where a model was loaded from and by which version says nothing about what it computes.
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    return fingerprint(
        {"weights": {w.name: file_digest(w) for w in weights}, "config": fingerprint(config)}
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary and the special ids: two tokenizers that encode alike agree."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return fingerprint(
        {
            "vocabulary": tokenizer.get_vocab(),
            "rules": backend.to_str() if backend is not None else type(tokenizer).__name__,
            "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        }
    )


def _local_folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError, HFValidationError) as error:
        raise KavaError(f"{path} is neither a folder nor a reachable Hub model: {error}") from None

"""Load, save and fingerprint causal language models and their tokenizers.

A model is named by a folder or a Hub id; `revision` is a branch, tag or commit of a Hub id, null
for its main branch. A folder has none: a revision of one is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
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
from kava_core.models.adapted import Base, adapters_fingerprint, adapters_in, put_on

Model = TypeVar("Model", bound=nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_device(model: Model) -> Model:
    """The model on CUDA where there is one, on the CPU elsewhere, in evaluation mode."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def attention_implementation(config: PreTrainedConfig) -> str:
    """SDPA, or eager where the architecture caps its attention logits (SDPA cannot)."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def load_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """The text configuration of a model folder or Hub id; KavaError if there is none."""
    _check_revision(path, revision)
    try:
        config = AutoConfig.from_pretrained(path, **_at(revision))
    except (OSError, ValueError, KeyError) as error:
        raise _not_found("model configuration", path, revision, error) from None
    return config.get_text_config()


def cache_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Key/value heads H and head dimension D of a text configuration."""
    heads = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def load_model(
    path: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    base: str | None = None,
) -> PreTrainedModel:
    """A causal LM from a folder or a Hub id, in evaluation mode, on the CPU.

    Remote code is never run: a model that needs it is refused by transformers and reported here.
    base: of a folder that holds adapters only, the model they belong on; None: where they say it
    is. KavaError if it is another one.
    """
    adapter = adapters_in(path)
    if adapter is not None:
        return _load_adapted(path, adapter, dtype, base)
    if base is not None:
        raise KavaError(f"{path} holds whole weights, not adapters on {base}. Leave the base out.")
    config = load_config(path, revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention_implementation(config),
            **_at(revision),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_found("causal language model", path, revision, error) from None
    return model.eval()


def _load_adapted(
    path: str, adapter: Path, dtype: torch.dtype, place: str | None
) -> PreTrainedModel:
    base = Base.read(adapter)
    place = place or base.place(Path(path))
    commit = None if Path(place).is_dir() else base.commit
    if commit is None and not Path(place).is_dir():
        raise KavaError(
            f"the adapters in {adapter} belong on the model {base.fingerprint}, expected in the "
            f"folder {place}, here or above them, and there is none. Put it there, or give it as "
            "their base."
        )
    base.check(adapter, place, model_fingerprint(place, commit))
    # As they were trained: adapters are added to float32 weights, then all is rounded.
    return put_on(load_model(place, revision=commit), adapter, dtype)


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; KavaError if there is none."""
    _check_revision(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_at(revision))
    except (OSError, ValueError, KeyError) as error:
        raise _not_found("tokenizer", path, revision, error) from None
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
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    weights: bool = True,
) -> None:
    """Weights (safetensors), configuration and tokenizer, as Hugging Face users expect them.

    weights: False for a model that is kept as adapters, which lie in the folder already.
    """
    if weights:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def model_fingerprint(path: str, revision: str | None = None) -> str:
    """A hash of what the model computes: its weight files and its configuration.

    A Hub id is hashed by its resolved local files, so that the same weights have the same name
    wherever they came from.
    """
    folder = _local_folder(path, revision)
    adapter = adapters_in(str(folder))
    held: dict[str, Any]
    if adapter is not None:
        held = adapters_fingerprint(adapter)
    elif files := sorted(folder.glob("*.safetensors")):
        held = {file.name: file_digest(file) for file in files}
    else:
        raise KavaError(f"{folder} holds no .safetensors weights. Save the model as safetensors.")
    config: dict[str, Any] = load_config(path, revision).to_dict()
    # Where a model was loaded from and by which version says nothing about what it computes.
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    return fingerprint({"weights": held, "config": fingerprint(config)})


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit that a Hub id stands for, by which its files are kept; None for a folder."""
    folder = _local_folder(path, revision)
    return folder.name if folder.parent.name == "snapshots" and str(folder) != path else None


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


def _local_folder(path: str, revision: str | None) -> Path:
    _check_revision(path, revision)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(
            snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"])
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise _not_found("model", path, revision, error) from None


def _at(revision: str | None) -> dict[str, Any]:
    """The keywords of transformers' loaders that name a revision."""
    return {} if revision is None else {"revision": revision}


def _check_revision(path: str, revision: str | None) -> None:
    if revision is not None and Path(path).is_dir():
        raise KavaError(
            f"{path} is a folder, which has no revision {revision!r}. Take `revision` out, or name "
            "a model of the Hub."
        )


def _not_found(what: str, path: str, revision: str | None, error: Exception) -> KavaError:
    at = "" if revision is None else f" at revision {revision}"
    why = str(error).strip().splitlines()[0].rstrip(".")
    if Path(path).is_dir():
        return KavaError(f"no {what} could be loaded from {path}: {why}.")
    return KavaError(
        f"no {what} could be loaded from {path}{at}: {why}. Expected a folder, or a Hub id that is "
        f"in this machine's cache or can be reached: without a network, run `hf download {path}` "
        "where there is one, and set `model` to the folder."
    )

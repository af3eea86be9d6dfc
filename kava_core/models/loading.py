"""Load, save and fingerprint causal language models and their tokenizers.

A model is named by a folder or a Hub id; `revision` is a branch, tag or commit of a Hub id, null
for its main branch. A folder has none: a revision of one is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from kava_core.artefacts import file_digest, fingerprint
from kava_core.errors import KavaError
from kava_core.models.adapted import (
    ADAPTER,
    CONFIG,
    Base,
    adapters_fingerprint,
    adapters_in,
    is_folder,
    put_on,
)
from kava_core.models.context import no_decoder
from kava_core.models.inspection import at_hand, check_size, look_at, weight_files
from kava_core.models.sharding import joined_digest
from kava_core.wording import LONGEST_MESSAGE, shorten

Model = TypeVar("Model", bound=nn.Module)
LONGEST_ID = 96  # the Hub's own limit
NAMED = 4  # names in a message before "and n more"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_device(model: Model) -> Model:
    """The model on CUDA where there is one, on the CPU elsewhere, in evaluation mode."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def attention_implementation(config: PreTrainedConfig) -> str:
    """SDPA, or eager where the architecture has none or caps its attention logits (SDPA cannot)."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped or not getattr(model_class, "_supports_sdpa", True) else "sdpa"


def whole_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model folder or Hub id, that of its text part among others; KavaError
    if there is none, or it is code."""
    _check_revision(path, revision)
    look_at("model configuration", path, revision)
    try:
        plain, _ = PreTrainedConfig.get_config_dict(path, **_at(revision))
        if plain.get("auto_map") and plain.get("model_type") not in CONFIG_MAPPING:
            raise _code("model", path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **_at(revision))
        config.get_text_config()  # an error where there are several
    except KavaError:
        raise
    except Exception as error:  # whatever a foreign folder makes transformers stumble over
        raise _not_found("model configuration", path, revision, error) from None
    return config


def load_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """The text configuration of a model folder or Hub id; KavaError if there is none."""
    return whole_config(path, revision).get_text_config()


def cache_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Key/value heads H and head dimension D of a text configuration; KavaError where they vary
    from layer to layer."""
    try:
        heads = config.num_attention_heads
        return (
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
    except RuntimeError:  # transformers', for an attribute that layers do not share
        raise KavaError(
            f"the layers of {config.model_type} differ in the number or size of their heads: a "
            "store holds keys and values of one size in all layers. Choose another model."
        ) from None
    except AttributeError:
        raise no_decoder(config) from None


def load_model(
    path: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    base: str | None = None,
) -> PreTrainedModel:
    """A causal LM from a folder or a Hub id, in evaluation mode, on the CPU.

    Whole or not at all (see `load_whole`). Of a model of text and images it is the text model alone
    (see `text_model`). No code of the folder is run and no pickle is read. base: of one that is
    kept as adapters, the model they belong on; None: where they say it is. KavaError if it is
    another one.
    """
    adapter = _adapters_of(path, revision)
    if adapter is not None:
        return _load_adapted(adapter, dtype, base)
    if base is not None:
        raise KavaError(f"{path} holds whole weights, not adapters on {base}. Leave the base out.")
    config = whole_config(path, revision)
    model: PreTrainedModel = load_whole(
        AutoModelForCausalLM,
        path,
        revision,
        config=config,
        dtype=dtype,
        attn_implementation=attention_implementation(config),
    )
    return text_model(model.eval())


def load_whole(
    model_class: Any, path: str | Path, revision: str | None = None, **options: Any
) -> Any:
    """`model_class.from_pretrained(path, **options)`, on condition that files and model agree.

    model_class: a `PreTrainedModel` or one of transformers' `Auto…` classes. KavaError that names
    tensors of the model that no file holds (transformers would fill them with random numbers),
    tensors of the files that the model has no place for, and those of other shapes; for a folder
    without safetensors, or one whose code would have to be run. Weights that are tied to others
    need not be in a file.
    """
    path = str(path)
    _check_revision(path, revision)
    if Path(path).is_dir():
        _check_folder(Path(path))
    config = options.get("config") or whole_config(path, revision)
    if (folder := at_hand(path, revision)) is not None:
        check_size(config, folder)
    try:
        model, found = model_class.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            use_safetensors=True,
            trust_remote_code=False,
            **options,
            **_at(revision),
        )
    except Exception as error:  # whatever a foreign folder makes transformers stumble over
        raise _not_found("model", path, revision, error) from None
    _refuse_difference(path, found)
    return model


def on_disk(path: str, revision: str | None = None) -> bool:
    """Whether weights of a model lie on this machine, in a folder or in the cache of the Hub."""
    try:
        folder = _local_folder(path, revision, local_files_only=True)
    except KavaError:
        return False
    return Path(path).is_dir() or any(folder.glob("*.safetensors"))


def check_weights(path: str, revision: str | None = None) -> None:
    """The KavaErrors of `load_model` about tensors, by the headers of the files alone.

    path: a folder, or a Hub id whose weights are in this machine's cache.
    """
    config = whole_config(path, revision)
    folder = Path(path)
    if not folder.is_dir():
        folder = _local_folder(path, revision, local_files_only=True)
    _check_folder(folder)
    check_size(config, folder)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    own = model_class.config_class is type(config)
    try:
        held = {
            name: torch.empty(file.get_slice(name).get_shape(), device="meta")
            for shard in weight_files(folder)
            for file in (safe_open(shard, "pt"),)
            for name in file.keys()  # noqa: SIM118  (no mapping)
        }
        _, found = model_class.from_pretrained(
            None,
            config=config if own else config.get_text_config(),
            state_dict=held,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever foreign files make transformers stumble over
        raise _not_found("model", path, revision, error) from None
    _refuse_difference(path, found)


def _refuse_difference(path: str, found: dict[str, Any]) -> None:
    """KavaError unless transformers' loading info says that files and model agree."""
    shapes = {
        f"{name} ({list(held)} for {list(wanted)})"
        for name, held, wanted in found["mismatched_keys"]
    }
    wrong = [
        f"{len(names)} {what}, {_named(names)}"
        for what, names in (
            ("that the model has are in no file", found["missing_keys"]),
            ("of the files have no place in the model", found["unexpected_keys"]),
            ("have another shape", shapes),
        )
        if names
    ]
    if wrong:
        raise KavaError(
            f"{path} does not hold the whole model and nothing else: of the tensors, "
            f"{shorten('; '.join(wrong), LONGEST_MESSAGE)}. Download or save the model again."
        )


@torch.no_grad()
def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM in a model of text and other things; `model` itself where it is one.

    It shares its weights with `model`, and is saved and loaded as a model of text alone. KavaError
    if transformers has no causal LM of the text configuration, or it computes something else.
    """
    config, text = model.config, model.config.get_text_config()
    if text is config:
        return model
    inner = getattr(model.base_model, "language_model", None)
    head = model.get_output_embeddings()
    text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    refused = KavaError(
        f"{config.model_type} reads more than text, and its text part ({text.model_type}) is no "
        "causal language model to transformers that gives the same alone. Choose a model of text."
    )
    if inner is None or head is None or text_class is None:
        raise refused
    text.tie_word_embeddings = config.tie_word_embeddings
    with torch.device("meta"):
        alone: PreTrainedModel = text_class(text)
    setattr(alone, alone.base_model_prefix, inner)
    alone.set_output_embeddings(head)
    alone.eval()
    ids = torch.arange(1, 5, device=model.device)[None]
    try:
        same = torch.equal(alone(ids).logits, model(ids).logits)
    except Exception:  # of a model that does not read ids alone
        same = False
    if not same:
        raise refused
    return alone


def _adapters_of(path: str, revision: str | None) -> Path | None:
    """`adapters_in` a folder or a Hub id, of which all is fetched where it has adapters."""
    if is_folder(path):
        return adapters_in(path)
    try:
        cached_file(path, f"{ADAPTER}/{CONFIG}", **_at(revision))
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with the name
    folder = str(_local_folder(path, revision))
    look_at("model", folder)
    return adapters_in(folder)


def _load_adapted(adapter: Path, dtype: torch.dtype, place: str | None) -> PreTrainedModel:
    base = Base.read(adapter)
    place = place or base.place(adapter.parent)
    commit = None if is_folder(place) else base.commit
    if not is_folder(place) and (commit is None or len(place) > LONGEST_ID):
        raise KavaError(
            f"the adapters in {adapter} belong on the model {base.fingerprint}, expected in the "
            f"folder {shorten(place, 200)}, here or above them, and there is none. Put it there, "
            "or give it as their base (--base)."
        )
    base.check(adapter, place, model_fingerprint(place, commit))
    # As they were trained: adapters are added to float32 weights, then all is rounded.
    return put_on(load_model(place, revision=commit), adapter, dtype)


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; KavaError if there is none, or only as code."""
    _check_revision(path, revision)
    look_at("tokenizer", path, revision)
    try:
        settings = get_tokenizer_config(path, **_at(revision))
        code = settings.get("auto_map")
        if code.get("AutoTokenizer") if isinstance(code, dict) else code:
            raise _code("tokenizer", path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **_at(revision))
    except KavaError:
        raise
    except Exception as error:  # whatever a foreign folder makes transformers stumble over
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

    A Hub id is hashed by its resolved local files, and weights in several files as if they were in
    one, so that the same weights have the same name wherever they came from.
    """
    folder = _local_folder(path, revision)
    adapter = adapters_in(str(folder))
    held: dict[str, Any]
    if adapter is not None:
        held = adapters_fingerprint(adapter)
    else:
        _check_folder(folder)
        files = sorted(folder.glob("*.safetensors"))
        whole = folder / "model.safetensors"
        if not whole.exists() and (folder / "model.safetensors.index.json").exists():
            held = {whole.name: joined_digest(files)}
        else:
            held = {file.name: file_digest(file) for file in files}
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


def _local_folder(path: str, revision: str | None, local_files_only: bool = False) -> Path:
    _check_revision(path, revision)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json"],
                local_files_only=local_files_only,
            )
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


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise KavaError(
            f"{folder} holds an adapter (adapter_config.json), expected a whole model. Merge it "
            "into its model and save that."
        )
    look_at("model", str(folder))
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(
        file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind)
    )
    found = f"only {_named(pickles)}, which can run code when read" if pickles else "none"
    raise KavaError(
        f"expected weights as .safetensors in {folder}, found {found}. Save the model as "
        "safetensors."
    )


def _code(what: str, path: str) -> KavaError:
    return KavaError(
        f"the {what} of {path} is code of its own (auto_map), and code of a model's folder is "
        f"never run. Choose a model whose {what} transformers knows."
    )


def _named(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - NAMED
    return ", ".join(ordered[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _not_found(what: str, path: str, revision: str | None, error: Exception) -> KavaError:
    at = "" if revision is None else f" at revision {revision}"
    why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    why = shorten(why, LONGEST_MESSAGE // 2)
    if Path(path).is_dir():
        return KavaError(f"no {what} could be loaded from {path}: {why}.")
    if isinstance(error, HFValidationError) or isinstance(error.__cause__, HFValidationError):
        return KavaError(
            f"no {what} could be loaded from {path}: it is no folder here, and no Hub id, which "
            "would be of the form NAME or OWNER/NAME. Check the path, or make the folder first."
        )
    held = _cached_revisions(path)
    if revision is not None and held:
        return KavaError(
            f"no {what} could be loaded from {path}{at}: {why}. This machine's cache holds "
            f"{_named(held)} of it. Name a branch, tag or commit that the model has, and without "
            f"a network, run `hf download {path} --revision {revision}` where there is one."
        )
    asked = path if revision is None else f"{path} --revision {revision}"
    return KavaError(
        f"no {what} could be loaded from {path}{at}: {why}. Expected a folder, or a Hub id that is "
        f"in this machine's cache or can be reached: without a network, run `hf download {asked}` "
        "where there is one, and set `model` to the folder."
    )


def _cached_revisions(name: str) -> list[str]:
    """The branches and tags of a Hub model that this machine's cache knows."""
    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs"
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())

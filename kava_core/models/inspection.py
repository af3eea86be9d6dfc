"""A model's folder is looked at before transformers reads it. Folders come from strangers, and what
reads them waits for a pipe, fills memory with a file that has no end, or makes a model of the size
that the configuration asks for before it sees that the weights have another.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig

from kava_core.artefacts import parse_json, read_json, read_regular
from kava_core.errors import KavaError
from kava_core.models.sharding import read_header, values_at_most
from kava_core.wording import shown

# Read whole, by their endings.
TEXTS = (".json", ".jinja", ".txt", ".model")
# JSON objects beside those that transformers and PEFT call …config.json.
OBJECTS = ("latents.json", "student.json", "teacher.json", "base.json")
# Bytes and values that are read of an object, of an index, and of the rest, such as a tokenizer;
# those of today have half as many.
OF_OBJECT, OF_INDEX, OF_REST = (1 << 22, 1 << 18), (1 << 26, 1 << 20), (1 << 26, 1 << 22)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "Download or save the model again."
# Weights of 4 bits hold eight numbers in one of 32, and some architectures share layers.
AT_MOST = 16


def look_at(what: str, path: str, revision: str | None = None) -> None:
    """KavaError if a folder, or what this machine's cache has of a Hub id, holds what should not be
    read. To be called before transformers reads it."""
    folder = at_hand(path, revision)
    try:
        if folder is not None:
            check_files(folder, whole=Path(path).is_dir())
    except KavaError as error:
        raise KavaError(f"no {what} could be loaded from {path}: {error}") from None


def at_hand(path: str, revision: str | None) -> Path | None:
    """The folder itself, or what this machine's cache has, whole or not, of a Hub id."""
    if Path(path).is_dir():
        return Path(path)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        try:
            found = try_to_load_from_cache(path, name, revision=revision)
        except (OSError, ValueError, HFValidationError):
            return None  # whoever loads it says what is wrong with the name
        if isinstance(found, str):
            return Path(found).parent
    return None


def check_files(folder: Path, *, whole: bool = True) -> None:
    """KavaError unless all that would be read is a file, texts are of a size that such texts have,
    settings are JSON objects, weights begin as safetensors do and are as long as they say, and an
    index of weights names files beside it; whole: which are there."""
    for file in sorted(folder.iterdir()):
        if not file.name.endswith((*TEXTS, ".safetensors")):
            continue
        try:
            found = file.stat()
        except OSError as error:
            raise KavaError(f"{file} cannot be read ({error.strerror}). {AGAIN}") from None
        if not stat.S_ISREG(found.st_mode):
            raise KavaError(
                f"{file} cannot be read: expected a file, found a folder, a pipe or a device. "
                f"{AGAIN}"
            )
        if file.name.endswith(".safetensors"):
            read_header(file)
            continue
        is_object = file.name.endswith("config.json") or file.name in OBJECTS
        largest, most = OF_OBJECT if is_object else OF_INDEX if file.name == INDEX else OF_REST
        if found.st_size > largest:
            raise KavaError(
                f"{file} cannot be read: expected at most {largest:,} bytes, found "
                f"{found.st_size:,}. {AGAIN}"
            )
        if file.suffix != ".json":
            continue
        text = read_regular(file, largest)
        if (values := values_at_most(text)) > most:
            raise KavaError(
                f"{file} cannot be read: expected at most {most:,} values, found about {values:,}. "
                f"{AGAIN}"
            )
        if is_object and not isinstance(parse_json(text, str(file)), dict):
            raise KavaError(f"{file} is no configuration: expected a JSON object. {AGAIN}")
        if file.name == INDEX and not (folder / WEIGHTS).exists():  # else nobody reads it
            _check_index(file, parse_json(text, str(file)), whole)


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers reads."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def check_size(config: PreTrainedConfig, folder: Path) -> None:
    """KavaError if the configuration asks for far more numbers than the weights have.

    It would be built, and filled at random, before the difference is found. Less far is left to
    those who compare the tensors one by one.
    """
    files = weight_files(folder)
    if not all(file.is_file() for file in files):
        return  # transformers says which it looks for
    shapes = [about["shape"] for file in files for about in read_header(file)[1].values()]
    held = sum(math.prod(shape) for shape in shapes)
    text: Any = config.get_text_config()
    layers, hidden, vocabulary, inner = (
        _number(text, name)
        for name in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size")
    )
    heads = _number(text, "num_attention_heads") * _number(text, "head_dim")
    wanted = hidden * (vocabulary + layers * (hidden + inner + heads))
    if layers > AT_MOST * len(shapes) or wanted > AT_MOST * held:
        raise KavaError(
            f"{folder} does not hold the model of its config.json: {_count(layers)} layers of "
            f"width {_count(hidden)} and {_count(vocabulary)} tokens would take {_count(wanted)} "
            f"numbers and more, and the weights have {_count(held)} in {len(shapes):,} tensors. "
            f"{AGAIN}"
        )


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**15 else "over 10^15"


def _number(config: Any, name: str) -> int:
    """0 where the architecture has none of that name."""
    value = getattr(config, name, 0)
    return value if isinstance(value, int) else 0


def _check_index(file: Path, content: Any, whole: bool) -> None:
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise KavaError(f"{file} names no files of weights (weight_map). {AGAIN}")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise KavaError(
                f"{file} names {shown(name)}, expected the name of a file beside it. {AGAIN}"
            )
        if whole and not (file.parent / name).is_file():
            raise KavaError(f"{file} names {shown(name)}, and there is no such file. {AGAIN}")

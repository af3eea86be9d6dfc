"""A hostile folder of a teacher or student: one sentence at little cost, whatever it holds."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, load_tokenizer, model_fingerprint
from tests.faults.conftest import Tell
from tests.faults.weigh import cost_of
from tests.golden.inputs import NAME, make_inputs
from tests.models.hub import asked, repository_in

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
COMMIT = "c" * 40
GIGABYTES = 20 << 30
SECONDS, MEGABYTES, CHARACTERS = 2.0, 300.0, 700

Damage = Callable[[Path], Any]


def instead(name: str, make: Callable[[Path], Any]) -> Damage:
    """Something else in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def changed(name: str, **values: Any) -> Damage:
    """Other values in a file of JSON."""

    def damage(folder: Path) -> None:
        plain = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**plain, **values}), encoding="utf-8")

    return damage


def half(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def sparse(file: Path) -> None:
    file.touch()
    os.truncate(file, GIGABYTES)


def header(length: int, content: bytes) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content)


def pieces(weight_map: Any) -> Damage:
    """Weights in pieces, by an index that names any."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return damage


DEEP = "[" * 200_000
SHAPES = ["", "[]", "null", "3", '"x"', "{", DEEP, f'{{"a": {"1" * 5000}}}']
HOSTILE: dict[str, Damage] = {
    **{f"{name} is {content[:9]!r}": text(name, content)
       for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG) for content in SHAPES},
    **{f"half of {name}": half(name) for name in (CONFIG, TOKENIZER, WEIGHTS)},
    **{f"a pipe for {name}": instead(name, os.mkfifo)
       for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS)},
    **{f"20 GB of {name}": instead(name, sparse)
       for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS)},
    **{f"a folder for {name}": instead(name, Path.mkdir)
       for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS)},
    "a million layers": changed(CONFIG, num_hidden_layers=10**6),
    "a vocabulary of 10^12": changed(CONFIG, vocab_size=10**12),
    "a hidden size of 10^30": changed(CONFIG, hidden_size=10**30),
    "negative heads": changed(CONFIG, num_attention_heads=-4),
    "no heads": changed(CONFIG, num_attention_heads=0),
    "an architecture that is none": changed(CONFIG, model_type="../../etc", architectures=["x"]),
    "a dtype that is none": changed(CONFIG, dtype="os.system"),
    "layer types that are numbers": changed(CONFIG, layer_types=[1, 2]),
    "a header of 2^60 bytes": header(1 << 60, b""),
    "a header of 90 MB of brackets": header(90_000_000, b"[" * 1000),
    "a header that is no JSON": header(4, b"nope"),
    "no weights": header(2, b"{}"),
    "weights of another name": lambda folder: (folder / WEIGHTS).rename(folder / "x.safetensors"),
    "an index that leads out": pieces({"lm_head.weight": "../../../etc/passwd"}),
    "an index of a list": pieces([1]),
    "an index of nothing": pieces({}),
    "a tokenizer of other things": changed(TOKENIZER, model={"type": "BPE", "vocab": 3}),
    "a tokenizer without a model": changed(TOKENIZER, model=None),
    "an end that is a list": changed(TOKENIZER_CONFIG, eos_token=[1]),
}  # fmt: skip


def load_teacher(folder: Path) -> None:
    model_fingerprint(str(folder))
    load_tokenizer(str(folder))
    load_model(str(folder))


def load_student(folder: Path) -> None:
    load_tokenizer(str(folder))
    LatentReasoner.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable[[Path], None], Path]:
    """Whole folders, by what reads them; not to be changed."""
    data = make_inputs(tmp_path_factory.mktemp("models")) / "data" / NAME
    return {load_teacher: data / "teacher", load_student: data / "students" / "kava"}


@pytest.mark.parametrize("load", [load_teacher, load_student], ids=["teacher", "student"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_one_sentence_at_little_cost(
    models: dict[Callable[[Path], None], Path], load: Callable[[Path], None], kind: str,
    tmp_path: Path, tell: Tell,
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(models[load], folder)
    HOSTILE[kind](folder)
    cost = cost_of(load, folder)
    assert cost.message is not None and "Traceback" not in cost.message
    assert str(folder) in cost.message and len(cost.message) < CHARACTERS, cost.message
    assert cost.seconds < SECONDS and cost.megabytes < MEGABYTES, cost
    who = load.__name__.removeprefix("load_")
    tell(f"a crafted folder of a {who}", "a kind of configuration, tokenizer, weights",
         "a sentence, under two seconds and 300 MB")  # fmt: skip


CACHED = (
    "20 GB of config.json", "20 GB of tokenizer_config.json", "a pipe for tokenizer.json",
    "a pipe for model.safetensors", f"{CONFIG} is {DEEP[:9]!r}", "a million layers",
    "a vocabulary of 10^12", "a header of 2^60 bytes", "an index that leads out",
)  # fmt: skip


def test_what_came_from_the_hub_is_looked_at_as_well(
    models: dict[Callable[[Path], None], Path], tmp_path: Path, tell: Tell
) -> None:
    names = {f"kind-{number}": kind for number, kind in enumerate(CACHED)}
    for name, kind in names.items():
        repository = repository_in(tmp_path, name)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        shutil.copytree(models[load_teacher], repository / "snapshots" / COMMIT)
        HOSTILE[kind](repository / "snapshots" / COMMIT)
    began = time.monotonic()
    found = asked(tmp_path, *(f"team/{name}" for name in names))
    assert time.monotonic() - began < 10 + SECONDS * len(names)
    for name, told in zip(names, found, strict=True):
        said = told["error"]
        assert "\n" not in said and len(said) < CHARACTERS and name in said, said
        tell("a crafted model in the Hub's cache", "a kind of configuration, tokenizer, weights",
             "a sentence, under two seconds")  # fmt: skip


def test_whole_folders_are_read(models: dict[Callable[[Path], None], Path]) -> None:
    for load, folder in models.items():
        assert cost_of(load, folder).message is None

"""A hostile folder of a teacher or student: one sentence at little cost, whatever it holds."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kava_core.distill.adapters import add_lora, save_adapters
from kava_core.errors import KavaError
from kava_core.models.adapted import Base
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, load_tokenizer, model_fingerprint
from kava_core.models.students import open_student
from kava_core.settings import LoRA
from tests.faults.conftest import Tell
from tests.faults.test_hostile_stores import instead, mutated, sparse
from tests.faults.weigh import cost_of
from tests.golden.inputs import NAME, make_inputs
from tests.models.hub import asked, repository_in

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
LATENTS, LATENT_WEIGHTS, STUDENT = "latents.json", "latents.safetensors", "student.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
BASE = "adapter/base.json"
COMMIT = "c" * 40
SECONDS, MEGABYTES, CHARACTERS = 2.0, 300.0, 700

Damage = Callable[[Path], Any]


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


def header(length: int, content: bytes) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content)


def listed(name: str, bytes_: int, entry: str) -> Damage:
    """So many bytes of one entry again and again, in a file's list."""

    def damage(folder: Path) -> None:
        plain = (folder / name).read_text(encoding="utf-8").rstrip().removesuffix("}")
        entries = ",".join([entry] * (bytes_ // (len(entry) + 1)))
        (folder / name).write_text(f'{plain}, "more": [{entries}]}}', encoding="utf-8")

    return damage


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
    "a vocabulary of 10^4000": changed(CONFIG, vocab_size=10**4000),
    "a vocabulary and a width of 10^4000": changed(
        CONFIG, vocab_size=10**4000, hidden_size=10**4000
    ),
    "layers and a width of 10^4000": changed(
        CONFIG, num_hidden_layers=10**4000, hidden_size=10**4000
    ),
    "an architecture of a megabyte": changed(CONFIG, model_type="x" * 1_000_000),
    **{f"45 MB of lists in {name}": listed(name, 45_000_000, "[]")
       for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG)},
    "4 MB of lists in config.json": listed(CONFIG, 4_000_000, "[]"),
    "4 MB of names in config.json": listed(CONFIG, 4_000_000, '"ab"'),
    "30 MB of lists in tokenizer.json": listed(TOKENIZER, 30_000_000, "[]"),
    "heads of a million numbers": changed(CONFIG, head_dim=10**6),
    "negative heads": changed(CONFIG, num_attention_heads=-4),
    "no heads": changed(CONFIG, num_attention_heads=0),
    "an architecture that is none": changed(CONFIG, model_type="../../etc", architectures=["x"]),
    "a dtype that is none": changed(CONFIG, dtype="os.system"),
    "layer types that are numbers": changed(CONFIG, layer_types=[1, 2]),
    "a header of 2^60 bytes": header(1 << 60, b""),
    "a header of 90 MB of brackets": header(90_000_000, b"[" * 1000),
    "a header of 90 MB": header(90_000_000, b"[" + b"[]," * 30_000_000),
    "a header of 16 MB of lists": header(16_000_000, b"[" + b"[]," * 5_400_000),
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
# Of a student that is opened at once.
OF_LATENTS: dict[str, Damage] = {
    **{f"{name} is {content[:9]!r}": text(name, content)
       for name in (LATENTS, STUDENT) for content in SHAPES},
    **{f"{what} for {name}": instead(name, make)
       for name in (LATENTS, LATENT_WEIGHTS, STUDENT)
       for what, make in (("a pipe", os.mkfifo), ("20 GB", sparse), ("a folder", Path.mkdir))},
    **{f"{name} of {value:.0e}": changed(LATENTS, **{name: int(value)})
       for name in ("latents", "projection_size") for value in (3e7, 1e30)},
    "latents of 10^4000": changed(LATENTS, latents=10**4000),
    "a way to reason of a megabyte": changed(LATENTS, reasoning="x" * 1_000_000),
    "a format of a megabyte": changed(LATENTS, format_version="x" * 1_000_000),
    "a setting called by a megabyte": changed(LATENTS, **{"x" * 1_000_000: 1}),
    "an answer prompt of 10^30": changed(LATENTS, answer_prompt_ids=[10**30]),
    "an answer prompt of no token": changed(LATENTS, answer_prompt_ids=[10**9]),
    "an answer prompt of a megabyte": changed(LATENTS, answer_prompt_ids=["x" * 1_000_000]),
    "half of latents.safetensors": half(LATENT_WEIGHTS),
    "nothing but a configuration that is a list": lambda folder: [
        (folder / LATENTS).unlink(), text(CONFIG, "[]")(folder)],
    "no latents and an architecture of a megabyte": lambda folder: [
        (folder / LATENTS).unlink(), changed(CONFIG, model_type="x" * 1_000_000)(folder)],
}  # fmt: skip
# Of one that is kept as adapters.
OF_ADAPTERS: dict[str, Damage] = {
    **{f"{name} is {content[:9]!r}": text(name, content)
       for name in (ADAPTER, BASE) for content in SHAPES},
    **{f"{what} for {name}": instead(name, make)
       for name in (ADAPTER, ADAPTER_WEIGHTS, BASE)
       for what, make in (("a pipe", os.mkfifo), ("20 GB", sparse), ("a folder", Path.mkdir))},
    **{f"no {name}": lambda folder, name=name: (folder / name).unlink()
       for name in (ADAPTER, ADAPTER_WEIGHTS, BASE)},
    "half of the adapters": half(ADAPTER_WEIGHTS),
    "a rank of 10^8": changed(ADAPTER, r=10**8),
    "another kind of adapters": changed(ADAPTER, peft_type="PROMPT_TUNING"),
    "a kind of a megabyte": changed(ADAPTER, peft_type="x" * 1_000_000),
    "layers again and again": changed(ADAPTER, layer_replication=[[0, 10**7]]),
    "modules by any expression": changed(ADAPTER, target_modules="(.+)+x"),
    "ranks by any expression": changed(ADAPTER, rank_pattern={"(.+)+x": 3}),
    "an import": changed(ADAPTER, megatron_config={"a": 1}, megatron_core="this"),
    "a base of a megabyte": changed(BASE, model="x" * 1_000_000),
    "a base of 900 letters": changed(BASE, model="x" * 900),
    "a base of 900 letters of the Hub": changed(BASE, model="x" * 900, commit="c" * 40),
    "a base that is none": changed(BASE, model="../nowhere"),
    "another base": changed(BASE, fingerprint="0" * 64),
    "a fingerprint of a megabyte": changed(BASE, fingerprint="x" * 1_000_000),
}  # fmt: skip


def load_teacher(folder: Path) -> None:
    model_fingerprint(str(folder))
    load_tokenizer(str(folder))
    load_model(str(folder))


def load_student(folder: Path) -> None:
    load_tokenizer(str(folder))
    LatentReasoner.from_pretrained(str(folder))


def open_alone(folder: Path) -> None:
    open_student(folder)


def open_adapted(folder: Path) -> None:
    model_fingerprint(str(folder))
    open_student(folder)


Models = dict[Callable[[Path], None], Path]
CORPUS: dict[Callable[[Path], None], dict[str, Damage]] = {
    load_teacher: HOSTILE,
    load_student: HOSTILE,
    open_alone: OF_LATENTS,
    open_adapted: OF_ADAPTERS,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Whole folders, by what reads them; not to be changed."""
    data = make_inputs(tmp_path_factory.mktemp("models")) / "data" / NAME
    teacher, student, adapted = data / "teacher", data / "students" / "kava", data / "adapted"
    shutil.copytree(student, adapted)
    (adapted / WEIGHTS).unlink()
    lora = LoRA(rank=2, alpha=4, targets=("q_proj",))
    adapters = add_lora(load_model(str(teacher)), lora, seed=0, path="")
    base = Base(model=str(teacher), commit=None, fingerprint=model_fingerprint(str(teacher)))
    save_adapters(adapted / "adapter", adapters, base)
    return {
        load_teacher: teacher, load_student: student, open_alone: student, open_adapted: adapted
    }  # fmt: skip


@pytest.mark.parametrize(
    ("load", "kind"), [(load, kind) for load, kinds in CORPUS.items() for kind in kinds]
)
def test_one_sentence_at_little_cost(
    models: Models, load: Callable[[Path], None], kind: str, tmp_path: Path, tell: Tell
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[load], folder)
    CORPUS[load][kind](folder)
    cost = cost_of(load, folder)
    assert cost.message is not None and "Traceback" not in cost.message
    assert str(folder) in cost.message and len(cost.message) < CHARACTERS, cost.message
    assert cost.seconds < SECONDS and cost.megabytes < MEGABYTES, cost
    assert "\n" not in cost.message
    who = "teacher" if load is load_teacher else "student"
    tell(f"a crafted folder of a {who}", "a kind of configuration, tokenizer, weights",
         "a sentence, under two seconds and 300 MB")  # fmt: skip


CACHED = (
    "20 GB of config.json", "20 GB of tokenizer_config.json", "a pipe for tokenizer.json",
    "a pipe for model.safetensors", f"{CONFIG} is {DEEP[:9]!r}", "a million layers",
    "a vocabulary of 10^12", "a header of 2^60 bytes", "an index that leads out",
)  # fmt: skip


def test_what_came_from_the_hub_is_looked_at_as_well(
    models: Models, tmp_path: Path, tell: Tell
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


def test_whole_folders_are_read(models: Models) -> None:
    for load, folder in models.items():
        assert cost_of(load, folder).message is None


def read_mutated(seeds: range, folder: Path) -> None:
    """Settings with an absurd value somewhere: read, or a KavaError of one sentence.

    Anything else ends the process that this runs in.
    """
    names = [CONFIG, TOKENIZER_CONFIG, LATENTS, *([ADAPTER, BASE] * (folder / ADAPTER).exists())]
    for seed in seeds:
        rng = random.Random(seed)
        file = folder / rng.choice(names)
        whole = file.read_text(encoding="utf-8")
        file.write_text(json.dumps(mutated(rng, json.loads(whole))), encoding="utf-8")
        for read in (load_tokenizer, model_fingerprint, load_model, LatentReasoner.from_pretrained):
            try:
                read(str(folder))
            except KavaError as error:
                assert len(str(error)) < CHARACTERS, (seed, error)
        file.write_text(whole, encoding="utf-8")


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_absurd_values_in_settings(models: Models, tmp_path: Path, count: int, tell: Tell) -> None:
    for load in (open_alone, open_adapted):
        folder = tmp_path / load.__name__
        shutil.copytree(models[load], folder)
        cost = cost_of(partial(read_mutated, range(count)), folder)
        assert cost.message is None and cost.megabytes < MEGABYTES, cost
        for _ in range(count):
            tell(
                "settings of a student", "an absurd value at a random place", "read, or a sentence"
            )

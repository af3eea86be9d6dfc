"""A hostile store gives one sentence, under a second and 200 MB, whatever it holds."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from blake3 import blake3

from kava_core.errors import KavaError
from kava_core.store.verify import verify
from tests.faults.conftest import Tell
from tests.faults.weigh import cost_of
from tests.store.make import make_targets_store, make_teacher_store
from tests.store.test_damage import DAMAGE, SHARD, edit_index, edit_manifest, use

MANIFEST, INDEX = "manifest.json", "index.arrow"
GIGABYTES = 20 << 30
SECONDS, MEGABYTES, CHARACTERS = 1.0, 200.0, 600


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Something else in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def sparse(file: Path) -> None:
    file.touch()
    os.truncate(file, GIGABYTES)


def zeros(file: Path) -> None:
    os.mknod(file, 0o20666, os.makedev(1, 5))


def folder_of_its_length(name: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()
        size = (folder / name).stat().st_size
        edit_manifest(folder, lambda plain: plain["files"][name].update(bytes=size))

    return damage


def sparse_and_listed(name: str) -> Callable[[Path], Any]:
    """A file of many empty gigabytes behind its own beginning, as long as the manifest says."""

    def damage(folder: Path) -> None:
        os.truncate(folder / name, GIGABYTES)
        edit_manifest(folder, lambda plain: plain["files"][name].update(bytes=GIGABYTES))

    return damage


def text(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / MANIFEST).write_text(content, encoding="utf-8")


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda folder: edit_manifest(folder, change)


def deep(plain: dict[str, Any]) -> None:
    inner: list[Any] = []
    for _ in range(600):
        inner = [inner]
    plain["settings"]["deep"] = inner


def rotation(**values: Any) -> Callable[[Path], Any]:
    return manifest(lambda plain: plain["rotary"].update(values))


def first_angle(value: float) -> Callable[[Path], Any]:
    return manifest(lambda plain: plain["rotary"]["inv_freq"][0].__setitem__(0, value))


def many_files(folder: Path) -> None:
    entry = {"blake3": "0" * 64, "bytes": 1}
    edit_manifest(
        folder, lambda plain: plain["files"].update({f"a{i}": entry for i in range(7_000)})
    )


def long_word(columns: dict[str, pa.Array]) -> None:
    columns["id"] = pa.array(["x" * 1_000_000, "x" * 1_000_000, "y"])


# kind → what is done to a whole store, and what is said of it
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pipe for a manifest": (instead(MANIFEST, os.mkfifo), "a pipe or a device"),
    "a pipe for a shard": (instead(SHARD, os.mkfifo), "a pipe or a device"),
    "a pipe for an index": (instead(INDEX, os.mkfifo), "a pipe or a device"),
    "a device for a manifest": (instead(MANIFEST, zeros), "a pipe or a device"),
    "a device for a shard": (instead(SHARD, zeros), "a pipe or a device"),
    "a link to a device": (
        instead(MANIFEST, lambda file: file.symlink_to("/dev/zero")),
        "symbolic link out of",
    ),
    "a folder for a manifest": (instead(MANIFEST, Path.mkdir), "a pipe or a device"),
    "a folder for a shard": (folder_of_its_length(SHARD), "a pipe or a device"),
    "an empty manifest of 20 GB": (instead(MANIFEST, sparse), "expected at most"),
    "a shard of 20 GB": (sparse_and_listed(SHARD), f"{SHARD} has"),
    "an empty shard of 20 GB": (
        lambda folder: [
            instead(SHARD, sparse)(folder),
            sparse_and_listed(SHARD)(folder),
        ],
        f"{SHARD}",
    ),
    "an index of 20 GB": (sparse_and_listed(INDEX), f"{INDEX} cannot be read"),
    "40 MB of lists": (text("[" + "[]," * 13_000_000 + "[]]"), "expected at most"),
    "40 MB of open lists": (text("[" * 40_000_000), "expected at most"),
    "1 MB of lists": (text("[" + "[]," * 345_000 + "[]]"), "must hold a JSON object"),
    "1 MB of open lists": (text("[" * 1_000_000), "nested too deep"),
    "1 MB of open objects": (text('{"a":' * 200_000), "nested too deep"),
    "1 MB of numbers": (text('{"format_version": 3, "a": [' + "1," * 450_000 + "1]}"), "digest"),
    "settings 600 deep": (manifest(deep), ""),
    "7,000 files that are not there": (many_files, "files lists wrongly or leaves out a0"),
    "a number of 5,000 digits": (text(f'{{"format_version": {"1" * 5000}}}'), "thousands of d"),
    "a version of 4,000 digits": (text(f'{{"format_version": {"1" * 4000}}}'), "format version 11"),
    "a name of a megabyte": (
        manifest(lambda plain: plain["files"].update({"/" + "x" * 900_000: {}})),
        "only plain names",
    ),
    "an unknown key of a megabyte": (
        manifest(lambda plain: plain.update({"x" * 900_000: 1})),
        MANIFEST,
    ),
    "tokens of 10^29": (manifest(lambda plain: plain.update(trace_tokens=10**29)), "trace_tokens"),
    "tokens that are too many": (
        manifest(lambda plain: plain.update(trace_tokens=plain["trace_tokens"] + 1)),
        "traces of",
    ),
    "records of 10^30": (manifest(lambda plain: plain.update(records=10**30)), "records"),
    "a shard of 10^30 records": (manifest(lambda plain: plain.update(shards=[10**30, 3])), "shar"),
    "layers of 10^30": (
        manifest(lambda plain: plain["geometry"].update(model_layers=10**30)),
        "geometry.model_layers",
    ),
    "layers of 10^15": (
        manifest(lambda plain: plain["geometry"].update(model_layers=10**15)),
        "statistics have",
    ),
    "heads of 10^15": (
        manifest(lambda plain: plain["geometry"].update(kv_heads=10**15)),
        "shard-00000",
    ),
    "a file of 10^30 bytes": (
        manifest(lambda plain: plain["files"][SHARD].update(bytes=10**30)),
        "bytes",
    ),
    "an angle of 9e18": (first_angle(9e18), "rotary must have"),
    "a negative angle": (first_angle(-0.1), "rotary must have"),
    "too many angles": (rotation(inv_freq=[[0.1] * 4] * 3), "rotary must have"),
    "a rotation of some layers": (rotation(inv_freq=[[0.1]], scaling=[1.0]), "rotary must have"),
    "a rotation without scaling": (rotation(scaling=[]), "rotary must have"),
    "a scaling of 0": (rotation(scaling=[0.0, 1.0, 1.0]), "rotary must have"),
    "a phase that is true": (
        manifest(lambda plain: plain["settings"].update(evict={"phase": True})),
        "settings.evict.phase is True",
    ),
    "a fraction that is text": (
        manifest(lambda plain: plain["settings"].update(latent_fraction="much")),
        "settings.latent_fraction",
    ),
    "a deviation that is negative": (
        manifest(lambda plain: plain["statistics"].update(endpoint_std=[-1.0] * 4)),
        "deviation is negative",
    ),
    "a deviation that is wrong": (
        manifest(lambda plain: plain["statistics"].update(values_std=[9.0] * 3)),
        "statistics.values_std says 9 for row 0",
    ),
    "drift without codes": (
        manifest(
            lambda plain: plain.update(
                drift={
                    f"{name}_{of}": [0.1] * 3
                    for name in ("keys", "values")
                    for of in ("relative_l2", "neighbour_changed")
                }
            )
        ),
        "drift must be there exactly if",
    ),
    "ids of a megabyte": (lambda folder: edit_index(folder, long_word), "has two records"),
}


def read_all(folder: Path) -> None:
    """Verify and read everything: what `kava store verify --full` and a stage do."""
    problems = verify(folder, full=True)
    if problems:
        raise KavaError("\n".join(problems[:1]))
    use(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A whole store of each kind, not to be changed."""
    made = tmp_path_factory.mktemp("stores")
    make_teacher_store(made / "teacher_kv")
    make_targets_store(made / "kv_targets")
    return [made / "teacher_kv", made / "kv_targets"]


def test_a_whole_store_costs_little(stores: list[Path]) -> None:
    for store in stores:
        cost = cost_of(read_all, store)
        assert cost.message is None and cost.seconds < SECONDS and cost.megabytes < MEGABYTES


@pytest.mark.parametrize("kind", [*HOSTILE, *(f"damage: {name}" for name in DAMAGE)])
def test_one_sentence_at_little_cost(
    stores: list[Path], tmp_path: Path, kind: str, tell: Tell
) -> None:
    name = kind.removeprefix("damage: ")
    damage, message = HOSTILE[kind] if kind in HOSTILE else (DAMAGE[name][0], "")
    if "device" in kind and os.geteuid() != 0:
        pytest.skip("only root makes devices")
    for store in stores:
        folder = tmp_path / store.name
        shutil.copytree(store, folder)
        try:
            damage(folder)
        except PermissionError:
            pytest.skip("devices cannot be made here")
        cost = cost_of(read_all, folder)
        assert cost.seconds < SECONDS and cost.megabytes < MEGABYTES, cost
        if kind == "settings 600 deep" and cost.message is None:
            continue
        assert cost.message is not None
        assert str(folder) in cost.message and message in cost.message, cost.message
        assert len(cost.message) - cost.message.count(str(folder)) * len(str(folder)) < CHARACTERS
        assert "\n" not in cost.message.strip()
    how = (
        "a kind of damage"
        if kind.startswith("damage: ")
        else "a kind of pipe, device, JSON, number"
    )
    tell("a crafted store", f"{how} (the test names them)", "a sentence, under a second and 200 MB")


@functools.cache
def _texts(store: Path) -> str:
    return (store / MANIFEST).read_text(encoding="utf-8")


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one place in it changed to something absurd."""
    absurd = [None, True, -1, 0, 10**30, 1.5, 9e18, "x" * 3000, [], {}, [[[]]], "\u202e", "\x1b[2J"]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], mutated(rng, value[i]), *value[i + 1 :]]
    return rng.choice(absurd)


def check_mutations(store: Path, folder: Path, seeds: range) -> tuple[int, int]:
    """Signed manifests with an absurd value somewhere: how many were refused, and how many read.

    What is read as whole is read alike: nothing else than a KavaError comes of it.
    """
    refused = taken = 0
    shutil.copytree(store, folder)
    for seed in seeds:
        plain = mutated(random.Random(seed), json.loads(_texts(store)))
        if not isinstance(plain, dict):
            continue
        (folder / MANIFEST).write_text(_texts(store), encoding="utf-8")
        edit_manifest(folder, lambda found, plain=plain: (found.clear(), found.update(plain)))
        try:
            read_all(folder)
            taken += 1
        except KavaError as error:
            assert len(str(error)) < CHARACTERS + 2 * len(str(folder)), error
            refused += 1
    return refused, taken


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_absurd_values_in_signed_manifests(
    stores: list[Path], tmp_path: Path, count: int, tell: Tell
) -> None:
    for store in stores:
        refused, _ = check_mutations(store, tmp_path / store.name, range(count))
        assert refused > count / 3  # the rest changed free text: settings, software, names
        for _ in range(count):
            tell("a signed manifest", "an absurd value at a random place", "refused, or free text")


def test_bytes_flipped_anywhere_are_found(stores: list[Path], tmp_path: Path, tell: Tell) -> None:
    rng = random.Random(0)
    for store in stores:
        for file in sorted(store.iterdir()):
            for _ in range(6):
                folder = tmp_path / "copy"
                shutil.copytree(store, folder)
                content = bytearray(file.read_bytes())
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                (folder / file.name).write_bytes(content)
                with pytest.raises(KavaError):
                    read_all(folder)
                shutil.rmtree(folder)
                tell("a flipped bit", f"in {file.suffix} files of a store", "found")


def bent(rng: random.Random, content: bytes) -> bytes:
    """Bytes with one thing wrong, most often near the beginning or the end, where headers are."""
    place = min(int(rng.expovariate(1 / 200)), len(content) - 1)
    if rng.random() < 0.3:
        place = len(content) - 1 - place
    many = rng.randrange(1, 9)
    kind = rng.randrange(5)
    if kind == 0:  # a bit
        return (
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        )
    if kind == 1:  # a number as large as can be, or 0
        return content[:place] + rng.choice([b"\xff", b"\0"]) * many + content[place + many :]
    if kind == 2:
        return content[:place] + rng.randbytes(many) + content[place:]
    if kind == 3:
        return content[:place] + content[place + many :]
    return content[:place]


def read_bent(seeds: range, folder: Path) -> None:
    """Files that are wrong though the manifest has their checksums: read, or a KavaError.

    Anything else, or the end of the interpreter, ends the process that this runs in.
    """
    whole = {file: file.read_bytes() for file in folder.iterdir()}
    names = sorted(file.name for file in whole if file.name != MANIFEST)
    for seed in seeds:
        rng = random.Random(seed)
        file = folder / rng.choice(names)
        content = bent(rng, whole[file])
        file.write_bytes(content)
        info = {"blake3": blake3(content).hexdigest(), "bytes": len(content)}
        edit_manifest(
            folder, lambda plain, file=file, info=info: plain["files"][file.name].update(info)
        )
        with suppress(KavaError):
            read_all(folder)
        for each, content in whole.items():
            each.write_bytes(content)


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.slow)])
def test_files_that_are_wrong_and_signed_end_no_interpreter(
    stores: list[Path], tmp_path: Path, count: int, tell: Tell
) -> None:
    for store in stores:
        shutil.copytree(store, tmp_path / store.name)
        for first in range(0, count, 500):
            seeds = range(first, min(count, first + 500))
            cost = cost_of(functools.partial(read_bent, seeds), tmp_path / store.name)
            assert cost.message is None and cost.megabytes < MEGABYTES, cost
        for _ in range(count):
            how = "bits, numbers, pieces and ends of headers wrong"
            tell("a signed shard or index", how, "a sentence, or other numbers; no crash")

"""Stores in an S3 bucket: put there, read, linked to, evicted from, trained on."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.fit import fit
from kava_core.distill.match import Match
from kava_core.distill.terms import student_terms
from kava_core.errors import KavaError
from kava_core.settings import Evict, Generate, Resources
from kava_core.store import ShardShuffleSampler, TargetsStore, link, load_manifest, objects, push
from kava_core.store.verify import verify
from kava_core.targets.evict import build_kv_targets
from stages.store import store_group
from tests.distill.toy import (
    CADENCE,
    TRAINING,
    but,
    toy_objective,
    toy_student,
    toy_traces,
    write_store,
)
from tests.stages.project import digest
from tests.store.make import make_targets_store
from tests.store.s3 import S3
from tests.targets.caches import with_steps, write_caches

BUCKET = "s3://bucket"
STORE = f"{BUCKET}/team/kv_targets"
SIZES = (4, 3, 5, 2)
SHARD = "shard-00001.safetensors"
pytestmark = pytest.mark.usefixtures("s3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_targets_store(tmp_path / "store", SIZES)
    return tmp_path / "store"


def read(store: TargetsStore) -> list[torch.Tensor]:
    batch = store.batch(range(len(store)))
    return [batch.keys.codes, batch.values.codes, batch.endpoint.codes, batch.slot_positions]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def test_what_is_pushed_is_read_back(folder: Path) -> None:
    told = CliRunner().invoke(store_group, ["push", str(folder), STORE])
    assert told.exit_code == 0, told.output
    assert f"{STORE} holds kv_targets, {sum(SIZES)} records" in told.output
    assert equal(read(TargetsStore.open(STORE)), read(TargetsStore.open(folder)))
    assert verify(STORE, full=True) == []
    for command in ("inspect", "verify"):
        told = CliRunner().invoke(store_group, [command, STORE])
        assert told.exit_code == 0, told.output
    files = objects.Objects(TargetsStore.open(STORE).place.path).lengths()
    assert files == {p.name: p.stat().st_size for p in folder.iterdir()}


def test_a_file_too_many_is_found(folder: Path) -> None:
    push(folder, STORE)
    place = TargetsStore.open(STORE).place
    objects.Objects(place.path).write(place.path / "notes.txt", b"mine")
    (problem,) = verify(STORE)
    assert f"{STORE}/notes.txt does not belong to the store" in problem


@pytest.mark.parametrize(
    "fault", ["500", "503", "SlowDown", "RequestTimeout", "silent", "short", "cut"]
)
def test_faults_that_pass_change_nothing(
    s3: S3, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(objects, "SILENT_SECONDS", 0.5)
    once = {"silent": SHARD}.get(fault)  # each takes its time
    s3.fault = lambda method, key, n: (
        fault if n == 1 and once in (None, key) and (method == "GET" or fault == "500") else None
    )
    push(folder, STORE)
    assert equal(read(TargetsStore.open(STORE)), read(TargetsStore.open(folder)))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", "asked 5 times, the last time with status 500"),
        ("403", "access was denied. Set AWS_ACCESS_KEY_ID"),
        ("cut", "asked 5 times"),
        ("404", "is missing, but the manifest lists it"),
    ],
)
def test_a_fault_that_stays_names_the_object(s3: S3, folder: Path, fault: str, says: str) -> None:
    push(folder, STORE)
    store = TargetsStore.open(STORE)
    s3.fault = lambda method, key, _: fault if method == "GET" and key == SHARD else None
    with pytest.raises(KavaError, match=says) as raised:
        read(store)
    assert str(raised.value).startswith(f"{STORE}/{SHARD}")
    assert "hunter2" not in str(raised.value)


def test_without_credentials_it_says_what_to_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, STORE)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(KavaError, match=r"no credentials were found\. Set AWS_ACCESS_KEY_ID"):
        TargetsStore.open(STORE)


def test_a_bucket_that_is_not_there() -> None:
    with pytest.raises(KavaError, match="s3://nowhere/store"):
        TargetsStore.open("s3://nowhere/store")


def test_a_push_that_is_cut_off_is_no_store_and_goes_on(s3: S3, folder: Path) -> None:
    s3.fault = lambda method, key, _: "403" if method == "PUT" and key == SHARD else None
    with pytest.raises(KavaError, match=f"{SHARD} cannot be written: access was denied"):
        push(folder, STORE)
    with pytest.raises(KavaError, match="holds no store"):
        TargetsStore.open(STORE)
    s3.fault = lambda _method, _key, _n: None
    before = s3.asked["PUT", "shard-00000.safetensors"]
    push(folder, STORE)
    assert s3.asked["PUT", "shard-00000.safetensors"] == before == 1
    assert equal(read(TargetsStore.open(STORE)), read(TargetsStore.open(folder)))


def test_a_full_bucket_is_said(s3: S3, folder: Path) -> None:
    s3.fault = lambda method, key, _: (
        "XMinioStorageFull" if method == "PUT" and key.startswith("shard") else None
    )
    with pytest.raises(KavaError, match=r"its bucket is full \(XMinioStorageFull\)"):
        push(folder, STORE)


def test_nothing_is_replaced(folder: Path, tmp_path: Path) -> None:
    push(folder, STORE)
    assert push(folder, STORE) == load_manifest(STORE)
    make_targets_store(tmp_path / "other", SIZES, seed=9)
    with pytest.raises(KavaError, match="holds another store, or a part of one"):
        push(tmp_path / "other", STORE)
    objects.Objects(TargetsStore.open(STORE).place.path).write(
        TargetsStore.open(STORE).place.path / "a" / "notes.txt", b"mine"
    )
    with pytest.raises(KavaError, match=r"has other files in it \(notes.txt\)"):
        push(folder, f"{STORE}/a")


def test_a_damaged_store_is_not_passed_on(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(KavaError, match="does not match its checksum"):
        push(folder, STORE)
    with pytest.raises(KavaError, match="holds no store"):
        TargetsStore.open(STORE)


def test_only_buckets_are_pushed_to(folder: Path, tmp_path: Path) -> None:
    for url in (str(tmp_path / "x"), "https://host/x", "hf://datasets/team/x"):
        with pytest.raises(KavaError, match="cannot be pushed to: expected s3://"):
            push(folder, url)


def test_a_folder_stands_for_a_store(folder: Path, tmp_path: Path) -> None:
    push(folder, STORE)
    linked = tmp_path / "data" / "one" / "kv_targets"
    told = CliRunner().invoke(store_group, ["link", STORE, str(linked)])
    assert told.exit_code == 0, told.output
    assert [p.name for p in linked.iterdir()] == ["remote.json"]
    assert equal(read(TargetsStore.open(linked)), read(TargetsStore.open(folder)))
    assert verify(linked) == []
    with pytest.raises(KavaError, match="has files in it"):
        link(STORE, folder)
    with pytest.raises(KavaError, match="would be written to"):
        link("https://host/store?token=hunter2", tmp_path / "secret")
    with pytest.raises(KavaError, match="is a folder of this machine"):
        link(str(folder), tmp_path / "other")


def test_a_linked_store_that_became_another_is_refused(folder: Path, tmp_path: Path) -> None:
    push(folder, STORE)
    link(STORE, tmp_path / "linked")
    make_targets_store(tmp_path / "other", SIZES, seed=9)
    place = TargetsStore.open(STORE).place
    objects.Objects(place.path).upload(
        place.path / "manifest.json", str(tmp_path / "other" / "manifest.json")
    )
    with pytest.raises(KavaError, match=r"holds another store .* than when it was linked"):
        TargetsStore.open(tmp_path / "linked")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_eviction_reads_caches_from_a_bucket(tmp_path: Path, workers: int) -> None:
    """The same bytes as from this disk, however many workers read ahead."""
    caches = tmp_path / "near" / "data" / "one" / "teacher_kv"
    write_caches(caches, "llama", with_steps(toy_traces(14)), Generate())
    push(caches, f"{BUCKET}/caches")
    linked = tmp_path / "far" / "data" / "one" / "teacher_kv"
    link(f"{BUCKET}/caches", linked)
    settings, made = Evict(budget=4), []
    for source, asked in ((caches, 0), (linked, workers)):
        output = source.parent / "kv_targets"
        built = build_kv_targets(source, settings, output, Resources(workers=asked))
        made.append({p.name: digest(p) for p in built.folder.iterdir()})
    assert made[0] == made[1]


@pytest.fixture
def fresh_loaders() -> Iterator[None]:
    """Loader processes have the environment of the server that starts them, as it began."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.mark.usefixtures("fresh_loaders")
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_training_from_a_bucket_gives_the_same_weights(
    s3: S3, tmp_path: Path, loader_workers: int
) -> None:
    write_store(tmp_path / "near", toy_traces(26))
    push(tmp_path / "near", STORE)
    s3.fault = lambda method, key, n: (
        "503" if method == "GET" and key.startswith("shard") and n % 3 == 1 else None
    )

    def trained(path: str | Path, workers: int) -> dict[str, torch.Tensor]:
        model, store = toy_student(0.1), TargetsStore.open(path)
        folder = tmp_path / ("far" if path == STORE else "close")
        fit(
            model,
            student_terms(toy_objective(store), Match.of(store)),
            TargetsDataset(store, chains=False),
            ShardShuffleSampler(store.sizes, seed=5, window=2, ahead=store.fetch_ahead),
            but(TRAINING, steps=8),
            CADENCE,
            folder=folder / "checkpoints",
            curves=folder / "curves",
            title="toy",
            loader_workers=workers,
        )
        return model.state_dict()

    far, near = trained(STORE, loader_workers), trained(tmp_path / "near", 0)
    assert far.keys() == near.keys()
    assert all(torch.equal(far[name], near[name]) for name in near)

"""Stores in a bucket at gs://, where gcsfs is installed: pushed, made there, read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kava_core.errors import KavaError
from kava_core.settings import Evict, Generate, Resources
from kava_core.store import TargetsStore, objects, push
from kava_core.store.objects import Objects
from kava_core.store.url import Url
from kava_core.store.verify import verify
from kava_core.targets.evict import build_kv_targets
from tests.distill.toy import toy_traces
from tests.store.gcs import GCS
from tests.store.make import make_targets_store
from tests.targets.caches import with_steps, write_caches

# It looks at the environment as it is imported.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
gcsfs = pytest.importorskip("gcsfs")

TO = "gs://bucket/team"
STORE = f"{TO}/kv_targets"
SIZES = (4, 3, 5, 2)


@pytest.fixture(autouse=True)
def gcs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GCS]:
    with GCS().running() as service:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{service.server_port}")
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(objects, "PART", 1 << 18)
        yield service


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_targets_store(tmp_path / "store", SIZES)
    return tmp_path / "store"


def test_what_is_pushed_is_read_back(folder: Path, gcs: GCS) -> None:
    push(folder, STORE)
    held = {key.removeprefix("team/kv_targets/"): value for key, value in gcs.objects.items()}
    assert held == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert verify(STORE, full=True) == []
    assert len(TargetsStore.open(STORE).batch([0, 13]).indices) == 2


def test_a_large_file_goes_in_parts(gcs: GCS, tmp_path: Path) -> None:
    content = bytes(range(256)) * (12 << 12)
    (tmp_path / "large").write_bytes(content)
    there = Objects(Url(STORE))
    before = there.upload(there.url / "large", str(tmp_path / "large"))
    assert gcs.objects["team/kv_targets/large"] == content
    assert there.states() == {"large": before} and before.size == len(content)
    assert there.upload(there.url / "large", str(tmp_path / "large")) != before


def test_evict_makes_the_same_store_in_a_bucket(gcs: GCS, tmp_path: Path) -> None:
    caches = tmp_path / "data/one/teacher_kv"
    write_caches(caches, "llama", with_steps(toy_traces(14)), Generate())
    gcs.fault = lambda method, key, n: (
        503 if method == "PUT" and key.startswith("shard") and n == 1 else None
    )
    sent = Resources(workers=0, targets_to=TO)
    far, near = (
        build_kv_targets(caches, Evict(budget=4), tmp_path / place / "data/one/kv_targets", how)
        for place, how in (("far", sent), ("near", Resources(workers=0)))
    )
    assert far.url is not None
    held = {key: value for key, value in gcs.objects.items() if far.url.name in key}
    assert {key.rpartition("/")[2]: value for key, value in held.items()} == {
        path.name: path.read_bytes() for path in near.folder.iterdir()
    }
    assert verify(far.folder, full=True) == []


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (403, "access was denied. Run `gcloud auth"),
        (401, "access was denied. Run `gcloud auth"),
        (404, "is missing, but the manifest lists it"),
    ],
)
def test_a_fault_that_stays_names_the_object(
    folder: Path, gcs: GCS, status: int, says: str
) -> None:
    push(folder, STORE)
    store = TargetsStore.open(STORE)
    shard = "shard-00001.safetensors"
    gcs.fault = lambda method, key, _: status if method == "GET" and key == shard else None
    with pytest.raises(KavaError, match=says) as raised:
        store.batch(range(len(store)))
    assert str(raised.value).startswith(f"{STORE}/{shard}")
    assert "hunter2" not in str(raised.value)


def test_a_bucket_that_may_not_be_written_to(folder: Path, gcs: GCS) -> None:
    gcs.fault = lambda method, _key, _n: 403 if method == "PUT" else None
    with pytest.raises(KavaError, match=r"cannot be written: access was denied\. Run `gcloud"):
        push(folder, STORE)
    gcs.fault = lambda method, _key, _n: 507 if method == "PUT" else None
    with pytest.raises(KavaError, match=r"its bucket is full \(507\)"):
        push(folder, STORE)


def test_objects_that_were_written_meanwhile_are_told_apart() -> None:
    there = Objects(Url(STORE))
    states = []
    for _ in range(2):
        there.write(there.url / "a", b"same")
        states.append(there.states()["a"])
    assert states[0].size == states[1].size == 4 and states[0].tag != states[1].tag

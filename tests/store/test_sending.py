"""Stores that generate and evict make in an S3 bucket: shard by shard, and the manifest last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig

from kava_core.artefacts import publish
from kava_core.errors import KavaError
from kava_core.models.loading import save_model
from kava_core.problems.folder import write_problems
from kava_core.settings import Evict, Generate, Resources
from kava_core.settings.imported import Imported
from kava_core.store import TargetsStore, TeacherStore, identity, objects
from kava_core.store.objects import Objects
from kava_core.store.summary import eviction_findings
from kava_core.store.url import Url
from kava_core.store.verify import verify
from kava_core.targets.build import Build
from kava_core.targets.evict import build_kv_targets
from kava_core.targets.generate import build_targets_alone, build_teacher_kv
from tests.distill.toy import toy_traces
from tests.stages.project import digest
from tests.store.s3 import S3
from tests.targets.caches import with_steps, write_caches
from tests.targets.test_generate import SPLITS, TOKENIZER
from tests.tiny import COMMON, tiny_model

pytestmark = pytest.mark.usefixtures("s3")
TO = "s3://bucket/team"
EVICT = Evict(budget=4, keys_bits=8)
HERE, THERE = Resources(workers=0), Resources(workers=0, targets_to=TO)
SHARDS, LAST = 3, "shard-00002.safetensors"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's store of three shards."""
    folder = tmp_path_factory.mktemp("caches") / "data/one/teacher_kv"
    write_caches(folder, "llama", with_steps(toy_traces(14)), Generate())
    return folder


def evicted(caches: Path, home: Path, resources: Resources = THERE) -> Build:
    return build_kv_targets(caches, EVICT, home / "data/one/kv_targets", resources)


def objects_at(url: Url | None) -> Objects:
    assert url is not None
    return Objects(url)


def content(url: Url | None) -> dict[str, bytes]:
    """Every object of a store."""
    there = objects_at(url)
    return {name: there.read(there.url / name, 1 << 30) for name in there.states()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_evict_makes_the_same_store_in_a_bucket(caches: Path, s3: S3, tmp_path: Path) -> None:
    near, far = evicted(caches, tmp_path / "near", HERE), evicted(caches, tmp_path / "far")
    assert content(far.url) == files(near.folder)
    assert s3.unchecked == []
    assert str(far.url).startswith(f"{TO}/kv_targets-")
    assert [path.name for path in far.folder.iterdir()] == ["remote.json"]
    output = tmp_path / "far/data/one/kv_targets"
    assert not list(output.parents[1].glob(".work/*/output/*.safetensors"))
    publish((far.folder, output))
    assert not list(output.parents[1].glob(".work/*"))
    store = TargetsStore.open(output)
    assert verify(output, full=True) == []
    assert far.counts is not None
    found = eviction_findings(store, far.counts)
    assert found == eviction_findings(TargetsStore.open(near.folder))


def test_what_eviction_did_is_not_read_again(
    caches: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "RECORDS", 4)
    built = evicted(caches, tmp_path)
    s3.asked.clear()
    eviction_findings(TargetsStore.open(built.folder), built.counts)
    assert s3.asked["GET", LAST] == 0


@pytest.mark.parametrize("keep", ["caches", "targets"])
def test_generate_makes_the_same_store_in_a_bucket(keep: str, tmp_path: Path) -> None:
    write_problems(tmp_path / "problems", SPLITS, "equations", {})
    config = LlamaConfig(**{**COMMON, "vocab_size": len(TOKENIZER)})
    save_model(tmp_path / "teacher", tiny_model(config, torch.float32), TOKENIZER)
    inputs, generate = (tmp_path / "problems", tmp_path / "teacher"), Generate(shard_size=4)

    def built(home: Path, resources: Resources) -> Build:
        if keep == "caches":
            return build_teacher_kv(*inputs, generate, home / "data/one/teacher_kv", resources)
        output = home / "data/one/kv_targets"
        return build_targets_alone(*inputs, generate, Evict(budget=3), output, resources)

    name = f"{keep}_to"
    far = built(tmp_path / "far", Resources.model_validate({"workers": 0, name: TO}))
    assert content(far.url) == files(built(tmp_path / "near", HERE).folder)
    (TeacherStore if keep == "caches" else TargetsStore).open(far.folder)


def test_a_torn_upload_is_no_store_and_goes_on(caches: Path, s3: S3, tmp_path: Path) -> None:
    s3.fault = lambda method, key, _: "403" if method == "PUT" and key == LAST else None
    with pytest.raises(KavaError, match=rf"^{TO}/.*/{LAST} cannot be written: access was denied"):
        evicted(caches, tmp_path)
    (work,) = (tmp_path / "data/.work").glob("kv_targets-*")
    with pytest.raises(KavaError, match="holds no store"):
        TargetsStore.open(f"{TO}/{work.name}")
    assert sorted(path.name for path in work.glob("output/*.safetensors")) == [LAST]
    s3.fault = lambda _method, _key, _n: None
    s3.asked.clear()
    rest = evicted(caches, tmp_path)
    assert rest.examples == 0  # all shards were finished
    sent = [key for method, key in s3.asked if method == "PUT" and key.startswith("shard")]
    assert sent == [LAST] and s3.asked["PUT", LAST] == 1
    assert content(rest.url) == files(evicted(caches, tmp_path / "near", HERE).folder)


def test_what_another_has_put_there_is_sent_again(caches: Path, s3: S3, tmp_path: Path) -> None:
    s3.fault = lambda method, key, _: "403" if method == "PUT" and key == LAST else None
    with pytest.raises(KavaError):
        evicted(caches, tmp_path)
    s3.fault = lambda _method, _key, _n: None
    (work,) = (tmp_path / "data/.work").glob("kv_targets-*")
    there, first = Objects(Url(f"{TO}/{work.name}")), "shard-00000.safetensors"
    there.write(there.url / first, bytes(there.states()[first].size))
    rest = evicted(caches, tmp_path)
    assert rest.examples == 6  # that shard is computed again: nothing here had it any more
    assert verify(rest.folder, full=True) == []


@pytest.mark.parametrize("fault", ["XMinioStorageFull", "QuotaExceeded", "507"])
def test_a_full_bucket_is_said(caches: Path, s3: S3, tmp_path: Path, fault: str) -> None:
    s3.fault = lambda method, key, _: fault if method == "PUT" and key.startswith("shard") else None
    with pytest.raises(KavaError, match=r"shard-0000\d.safetensors cannot be written: its bucket "):
        evicted(caches, tmp_path)


@pytest.mark.parametrize(
    "fault", ["503", "500", "silent", "RequestTimeout", "IncompleteBody", "BadDigest"]
)
def test_faults_that_pass_change_nothing(
    caches: Path, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(objects, "SILENT_SECONDS", 0.5)
    once = {"silent": LAST}.get(fault)  # each takes its time
    s3.fault = lambda method, key, n: (
        fault if method == "PUT" and n == 1 and once in (None, key) else None
    )
    far = evicted(caches, tmp_path / "far")
    s3.fault = lambda _method, _key, _n: None
    assert content(far.url) == files(evicted(caches, tmp_path / "near", HERE).folder)


def test_who_may_not_write_is_told_before_anything_is_computed(
    caches: Path, s3: S3, tmp_path: Path
) -> None:
    s3.fault = lambda method, _key, _n: "403" if method == "PUT" else None
    with pytest.raises(KavaError, match=r"cannot be written: access was denied\. Set AWS_"):
        evicted(caches, tmp_path)
    s3.fault = lambda _method, _key, _n: None
    nowhere = Resources(workers=0, targets_to="s3://nowhere/team")
    with pytest.raises(KavaError, match="cannot be written: there is no such bucket"):
        evicted(caches, tmp_path, nowhere)
    assert not list((tmp_path / "data/.work").glob("*/output/*"))


def test_a_store_that_is_there_already_is_taken(caches: Path, s3: S3, tmp_path: Path) -> None:
    """Another checkout has made it, or a run that was killed before it could say so."""
    first = evicted(caches, tmp_path / "one")
    s3.asked.clear()
    second = evicted(caches, tmp_path / "two")
    assert (second.manifest, second.rate) == (first.manifest, "all of it was there")
    assert digest(second.folder) == digest(first.folder)
    assert not [method for method, _ in s3.asked if method == "PUT"]


def test_other_settings_have_another_place(caches: Path, tmp_path: Path) -> None:
    output = tmp_path / "data/one/kv_targets"
    places = {
        str(build_kv_targets(caches, Evict(budget=budget), output, THERE).url) for budget in (3, 4)
    }
    assert len(places) == 2


def test_a_shard_that_the_disk_has_changed_is_not_sent(
    caches: Path, s3: S3, tmp_path: Path
) -> None:
    s3.fault = lambda method, key, _: "403" if method == "PUT" and key == LAST else None
    with pytest.raises(KavaError):
        evicted(caches, tmp_path)
    s3.fault = lambda _method, _key, _n: None
    (left,) = (tmp_path / "data/.work").glob(f"*/output/{LAST}")
    left.write_bytes(left.read_bytes()[:-1] + b"?")
    with pytest.raises(KavaError, match="its disk has changed it"):
        evicted(caches, tmp_path)
    assert verify(evicted(caches, tmp_path).folder, full=True) == []


def test_no_more_shards_wait_than_may(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow line stops the computing, before the disk is full of what waits: one shard is on its
    way, one waits, and one was being written when no more might wait."""
    monkeypatch.setattr("kava_core.store.work.SENDERS", 1)
    monkeypatch.setattr("kava_core.store.work.WAITING", 1)
    here: list[int] = []

    def slow(method: str, key: str, _: int) -> None:
        if method == "PUT" and key.startswith("shard"):
            time.sleep(0.2)
            here.append(len(list((tmp_path / "data/.work").glob("*/output/*.safetensors"))))

    s3.fault = slow
    many = tmp_path / "many/data/one/teacher_kv"
    write_caches(many, "llama", with_steps(toy_traces(38)), Generate())
    evicted(many, tmp_path)
    assert len(here) == len(list(many.glob("shard-*.safetensors"))) > 5 and max(here) <= 3


RUN = """
import sys
from pathlib import Path
from kava_core.settings import Resources
from kava_core.targets.evict import build_kv_targets
from tests.store.test_sending import EVICT
output = Path(sys.argv[2]) / "data/one/kv_targets"
build_kv_targets(Path(sys.argv[1]), EVICT, output, Resources(workers=0, targets_to=sys.argv[3]))
"""


def test_killed_in_the_middle_it_goes_on(caches: Path, s3: S3, tmp_path: Path) -> None:
    stuck: list[str] = []

    def hold(method: str, key: str, _: int) -> None:
        if method == "PUT" and key == LAST:
            stuck.append(key)
            time.sleep(1)

    s3.fault = hold
    command = [sys.executable, "-c", RUN, str(caches), str(tmp_path), TO]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
    while not stuck:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # what had come of the object is thrown away
    s3.fault = lambda _method, _key, _n: None
    s3.asked.clear()
    rest = evicted(caches, tmp_path)
    assert rest.examples == 0
    assert s3.asked["PUT", "shard-00000.safetensors"] == 0
    assert content(rest.url) == files(evicted(caches, tmp_path / "near", HERE).folder)


def test_parts_that_the_service_has_thrown_away_are_sent_again(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART", objects.SMALLEST_PART)
    content = bytes(range(256)) * (2 * objects.PART // 256)
    (tmp_path / "large").write_bytes(content)
    there = Objects(Url(f"{TO}/x"))
    s3.fault = lambda method, key, n: (
        "NoSuchUpload" if method == "PUT" and key == "large" and n == 2 else None
    )
    there.upload(there.url / "large", str(tmp_path / "large"))
    assert b"".join(there.pieces(there.url / "large", len(content))) == content


@pytest.mark.parametrize(
    "wrong",
    ["https://host/x", "bucket/x", "s3://", "s3://me:hunter2@host/x", "s3://bucket/x?key=1", ""],
)
def test_only_plain_addresses_of_buckets_are_settings(wrong: str) -> None:
    with pytest.raises(ValidationError, match="should be s3://BUCKET/FOLDER or gs://"):
        Resources(caches_to=wrong)


def test_settings_that_mean_nothing_are_errors() -> None:
    with pytest.raises(ValidationError, match="push_caches: means nothing beside `caches_to`"):
        Resources(caches_to=TO, push_caches=False)
    training = {"steps": 1, "batch_size": 1, "learning_rate": 0.1}
    students = {"one": {"reads": "kv_targets", "alpha_kv": 1.0, "training": training}}
    with pytest.raises(ValidationError, match=r"resources\.targets_to: says where stores are put"):
        Imported.model_validate({"students": students, "resources": {"targets_to": TO}})

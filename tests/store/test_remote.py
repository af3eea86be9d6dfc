"""A store on object storage reads like one on this disk, or says in a sentence why it does not."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader

from benchmarks.object_server import Fault, ObjectServer
from kava_core.distill.batches import TargetsDataset
from kava_core.errors import KavaError
from kava_core.store import (
    Cache,
    ShardShuffleSampler,
    TargetsStore,
    TeacherStore,
    Url,
    locate,
    objects,
    remote,
)
from kava_core.store.verify import open_store, verify
from stages.store import store_group
from tests.store.make import make_targets_store, make_teacher_store

SHARD = "shard-00001.safetensors"
SIZES = (4, 3, 5, 2, 4, 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Retries within milliseconds, small ranges, and a cache of the test's own."""
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(objects, "PART", 1 << 12)
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_targets_store(tmp_path / "store", SIZES)
    return tmp_path / "store"


@pytest.fixture
def server(folder: Path) -> Iterator[ObjectServer]:
    with ObjectServer(folder.parent).running() as server:
        yield server


def url_of(server: ObjectServer) -> str:
    return f"{server.url}/store"


def cache_of(tmp_path: Path, limit: int = 10**9) -> Cache:
    return Cache(tmp_path / "cache", limit)


def batches(store: TargetsStore, order: list[int], size: int = 3) -> list[torch.Tensor]:
    """All that the batches of a reader hold, in order."""
    found = []
    for i in range(0, len(order), size):
        batch = store.batch(order[i : i + size])
        found += [batch.keys.codes, batch.values.codes, batch.endpoint.codes, batch.slot_positions]
    return found


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def order_of(store: TargetsStore, window: int = 2) -> list[int]:
    sampler = ShardShuffleSampler(store.sizes, seed=3, window=window, ahead=store.fetch_ahead)
    return list(sampler)


def test_a_remote_store_is_read_as_from_this_disk(folder: Path, server: ObjectServer) -> None:
    local, far = TargetsStore.open(folder), TargetsStore.open(url_of(server))
    order = order_of(far)
    assert order == order_of(local)
    assert same(batches(far, order), batches(local, order))
    assert [far.index.record(i) for i in order] == [local.index.record(i) for i in order]
    assert far.manifest == local.manifest


def test_a_teachers_store_is_read_as_from_this_disk(tmp_path: Path) -> None:
    make_teacher_store(tmp_path / "store")
    with ObjectServer(tmp_path).running() as server:
        far, local = TeacherStore.open(url_of(server)), TeacherStore.open(tmp_path / "store")
        for k in range(local.shards):
            ours, theirs = far.shard(k), local.shard(k)
            assert ours.records == theirs.records
            assert torch.equal(ours.keys.codes, theirs.keys.codes)
            assert torch.equal(ours.importance, theirs.importance)


def ask_for(part: int, _worker: int) -> None:
    objects.PART = part


def as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_readers_and_loader_processes_change_no_batch(
    folder: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, readers: int, workers: int
) -> None:
    monkeypatch.setattr(remote, "READERS", readers)

    def loaded(path: str | Path) -> list[torch.Tensor]:
        store = TargetsStore.open(path)
        sampler = ShardShuffleSampler(store.sizes, seed=5, window=2, ahead=store.fetch_ahead)
        loader = DataLoader(
            TargetsDataset(store, chains=False),
            batch_size=4,
            sampler=sampler,
            num_workers=workers,
            collate_fn=as_it_is,
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=partial(ask_for, objects.PART),
        )
        return [t for batch in loader for t in (batch["targets"].keys.codes, batch["question_ids"])]

    assert same(loaded(url_of(server)), loaded(folder))
    shards = {name: n for name, n in server.asked.items() if name.startswith("shard")}
    sizes = {name: (folder / name).stat().st_size for name in shards}
    assert shards == {name: -(-sizes[name] // objects.PART) for name in sizes}, "fetched once"


FAULTS: dict[str, Fault] = {
    "errors of the server": lambda _, n: "503" if n % 3 == 1 else None,
    "answers that do not come": lambda _, n: "silent" if n == 2 else None,
    "short reads": lambda _, n: "short" if n % 2 else None,
    "connections that are cut": lambda _, n: "cut" if n % 2 else None,
    "a server without ranges": lambda _, __: "whole",
    "a wrong byte": lambda name, n: "flip" if n == 2 and name == SHARD else None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_change_nothing(
    folder: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(objects, "SILENT_SECONDS", 0.3)
    server.fault = FAULTS[fault]
    far, local = TargetsStore.open(url_of(server)), TargetsStore.open(folder)
    order = order_of(local)
    assert same(batches(far, order), batches(local, order))


def test_a_server_without_ranges_sends_a_shard_once(server: ObjectServer) -> None:
    server.fault = lambda _, __: "whole"
    store = TargetsStore.open(url_of(server))
    store.batch(range(len(store)))
    assert server.asked[SHARD] == 1
    piece = next(objects.Objects(store.place.path).pieces(store.place.path / SHARD, 10_000))
    assert len(piece) == objects.PART


class Endless(BaseHTTPRequestHandler):
    """Says not how long an answer is, knows no ranges, and sends 64 MB, or as much as is taken."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.close_connection = True
        with suppress(OSError):
            for _ in range(256):
                self.wfile.write(b"40000\r\n" + bytes(1 << 18) + b"\r\n")
                self.server.sent += 1 << 18
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def test_a_server_that_sends_without_end_is_not_heard_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST_FILES", 0)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads, server.sent = True, 0
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    url = Url(f"http://127.0.0.1:{server.server_port}/store")
    there = objects.Objects(url)
    try:
        with pytest.raises(KavaError, match=r"expected at most .* bytes, found .* or more"):
            TargetsStore.open(url)
        assert there.head(url / SHARD, 1000) == bytes(1000)
        assert sum(map(len, there.pieces(url / SHARD, 100_000))) == 100_000
        assert server.sent < 48 << 20, "of four answers"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", "asked 5 times, the last time with status 500"),
        ("cut", "asked 5 times"),
        ("short", r"only \d+ of \d+ bytes came"),
        ("403", "access was denied. Ask whoever shares it"),
        ("404", "is missing, but the manifest lists it"),
        ("flip", "does not match its checksum, fetched 3 times"),
        ("400", "the service answered with status 400"),
        ("507", "its bucket is full"),
    ],
)
def test_a_fault_that_stays_names_the_object(
    server: ObjectServer, tmp_path: Path, fault: str, says: str
) -> None:
    store = TargetsStore.open(url_of(server))
    server.fault = lambda name, _: fault if name == SHARD else None
    store.batch(range(SIZES[0]))
    with pytest.raises(KavaError, match=says) as raised:
        store.batch(range(SIZES[0], sum(SIZES)))
    assert str(raised.value).startswith(f"{server.url}/store/{SHARD}")
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_fault_while_fetching_ahead_is_said_where_the_shard_is_needed(
    server: ObjectServer,
) -> None:
    server.fault = lambda name, _: "500" if name == SHARD else None
    store = TargetsStore.open(url_of(server))
    store.fetch_ahead([0], [1, 2])
    store.batch(range(SIZES[0]))
    with pytest.raises(KavaError, match=SHARD):
        store.batch(range(SIZES[0], sum(SIZES)))


def test_what_was_damaged_in_the_cache_is_fetched_again(
    folder: Path, server: ObjectServer, tmp_path: Path
) -> None:
    local = TargetsStore.open(folder)
    order = list(range(len(local)))
    expected = batches(local, order)
    assert same(batches(TargetsStore.open(url_of(server)), order), expected)
    copy = cache_of(tmp_path).path(local.manifest.files[SHARD])
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    asked = server.asked[SHARD]
    assert same(batches(TargetsStore.open(url_of(server)), order), expected)
    assert server.asked[SHARD] > asked
    assert copy.read_bytes() == (folder / SHARD).read_bytes()


def test_a_second_run_fetches_no_shard(server: ObjectServer) -> None:
    order = list(range(sum(SIZES)))
    batches(TargetsStore.open(url_of(server)), order)
    before = dict(server.asked)
    batches(TargetsStore.open(url_of(server)), order)
    changed = {name for name in server.asked if server.asked[name] != before[name]}
    assert changed == {"manifest.json"}


def test_a_torn_upload_is_no_store(folder: Path, server: ObjectServer) -> None:
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(KavaError, match=r"holds no store: there is no manifest\.json"):
        TargetsStore.open(url_of(server))
    manifest.write_bytes(content[:-100])
    with pytest.raises(KavaError, match="is not valid JSON"):
        TargetsStore.open(url_of(server))
    manifest.write_bytes(content)
    (folder / SHARD).unlink()
    assert [p for p in verify(url_of(server)) if SHARD in p and "is missing" in p]


def test_a_store_made_anew_while_it_is_read_is_not_mixed(
    folder: Path, server: ObjectServer
) -> None:
    store = TargetsStore.open(url_of(server))
    store.batch([0])
    shutil.rmtree(folder)
    make_targets_store(folder, SIZES, seed=7)
    with pytest.raises(KavaError, match="was made anew while it was read"):
        store.batch(range(len(store)))


@pytest.mark.parametrize("full", [False, True])
def test_verify_finds_a_longer_object(folder: Path, server: ObjectServer, full: bool) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")
    (problem,) = verify(url_of(server), full=full)
    assert problem.startswith(f"{url_of(server)}/{SHARD}")
    assert "truncated or was changed" in problem


@pytest.mark.parametrize("kind", ["teacher_kv", "kv_targets"])
def test_the_tools_work_on_a_url(tmp_path: Path, kind: str) -> None:
    make = make_teacher_store if kind == "teacher_kv" else make_targets_store
    make(tmp_path / "store", SIZES)
    with ObjectServer(tmp_path).running() as server:
        told = CliRunner().invoke(store_group, ["inspect", url_of(server)])
        assert told.exit_code == 0, told.output
        assert f"{sum(SIZES)} in {len(SIZES)} shards" in told.output
        quick = CliRunner().invoke(store_group, ["verify", url_of(server)])
        assert quick.exit_code == 0, quick.output
        fetched = {path.name for path in (tmp_path / "cache").glob("[!.]*.*")} - {"kava-cache.json"}
        assert len(fetched) == 1, "the index alone"
        full = CliRunner().invoke(store_group, ["verify", "--full", url_of(server)])
        assert full.exit_code == 0, full.output
        assert f"{url_of(server)} is whole: every checksum" in full.output
        content = (tmp_path / "store" / SHARD).read_bytes()
        (tmp_path / "store" / SHARD).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        shutil.rmtree(tmp_path / "cache")
        damaged = CliRunner().invoke(store_group, ["verify", "--full", url_of(server)])
        assert damaged.exit_code == 1
        assert f"{SHARD} does not match its checksum" in damaged.output


def test_a_file_url_and_a_path_are_read_in_place(folder: Path, tmp_path: Path) -> None:
    for path in (f"file://{folder}", str(folder), folder):
        store = open_store(path)
        assert store.path == folder
        store.index.check()
    assert not (tmp_path / "cache").exists()


def test_a_store_travels_to_other_processes(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was looked at is not looked at again there: loaders begin anew in each epoch."""
    store = TargetsStore.open(url_of(server))
    here = batches(store, [1, 0])
    monkeypatch.setattr(remote, "file_checksum", lambda _: pytest.fail("looked at again"))
    again = pickle.loads(pickle.dumps(store))
    assert same(batches(again, [1, 0]), here)


def use_and_leave(store: TargetsStore) -> None:
    store.batch([0])
    del store
    gc.collect()


def test_a_forked_reader_does_not_deafen_its_parent(server: ObjectServer) -> None:
    """It shares the parent's event queue, and the parent would wait for a time-out in vain."""
    store = TargetsStore.open(url_of(server))
    first = 0
    for size in SIZES:
        child = multiprocessing.get_context("fork").Process(target=use_and_leave, args=(store,))
        child.start()
        began = time.monotonic()
        store.batch(range(first, first + size))
        child.join()
        assert time.monotonic() - began < objects.SILENT_SECONDS / 2
        first += size


BAD: dict[str, str] = {
    "ftp://host/store": "begins with s3://, gs://, hf:// or https://, found 'ftp'",
    "s3://": "names no store: expected s3://BUCKET/FOLDER",
    "s3://KEY:hunter2@bucket/store": "name, a password or a query",
    "gs://bucket/store?token=hunter2": "name, a password or a query",
}


@pytest.mark.parametrize("url", BAD)
def test_a_wrong_address_says_what_is_expected(url: str) -> None:
    with pytest.raises(KavaError, match=BAD[url]) as raised:
        TargetsStore.open(url)
    assert "hunter2" not in str(raised.value)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(KavaError, match=r"pip install 'kava\[gs\]'"):
        TargetsStore.open("gs://bucket/store")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(KavaError, match=r"pip install 'kava\[https\]'"):
        TargetsStore.open("https://127.0.0.1/store")


def test_no_secret_of_a_url_is_shown(
    server: ObjectServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = url_of(server).replace("://", "://me:hunter2@") + "?token=hunter2"
    store = TargetsStore.open(secret)
    store.batch([0])
    assert all("token=hunter2" in path for path in server.paths)
    shown = [str(store.path), repr(store.path), str(store.place.path / SHARD)]
    server.fault = lambda _, __: "500"
    for call in (lambda: store.batch(range(len(store))), lambda: TargetsStore.open(secret)):
        with pytest.raises(KavaError) as raised:
            call()
        shown.append(str(raised.value))
    server.fault = lambda _, __: None
    for command in ("inspect", "verify"):
        shown.append(CliRunner().invoke(store_group, [command, secret]).output)
    shown += [*capfd.readouterr()]
    shown += [path.read_text() for path in (tmp_path / "cache").glob(".*.from")]
    assert any(url_of(server) in text for text in shown)
    assert not [text for text in shown if "hunter2" in text]


def test_addresses_are_taken_apart() -> None:
    assert locate(Path("s3://bucket/a/b")) == Url("s3://bucket/a/b")
    assert locate("gcs://bucket/a") == Url("gs://bucket/a")
    assert locate("a/b") == Path("a/b")
    assert str(Url("https://a:b@host:8/x?y=z") / "c") == "https://host:8/x/c"
    assert (Url("https://a:b@host:8/x?y=z") / "c").whole == "https://a:b@host:8/x/c?y=z"
    assert locate("hf://datasets/team/store@main/x") / "c" == Url(
        "hf://datasets/team/store@main/x/c"
    )

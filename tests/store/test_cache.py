"""The cache of remote stores: limited, shared, and never the end of anybody's data."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from benchmarks.object_server import ObjectServer
from kava_core.errors import KavaError
from kava_core.store import Cache, ShardShuffleSampler, TargetsStore, Url, objects
from kava_core.store import cache as cache_module
from kava_core.store.cache import Mismatch
from kava_core.store.checksum import checksum
from kava_core.store.manifest import FileInfo
from tests.store.make import make_targets_store

SIZES = (4, 4, 4, 4, 4, 4, 4, 4)
PLACE = Url("s3://bucket/store")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectServer]:
    make_targets_store(tmp_path / "far" / "store", SIZES)
    with ObjectServer(tmp_path / "far").running() as server:
        yield server


def file_of(content: bytes) -> FileInfo:
    return FileInfo(blake3=checksum([content]), bytes=len(content))


def put(cache: Cache, content: bytes, there: bool = True) -> Path:
    """A copy in the cache, of an object that is still there or not."""
    return cache.get(file_of(content), PLACE, lambda: [content], lambda _: there)


def copies(cache: Cache) -> set[bytes]:
    return {p.read_bytes() for p in cache.folder.glob("[0-9a-f]*.*")}


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 30)
    for content in (b"a" * 10, b"b" * 10, b"c" * 10):
        put(cache, content)
    put(cache, b"a" * 10)  # used again
    put(cache, b"d" * 10)
    assert copies(cache) == {b"a" * 10, b"c" * 10, b"d" * 10}


def test_an_only_copy_is_never_removed(tmp_path: Path) -> None:
    """The object is gone: the copy is all that is left of it, and the cache would rather fail."""
    cache = Cache(tmp_path / "cache", 20)
    put(cache, b"a" * 10)
    put(cache, b"b" * 10)
    with pytest.raises(KavaError, match="is the only copy there is"):
        put(cache, b"c" * 10, there=False)
    assert copies(cache) == {b"a" * 10, b"b" * 10}


def test_copies_outlive_a_store_that_is_deleted(server: ObjectServer, tmp_path: Path) -> None:
    manifest = TargetsStore.open(f"{server.url}/store").manifest
    shard = manifest.files["shard-00000.safetensors"].bytes
    cache = Cache(tmp_path / "cache", manifest.files["index.arrow"].bytes + 2 * shard + 99)
    store = TargetsStore.open(f"{server.url}/store", cache=cache)
    store.batch(range(8))
    before = copies(cache)
    for file in (tmp_path / "far" / "store").iterdir():
        if file.name != "shard-00007.safetensors":
            file.unlink()
    with pytest.raises(KavaError, match="is the only copy there is"):
        store.batch(range(28, 32))
    assert copies(cache) == before


def test_nothing_is_removed_that_the_cache_did_not_put_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 20)
    put(cache, b"a" * 10)
    mine = cache.folder / f"{'0' * 64}.mine"
    mine.write_bytes(b"x" * 100)
    other = cache.folder / ("0" * 64)
    other.write_bytes(b"y" * 100)
    link = cache.path(file_of(b"linked")).with_name(put(cache, b"a" * 10).name.replace("a", "0"))
    target = tmp_path / "precious"
    target.write_bytes(b"p" * 100)
    link.symlink_to(target)
    put(cache, b"b" * 10)
    put(cache, b"c" * 10)
    assert mine.exists() and other.exists() and link.is_symlink() and target.exists()
    assert {b"b" * 10, b"c" * 10} <= copies(cache)


def test_a_folder_with_other_files_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(KavaError, match="expected an empty folder or a cache"):
        put(Cache(tmp_path, 1), b"a")
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt"}


def test_a_store_on_this_machine_is_never_cached(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store", (3,))
    before = {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()}
    cache = Cache(tmp_path / "cache", 1)
    for path in (tmp_path / "store", f"file://{tmp_path / 'store'}"):
        TargetsStore.open(path, cache=cache).batch([0, 1, 2])
    assert not cache.folder.exists()
    assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == before


def test_a_wrong_content_never_appears(tmp_path: Path) -> None:
    cache, info = Cache(tmp_path / "cache", 100), file_of(b"right")
    for wrong in (b"wrong", b"righ", b"right and more"):
        with pytest.raises(Mismatch):
            cache.get(info, PLACE, lambda wrong=wrong: [wrong], lambda _: True)
        assert not cache.path(info).exists()
    assert not list(cache.folder.glob("*.part")) and not list(cache.folder.glob(".*.part"))


def test_what_a_killed_process_left_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 20)
    name = put(cache, b"a" * 10).name
    part = cache.folder / f".{'e' * 64}.{name.partition('.')[2]}.01234567.part"
    part.write_bytes(b"torn" * 2)
    put(cache, b"b" * 10)
    assert not part.exists()
    assert copies(cache) == {b"a" * 10, b"b" * 10}


def put_and_die(cache: Cache, at: int, survived: int) -> None:
    """Fetch a file, and be killed at the `at`-th thing that is done to the disk."""
    done = 0

    def look(event: str, _: object) -> None:
        nonlocal done
        if event in ("open", "os.truncate", "os.rename", "os.remove", "os.mkdir", "os.link"):
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    put(cache, b"a" * 10)
    os._exit(survived)


def test_wherever_it_is_killed_a_copy_makes_room(tmp_path: Path) -> None:
    for at in range(1, 100):
        cache = Cache(tmp_path / str(at), 10)
        child = multiprocessing.get_context("fork").Process(target=put_and_die, args=(cache, at, 7))
        child.start()
        child.join()
        put(cache, b"b" * 10)
        assert copies(cache) == {b"b" * 10}, at
        if child.exitcode == 7:
            break
        assert child.exitcode == -signal.SIGKILL
    assert 10 < at < 99


def test_a_copy_whose_origin_was_lost_gets_one_when_it_is_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10)
    for left in (b"", None):
        copy = put(cache, b"a" * 10)
        origin = copy.with_name(f".{copy.name}.from")
        origin.unlink() if left is None else origin.write_bytes(left)
        with pytest.raises(KavaError, match="is the only copy there is"):
            put(cache, b"b" * 10)
        put(cache, b"a" * 10)
    put(cache, b"b" * 10)
    assert copies(cache) == {b"b" * 10}


def test_threads_that_want_the_same_file_fetch_it_once(tmp_path: Path) -> None:
    cache, fetched = Cache(tmp_path / "cache", 1000), []

    def pieces() -> Iterable[bytes]:
        fetched.append(threading.get_ident())
        yield b"a" * 10

    def get() -> None:
        cache.get(file_of(b"a" * 10), PLACE, pieces, lambda _: True)

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def read_all(url: str, cache: Cache, seed: int, results: multiprocessing.Queue) -> None:
    store = TargetsStore.open(url, cache=cache)
    sampler = ShardShuffleSampler(store.sizes, seed=seed, window=2, ahead=store.fetch_ahead)
    total = 0.0
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for i in sampler:
            total += float(store.batch([i]).dequantise().endpoint.double().sum())
    held = sum(p.stat().st_size for p in cache.folder.glob("*.*") if p.name[0] != ".")
    results.put((total, held <= cache.limit + 100))


def test_two_processes_share_a_small_cache(server: ObjectServer, tmp_path: Path) -> None:
    """Each is always reading what the other one may have no use for."""
    url = f"{server.url}/store"
    files = TargetsStore.open(url).manifest.files
    limit = files["index.arrow"].bytes + 5 * files["shard-00000.safetensors"].bytes
    cache, context = Cache(tmp_path / "cache", limit), multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=read_all, args=(url, cache, seed, results)) for seed in (1, 2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    local = TargetsStore.open(tmp_path / "far" / "store")
    every = local.batch(range(len(local))).dequantise().endpoint.double()
    for total, fits in found:
        assert total == pytest.approx(3 * float(every.sum()))
        assert fits
    assert max(server.asked[name] for name in files if name.startswith("shard")) > 1


def test_maps_of_what_was_removed_are_let_go(server: ObjectServer, tmp_path: Path) -> None:
    url = f"{server.url}/store"
    files = TargetsStore.open(url).manifest.files
    limit = files["index.arrow"].bytes + 2 * files["shard-00000.safetensors"].bytes
    store = TargetsStore.open(url, cache=Cache(tmp_path / "cache", limit))
    for i in range(0, 32, 4):
        store.batch([i])
        assert len(store._maps) <= 2


def test_a_cache_that_cannot_hold_what_is_mixed_is_refused(
    server: ObjectServer, tmp_path: Path
) -> None:
    url = f"{server.url}/store"
    store = TargetsStore.open(url, cache=Cache(tmp_path / "cache", 10_000))
    sampler = ShardShuffleSampler(store.sizes, seed=1, window=8, ahead=store.fetch_ahead)
    with pytest.raises(KavaError, match=r"index and 8 shards .* KAVA_CACHE_SIZE to at least"):
        next(iter(sampler))
    with pytest.raises(KavaError, match=r"it may hold 1\.0 kB"):
        TargetsStore.open(url, cache=Cache(tmp_path / "small", 1000)).batch([0])


@pytest.mark.parametrize("written", [0, 1])
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Be it at the note of where a copy comes from, or at the copy."""
    write, lengths = cache_module._write, [written]

    def full(descriptor: int, piece: bytes) -> None:
        if lengths[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lengths[0] -= 1
        write(descriptor, piece)

    cache = Cache(tmp_path / "cache", 100)
    monkeypatch.setattr(cache_module, "_write", full)
    with pytest.raises(KavaError, match=r"no room for s3://bucket/store .*: its disk is full"):
        put(cache, b"a")


def test_the_environment_says_where_and_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("KAVA_CACHE_SIZE", "1.5 GB")
    assert Cache.default() == Cache(tmp_path / "here", 1_500_000_000)
    monkeypatch.delenv("KAVA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.default().folder == tmp_path / "kava" / "stores"
    for wrong in ("lots", "-1GB", "0", ""):
        monkeypatch.setenv("KAVA_CACHE_SIZE", wrong)
        with pytest.raises(KavaError, match="must be a size such as 50GB"):
            Cache.default()

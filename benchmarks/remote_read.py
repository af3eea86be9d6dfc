"""Whether training waits for a store on object storage.

    python benchmarks/remote_read.py            # a table
    python benchmarks/remote_read.py --json     # the figures, for a script

A targets store of Llama-3.2-1B geometry (16 layers × 8 heads × 24 slots × 64 at 4 bits, and 17
endpoint states of 2048 in bfloat16) lies behind `object_server.py`, in a process of its own, which
lets 200 MB/s through for all connections together and waits 20 ms before each answer. It is read in
the order of training, by a thread that is up to four batches ahead, through a cache that holds two
windows of shards, so that copies are removed while others come.

Training itself is a pause: after each batch the reader rests for as long as an accelerator would
compute. Without --rate that is taken from arithmetic: 6 FLOPs per weight and token (forward and
backward), of a question of 60 tokens, 24 latents in 3 Jacobi iterations and an answer of 10, with
1.24 billion weights, on an accelerator of 989 TFLOP/s (H100, bfloat16) of which 40 % are reached.

What is reported: the seconds until the first batch (its records lie in as many shards as are mixed
at a time, which all must come first); of the time after it, the share spent waiting for batches;
the same for the store on this disk; and the rate at which the line could be read without pauses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from queue import Queue
from threading import Thread

from rich.console import Console
from rich.table import Table
from store_read import shard_records, shard_tensors

from kava_core.artefacts import read_json
from kava_core.distill.batches import TargetsDataset
from kava_core.store import (
    Cache,
    Codec,
    Geometry,
    ShardShuffleSampler,
    StoreSpec,
    TargetsStore,
    finalise,
    write_targets_shard,
)
from kava_core.store.checksum import file_checksum

GEOMETRY = Geometry.plain(layers=16, kv_heads=8, head_dim=64, hidden_size=2048, slots=24)
SPEC = StoreSpec(GEOMETRY, Codec(keys="uint4", values="uint4"))
SHARD, BATCH, AHEAD = 64, 32, 4
WEIGHTS, TOKENS = 1.24e9, 60 + 24 * 3 + 10
FLOPS = 0.4 * 989e12
SERVER = Path(__file__).with_name("object_server.py")


@dataclass(frozen=True)
class Reading:
    """start: seconds until the first batch; waited: share of the time after it spent waiting;
    rate: records per second after it."""

    start: float
    waited: float
    rate: float


def needed_rate() -> float:
    """Records per second that training takes, by the arithmetic above."""
    return FLOPS / (6 * WEIGHTS * TOKENS)


def write_store(folder: Path, shards: int) -> None:
    """A store whose shards differ in a few bytes: as much to read as any, and quickly made."""
    folder.mkdir()
    write_targets_shard(folder, SPEC, 0, shard_records(0), **shard_tensors(0))
    first, side = folder / "shard-00000.safetensors", read_json(folder / "shard-00000.json")
    for k in range(1, shards):
        copy = folder / f"shard-{k:05d}.safetensors"
        shutil.copyfile(first, copy)
        with copy.open("r+b") as file:  # the last bytes are codes: any will do
            file.seek(-8, os.SEEK_END)
            file.write(k.to_bytes(8, "little"))
        side |= {"shard": k, "blake3": file_checksum(copy)}
        side["columns"] |= {"shard": [k] * SHARD, "id": [f"{k}-{i}" for i in range(SHARD)]}
        copy.with_suffix(".json").write_text(json.dumps(side))
    finalise(folder, SPEC, shards=shards, settings={}, fingerprints={})


@contextmanager
def served(folder: Path, rate: float, latency: float) -> Iterator[str]:
    """The URL of the folder behind a slow server in a process of its own."""
    command = [sys.executable, str(SERVER), str(folder)]
    command += ["--rate", str(rate), "--latency", str(latency)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


def read(store: TargetsStore, rate: float | None, window: int, epochs: int) -> Reading:
    """Read `epochs` epochs in the order of training; rate: of the training that is paused for."""
    sampler = ShardShuffleSampler(store.sizes, seed=1, window=window, ahead=store.fetch_ahead)
    dataset = TargetsDataset(store, chains=False)
    ready: Queue[object] = Queue(AHEAD)

    def load() -> None:
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            order = iter(sampler)
            while indices := list(islice(order, BATCH)):
                ready.put(dataset.__getitems__(indices))

    began, waited = time.perf_counter(), 0.0
    Thread(target=load, daemon=True).start()
    ready.get()
    first = time.perf_counter()
    batches = epochs * len(store) // BATCH - 1
    for _ in range(batches):
        if rate is not None:
            time.sleep(BATCH / rate)
        asked = time.perf_counter()
        ready.get()
        waited += time.perf_counter() - asked
    took = time.perf_counter() - first
    return Reading(first - began, waited / took, batches * BATCH / took)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--line", type=float, default=200, help="MB/s that the server lets through")
    parser.add_argument("--latency", type=float, default=20, help="ms before each answer")
    parser.add_argument("--rate", type=float, default=needed_rate(), help="records/s of training")
    parser.add_argument("--shards", type=int, default=64, help=f"shards, of {SHARD} records")
    parser.add_argument("--window", type=int, default=16, help="shards mixed at a time")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        write_store(folder / "store", asked.shards)
        near = TargetsStore.open(folder / "store")
        size = near.manifest.files["shard-00000.safetensors"].bytes
        limit = near.manifest.files["index.arrow"].bytes + 2 * asked.window * size
        found = {"this disk": read(near, asked.rate, asked.window, asked.epochs)}
        with served(folder, asked.line, asked.latency) as url:
            for title, rate in (("object storage", asked.rate), ("without pauses", None)):
                store = TargetsStore.open(f"{url}/store", cache=Cache(folder / title, limit))
                found[title] = read(store, rate, asked.window, asked.epochs)
    record = size / SHARD
    needs = asked.rate * record / 1e6
    if asked.json:
        figures = {title: asdict(reading) for title, reading in found.items()}
        json.dump({"needed_mb_per_s": needs, **figures}, sys.stdout, indent=2)
        print()
        return
    title = (
        f"{asked.shards * SHARD} records of {record / 1e3:.0f} kB, {asked.line:g} MB/s, "
        f"{asked.latency:g} ms; training takes {asked.rate:.0f} records/s, {needs:.0f} MB/s"
    )
    table = Table("", "first batch, s", "waited, %", "records/s", "MB/s", title=title)
    for where, reading in found.items():
        table.add_row(
            where,
            f"{reading.start:.1f}",
            f"{100 * reading.waited:.1f}",
            f"{reading.rate:.0f}",
            f"{reading.rate * record / 1e6:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

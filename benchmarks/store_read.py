"""How fast a targets store is read and written, against the usual ways to keep the same tensors.

    python benchmarks/store_read.py            # a table
    python benchmarks/store_read.py --json     # the ratios, for a script

Shuffled batches of 32 records of Llama-3.2-1B geometry (16 layers × 8 heads × 24 slots × 64, and 17
endpoint states of 2048, bfloat16) are read into one reused buffer: through our reader, from one
`torch.save` file per record, from one safetensors file per record, from a Hugging Face `datasets`
Arrow table, and by `index_select` from memory, on one core and on all: the faster is the ceiling.
All else uses one core. Everything is read once before
it is timed (warm page cache, checksums checked); the systems take turns, round by round, and a
system's figure is its median round. Writing compares a shard with its checksum, statistics and side
record against a bare `safetensors.save_file` of the same tensors, both fsynced.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from kava_core.artefacts import sync
from kava_core.record import Record
from kava_core.store import (
    Codec,
    Geometry,
    StoreSpec,
    TargetsStore,
    finalise,
    write_targets_shard,
)

GEOMETRY = Geometry.plain(layers=16, kv_heads=8, head_dim=64, hidden_size=2048, slots=24)
SPEC = StoreSpec(GEOMETRY, Codec())
CEILING = "index_select from memory"
BATCH = 32
SHARD = 64
Read = Callable[[Sequence[int]], object]


def shard_tensors(seed: int) -> dict[str, Tensor]:
    """A shard's worth of random targets, all slots filled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SHARD, len(GEOMETRY.rows), GEOMETRY.kv_heads, GEOMETRY.slots)
    levels = GEOMETRY.model_layers + 1

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(torch.bfloat16)

    return {
        "keys": normal(*shape, GEOMETRY.head_dim),
        "values": normal(*shape, GEOMETRY.head_dim),
        "endpoint": normal(SHARD, levels, GEOMETRY.hidden_size),
        "slot_counts": torch.full(shape[:-1], GEOMETRY.slots, dtype=torch.int32),
        "slot_positions": torch.arange(GEOMETRY.slots, dtype=torch.int32).expand(shape).clone(),
    }


def shard_records(shard: int) -> list[Record]:
    tokens = list(range(GEOMETRY.slots))
    return [
        Record(f"{shard}-{i}", tokens, tokens, [1], [2], "random", "none", 3) for i in range(SHARD)
    ]


def write_ours(folder: Path, shard: int, tensors: dict[str, Any]) -> None:
    write_targets_shard(folder, SPEC, shard, shard_records(shard), **tensors)


def our_store(folder: Path, data: dict[str, Tensor]) -> Read:
    folder.mkdir()
    shards = len(data["keys"]) // SHARD
    for shard in range(shards):
        part = slice(shard * SHARD, (shard + 1) * SHARD)
        write_ours(folder, shard, {name: x[part] for name, x in data.items()})
    finalise(folder, SPEC, shards=shards, settings={}, fingerprints={})
    store = TargetsStore.open(folder)
    buffer = store.buffer(BATCH)
    return lambda indices: store.batch(indices, out=buffer)


def in_memory(data: dict[str, Tensor], threads: int) -> Read:
    buffer = empty_batch(data)

    def read(indices: Sequence[int]) -> None:
        torch.set_num_threads(threads)
        chosen = torch.tensor(indices)
        for name, x in data.items():
            torch.index_select(x, 0, chosen, out=buffer[name])
        torch.set_num_threads(1)

    return read


def file_per_record(
    folder: Path,
    data: dict[str, Tensor],
    save: Callable[[dict[str, Tensor], Path], None],
    load: Callable[[Path], dict[str, Tensor]],
) -> Read:
    folder.mkdir()
    for i in range(len(data["keys"])):
        save({name: x[i].clone() for name, x in data.items()}, folder / str(i))
    buffer = empty_batch(data)

    def read(indices: Sequence[int]) -> None:
        records = [load(folder / str(i)) for i in indices]
        for name, x in buffer.items():
            torch.stack([record[name] for record in records], out=x)

    return read


def hugging_face_datasets(folder: Path, data: dict[str, Tensor]) -> Read:
    """Fixed-length lists, bfloat16 as int16: the quickest layout that `datasets` offers."""
    import datasets

    datasets.disable_progress_bars()
    columns = {}
    for name, x in data.items():
        flat = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).flatten(1)
        values = pa.array(flat.reshape(-1).numpy())
        columns[name] = pa.FixedSizeListArray.from_arrays(values, flat.shape[1])
    step = SHARD  # Arrow tables are best read in chunks of a modest size
    table = pa.concat_tables(
        pa.table({name: column.slice(i, step) for name, column in columns.items()})
        for i in range(0, len(data["keys"]), step)
    )
    datasets.Dataset(table).save_to_disk(str(folder))
    loaded = datasets.load_from_disk(str(folder)).with_format("numpy")
    buffer = empty_batch(data)

    def read(indices: Sequence[int]) -> None:
        batch: Any = loaded[list(indices)]
        for name, x in buffer.items():
            plain = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
            plain.copy_(torch.from_numpy(np.asarray(batch[name])).view(x.shape))

    return read


def empty_batch(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(BATCH, *x.shape[1:], dtype=x.dtype) for name, x in data.items()}


def torch_save(record: dict[str, Tensor], path: Path) -> None:
    torch.save(record, path)


def measure_reads(folder: Path, records: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round (an epoch in a new order) of each system."""
    parts = [shard_tensors(seed) for seed in range(records // SHARD)]
    data = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    systems = {
        **{
            f"{CEILING}, {threads} threads": in_memory(data, threads)
            for threads in sorted({1, torch.get_num_threads()})
        },
        "store": our_store(folder / "store", data),
        "torch.save per record": file_per_record(folder / "torch", data, torch_save, torch.load),
        "safetensors per record": file_per_record(folder / "files", data, save_file, load_file),
        "datasets": hugging_face_datasets(folder / "datasets", data),
    }
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        order = torch.randperm(records, generator=torch.Generator().manual_seed(turn)).tolist()
        for name, read in systems.items():
            start = time.perf_counter()
            for i in range(0, records, BATCH):
                read(order[i : i + BATCH])
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure_writes(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round (one shard) of both ways to write."""
    tensors = shard_tensors(0)
    seconds: dict[str, list[float]] = {"store": [], "safetensors": []}

    def plain(target: Path) -> None:
        save_file(tensors, target / "plain.safetensors")
        sync(target / "plain.safetensors")

    for turn in range(rounds + 1):
        for name, write in (
            ("safetensors", plain),
            ("store", lambda target: write_ours(target, 0, tensors)),
        ):
            target = folder / f"write-{name}-{turn}"
            target.mkdir()
            start = time.perf_counter()
            write(target)
            if turn:
                seconds[name].append(time.perf_counter() - start)
            shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the ratios as JSON")
    parser.add_argument("--records", type=int, default=512, help="records, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, at least 5")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files")
    arguments = parser.parse_args()
    if arguments.rounds < 5 or arguments.records < SHARD or arguments.records % SHARD:
        parser.error("--rounds must be at least 5, --records a multiple of 64")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        reads = measure_reads(Path(name), arguments.records, arguments.rounds)
        writes = measure_writes(Path(name), 3 * arguments.rounds)
    read = {system: statistics.median(times) for system, times in reads.items()}
    write = {system: statistics.median(times) for system, times in writes.items()}
    ceiling = min(taken for system, taken in read.items() if system.startswith(CEILING))
    ratios = {
        "read_vs_ceiling": ceiling / read["store"],
        "read_vs_torch_save": read["torch.save per record"] / read["store"],
        "read_vs_safetensors": read["safetensors per record"] / read["store"],
        "read_vs_datasets": read["datasets"] / read["store"],
        "write_vs_safetensors": write["safetensors"] / write["store"],
    }
    if arguments.json:
        json.dump({name: round(value, 3) for name, value in ratios.items()}, sys.stdout, indent=2)
        print()
        return
    record = sum(x[0].nbytes for x in shard_tensors(0).values())
    table = Table("", "GB/s", "records/s", title=f"batches of {BATCH}, {record / 1e3:.0f} kB each")
    for system, taken in read.items():
        rate = arguments.records / taken
        table.add_row(f"read: {system}", f"{rate * record / 1e9:.2f}", f"{rate:.0f}")
    for system, taken in write.items():
        rate = SHARD / taken
        table.add_row(f"write: {system}", f"{rate * record / 1e9:.2f}", f"{rate:.0f}")
    Console().print(table)
    for ratio, value in ratios.items():
        print(f"{ratio:22} {value:.2f}")


if __name__ == "__main__":
    main()

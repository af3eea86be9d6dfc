"""Opening is quick and memory stays flat, however large the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kava_core.artefacts import read_json
from kava_core.store import Codec, Geometry, write_targets_shard
from tests.store.make import finish, make_spec, targets_data

LLAMA = Geometry.plain(layers=16, kv_heads=8, head_dim=64, hidden_size=2048, slots=24)
SHARD = 32  # records, 27.8 MB in bfloat16

READ = """
import json, sys, time
from pathlib import Path
from kava_core.store import ShardShuffleSampler, TargetsStore

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))

TargetsStore.open(sys.argv[1])
start = time.perf_counter()
store = TargetsStore.open(sys.argv[1])
opened = time.perf_counter() - start
buffer = store.buffer(32)
order = list(ShardShuffleSampler(store.sizes, seed=1))
for i in range(0, 64, 32):
    store.batch(order[i : i + 32], out=buffer)
before = anonymous()
for i in range(0, len(order), 32):
    batch = store.batch(order[i : i + 32], out=buffer)
    ids = [store.index.tokens(j, "cot_ids") for j in batch.indices]
print(json.dumps({"opened": opened, "before": before, "after": anonymous()}))
"""


def repeat_shard(folder: Path, shards: int) -> None:
    """Shards 1 … of a store as hard links to shard 0, with ids of their own."""
    side = read_json(folder / "shard-00000.json")
    for k in range(1, shards):
        os.link(folder / "shard-00000.safetensors", folder / f"shard-{k:05d}.safetensors")
        side["shard"] = k
        side["columns"]["shard"] = [k] * SHARD
        side["columns"]["id"] = [f"{k}-{i}" for i in range(SHARD)]
        (folder / f"shard-{k:05d}.json").write_text(json.dumps(side))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_flat_from_200_megabytes_to_4_gigabytes(tmp_path: Path) -> None:
    data, spec = targets_data(SHARD, LLAMA), make_spec(LLAMA, Codec())
    found = {}
    for shards in (8, 144):
        folder = tmp_path / str(shards)
        folder.mkdir()
        write_targets_shard(folder, spec, 0, **vars(data))
        repeat_shard(folder, shards)
        finish(folder, spec, shards)
        output = subprocess.run(
            [sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True
        )
        found[shards] = json.loads(output.stdout)
        print(shards, found[shards])
    assert found[144]["opened"] < 0.1
    assert abs(found[144]["after"] - found[144]["before"]) < 10
    assert abs(found[144]["after"] - found[8]["after"]) < 10

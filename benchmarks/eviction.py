"""Cost of eviction per token, against the straightforward N×N formulation, in one run.

    python benchmarks/eviction.py            # a table
    python benchmarks/eviction.py --json     # the same as JSON on stdout

The same number of tokens is evicted at every trace length, with a geometry like Llama-3.2-1B's (16
layers × 8 heads × 64, bfloat16). Both sides do the whole job: R-KV scores, selection, gathering.
They differ in the redundancy alone. Times are medians, in microseconds per token; memory is what
the process grows by at its peak (on a GPU: what is allocated). Then the evict stage as a whole, on
a teacher store on disk, against copying that store's shards with checksums.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from blake3 import blake3
from kava_stages.evict import evict as stage
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kava_core.eviction import POLICIES, CacheBatch, Policy, Targets, evict
from kava_core.eviction.selection import score_all
from kava_core.record import Record
from kava_core.rotary import Rotary
from kava_core.store import Codec, Geometry, StoreSpec, finalise, write_teacher_shard

LENGTHS = (64, 256, 1024, 4096)
LAYERS, HEADS, HEAD_DIM, HIDDEN_SIZE, BUDGET = 16, 8, 64, 2048, 24
ROOT = Path(__file__).resolve().parents[1]
# Two scores this close (relative) are a tie: float32 sums in another order differ by as much.
TIE = 2e-6


@dataclass(frozen=True)
class QuadraticRKV(Policy):
    """R-KV as the formula reads, with an N×N matrix of cosines per head, layer by layer."""

    lambda_: float = 0.1

    def score(self, batch: CacheBatch) -> Tensor:
        score = batch.float_importance() * self.lambda_
        for first, last in batch.spans:
            for layer in range(len(batch.layers)):
                heads = torch.nn.functional.normalize(batch.keys[first:last, layer].float(), dim=-1)
                heads = heads.transpose(0, 1)  # [H, N, D]
                cosines = heads @ heads.transpose(1, 2)  # [H, N, N]
                cosines.diagonal(dim1=1, dim2=2).zero_()
                different = (-cosines.mean(dim=2)).softmax(dim=1)  # [H, N]
                score[first:last, layer] += (1 - self.lambda_) * different.T
        return score


LINEAR, QUADRATIC = POLICIES["rkv"](), QuadraticRKV()


def make_batch(length: int, tokens: int, device: str) -> CacheBatch:
    """`tokens` tokens in traces of `length`, with keys that share a direction, as real ones do."""
    generator = torch.Generator().manual_seed(length)
    shape = (tokens, LAYERS, HEADS, HEAD_DIM)
    keys = torch.randn(shape, generator=generator)
    keys += torch.randn(1, *shape[1:], generator=generator)
    values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    logits = 2 * torch.randn(tokens // length, length, LAYERS, HEADS, generator=generator)
    return CacheBatch.from_ragged(
        keys.to(torch.bfloat16),
        values,
        logits.softmax(dim=1).flatten(0, 1),
        range(0, tokens + 1, length),
        [f"record {i}" for i in range(tokens // length)],
    ).to(device)


def cut(batch: CacheBatch, policy: Policy) -> Targets:
    return evict(batch, policy, [BUDGET] * LAYERS)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """How much memory `run` needs beyond what is there when it starts."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed but did not give back
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise SystemExit("expected /proc/self/status with memory sizes: run on Linux, or on CUDA")
    return int(match[1]) * 1024


def differences(batch: CacheBatch, ours: Targets, theirs: Targets) -> tuple[int, int]:
    """Of all (record, layer, head): how many keep other tokens, and how many of those are ties."""
    mine, reference = ours.slot_positions.long(), theirs.slot_positions.long()
    differ = (mine != reference).any(-1)
    if not differ.any():
        return 0, 0
    scores = score_all(QUADRATIC, batch).unflatten(0, (len(batch.ids), -1))
    scores = scores.permute(0, 2, 3, 1)  # [B, L, H, N]
    kept = [scores.gather(-1, slots).sort(-1).values[differ] for slots in (mine, reference)]
    ties = ((kept[0] - kept[1]).abs() <= TIE * kept[1].abs()).all(-1)
    return int(differ.sum()), int(ties.sum())


@dataclass
class Row:
    """One trace length. Times in µs per token, memory in MB."""

    length: int
    sets: int  # (record, layer, head): one selection each
    differ: int
    ties: int
    linear_us: float
    quadratic_us: float
    linear_mb: float
    quadratic_mb: float


def measure(tokens: int, rounds: int, device: str) -> list[Row]:
    """One row per trace length; rounds go over all lengths, so that a busy moment hits them all."""
    batches = {length: make_batch(length, tokens, device) for length in LENGTHS}
    times: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(rounds + 1):
        for length, batch in batches.items():
            times[length].append(seconds(partial(cut, batch, LINEAR)))
    return [row(batch, times[length][1:], device) for length, batch in batches.items()]


def row(batch: CacheBatch, times: list[float], device: str) -> Row:
    tokens, length = batch.offsets[-1], batch.lengths[0]
    differ, ties = differences(batch, cut(batch, LINEAR), cut(batch, QUADRATIC))
    slow = [seconds(partial(cut, batch, QUADRATIC)) for _ in range(3 if length < 4096 else 1)]
    return Row(
        length,
        len(batch.ids) * LAYERS * HEADS,
        differ,
        ties,
        statistics.median(times) / tokens * 1e6,
        statistics.median(slow) / tokens * 1e6,
        peak_bytes(partial(cut, batch, LINEAR), device) / 1e6,
        peak_bytes(partial(cut, batch, QUADRATIC), device) / 1e6,
    )


def throughput(folder: Path, shards: int, rounds: int) -> tuple[float, float]:
    """Bytes of teacher cache per second: (the whole evict stage, copying its shards).

    Both read every byte with its checksum from a warm page cache and fsync what they write; the
    stage runs in process with one thread, as a command, from opening the store to its manifest.
    """
    store = folder / "data" / "benchmark" / "teacher_kv"
    write_teacher_store(store, shards)
    files = sorted(store.glob("shard-*"))
    size = sum(file.stat().st_size for file in files)
    pipelines = yaml.safe_load((ROOT / "pipelines.yaml").read_text(encoding="utf-8"))["pipelines"]
    pipeline = {
        **pipelines["smoke"],
        "evict": {"policy": "rkv", "budget": BUDGET, "threads": 1},
        "resources": {"workers": 0},
    }
    settings = folder / "pipelines.yaml"
    settings.write_text(json.dumps({"pipelines": {"benchmark": pipeline}}), encoding="utf-8")
    command = ["--pipeline", "benchmark", "--pipelines", str(settings)]
    command += ["--data", str(folder / "data")]
    times: dict[str, list[float]] = {"stage": [], "copy": []}
    for _ in range(rounds + 1):
        times["stage"].append(seconds(partial(stage.main, command, standalone_mode=False)))
        times["copy"].append(seconds(partial(copy_with_checksums, files, folder / "copy")))
    stage_time, copy_time = (statistics.median(runs[1:]) for runs in times.values())  # warm
    return size / stage_time, size / copy_time


def write_teacher_store(folder: Path, shards: int) -> None:
    """Shards of 64 random traces of 64 to 192 tokens, 32 KB of keys and values per token."""
    folder.mkdir(parents=True)
    geometry = Geometry.plain(
        layers=LAYERS, kv_heads=HEADS, head_dim=HEAD_DIM, hidden_size=HIDDEN_SIZE
    )
    rotary = Rotary(torch.ones(LAYERS, HEAD_DIM // 2).double(), torch.ones(LAYERS).double())
    spec = StoreSpec(geometry, Codec(), "pre_rope", rotary)
    generator = torch.Generator().manual_seed(0)
    for shard in range(shards):
        lengths = torch.randint(64, 193, (64,), generator=generator).tolist()
        shape = (sum(lengths), LAYERS, HEADS, HEAD_DIM)
        write_teacher_shard(
            folder,
            spec,
            shard,
            [
                Record(f"{shard}-{i}", [1] * 60, [1] * n, [1] * 4, [1] * 4, "random", "", 0, "")
                for i, n in enumerate(lengths)
            ],
            keys=torch.randn(shape, generator=generator),
            values=torch.randn(shape, generator=generator),
            importance=torch.rand(shape[:3], generator=generator),
            endpoint=torch.randn(64, LAYERS + 1, HIDDEN_SIZE, generator=generator),
        )
    finalise(
        folder,
        spec,
        shards=shards,
        settings={},
        fingerprints=dict.fromkeys(("problems", "teacher", "tokenizer"), "0" * 64),
    )


def copy_with_checksums(files: list[Path], folder: Path) -> None:
    """Copy files, hashing what passes (as a store does) and fsyncing what is written."""
    folder.mkdir(exist_ok=True)
    for source in files:
        digest = blake3()
        with source.open("rb") as read, (folder / source.name).open("wb") as write:
            while piece := read.read(1 << 20):
                digest.update(piece)
                write.write(piece)
            write.flush()
            os.fsync(write.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens at each trace length")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs per trace length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shards", type=int, default=3, help="of about 270 MB, for the stage")
    parser.add_argument("--folder", help="where to put them; default: the temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = measure(options.tokens, options.rounds, options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stage_rate, copy_rate = throughput(Path(folder), options.shards, 3)
    at = {row.length: row for row in rows}
    result = {
        "selections_equal": all(row.differ == row.ties for row in rows),
        "cost_per_token_4096_vs_256": at[4096].linear_us / at[256].linear_us,
        "speedup_vs_quadratic_1024": at[1024].quadratic_us / at[1024].linear_us,
        "throughput_vs_copy": stage_rate / copy_rate,
    }
    if options.json:
        json.dump({**result, "rows": [asdict(row) for row in rows]}, sys.stdout, indent=2)
        print()
        return
    table = Table(
        title=f"R-KV, {options.tokens} tokens, {LAYERS} layers × {HEADS} heads × {HEAD_DIM}, "
        f"M = {BUDGET}, {options.device}, {options.threads} threads"
    )
    for name in ("N_C", "µs/token", "N×N µs/token", "speed-up", "peak MB", "N×N peak MB", "differ"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.length),
            f"{row.linear_us:.1f}",
            f"{row.quadratic_us:.1f}",
            f"{row.quadratic_us / row.linear_us:.1f}×",
            f"{row.linear_mb:.0f}",
            f"{row.quadratic_mb:.0f}",
            f"{row.differ} of {row.sets}, {row.ties} ties",
        )
    console = Console(width=110)
    console.print(table)
    console.print(
        f"evict stage {stage_rate / 1e6:.0f} MB/s of teacher cache, "
        f"copying with checksums {copy_rate / 1e6:.0f} MB/s"
    )
    for name, value in result.items():
        console.print(f"{name} = {value if isinstance(value, bool) else format(value, '.2f')}")


if __name__ == "__main__":
    main()

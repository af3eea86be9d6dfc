"""What a second worker is worth: examples per second of two workers over those of one.

    python benchmarks/workers.py [--json] [--rounds 3] [--stage evict …]

The jobs of generate, evict, fidelity and evaluate run on Ray as their stages run them, each worker
with one torch thread. Eviction has caches of random numbers in shards of 128 records: in one of
eight it would be done before Ray had handed out the next. Rounds alternate between one worker and
two; medians are reported. A worker's rate is taken from the end of its first shard to the end of
its last, so that starting processes, importing and loading models are out of it; they are reported
beside it. A machine that does anything else takes from two workers what one does not miss: run it
on two idle cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import ray
import torch
from kava_stages.cli import quiet
from rich.console import Console
from rich.table import Table

from kava_core.evaluation.job import EvaluateJob
from kava_core.evaluation.parts import Material, Plan
from kava_core.evaluation.systems import Systems
from kava_core.eviction.policies.crop import Crop
from kava_core.eviction.policies.rkv import RKV
from kava_core.fidelity.job import FidelityJob, open_source
from kava_core.fidelity.job import Material as FidelityMaterial
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import build_llama, save_model
from kava_core.parallel.shards import Job, run_shards
from kava_core.problems.folder import write_problems, write_test_sets
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.settings import Evaluate, Evict, Fidelity, FidelityBits, Generate, Resources
from kava_core.store import StoreSpec, TeacherStore, finalise, write_teacher_shard
from kava_core.targets.evict import EvictJob, cache_batch, targets_spec
from kava_core.targets.generate import GenerateJob, Reading, teacher_spec
from kava_core.targets.plan import Plan as TargetsPlan
from kava_core.targets.quarantine import Quarantine

TARGET = 1.8
STAGES = ("generate", "evict", "fidelity", "evaluate")
SHARD, SHARDS = 8, 24
EVICTED = 128  # records of a shard of eviction
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "intermediate_size": 688,
}


@dataclass(frozen=True)
class Timed:
    """A job whose results say who worked, and when each shard began and ended."""

    job: Job[Any]

    @property
    def threads(self) -> int:
        return self.job.threads

    def open(self) -> Callable[[int], tuple[int, float, float]]:
        work = self.job.open()

        def timed(shard: int) -> tuple[int, float, float]:
            began = time.time()
            work(shard)
            return os.getpid(), began, time.time()

        return timed


@dataclass(frozen=True)
class Bench:
    """A job to be made anew for every run, its shards, how many examples one holds, and a folder
    that all workers see."""

    make: Callable[[], Job[Any]]
    shards: Sequence[int]
    examples: int
    folder: Path

    def run(self, workers: int) -> tuple[float, float]:
        """Examples per second without starting up, and the seconds that starting up takes."""
        called = time.time()
        spans: dict[int, list[tuple[float, float]]] = {}
        for _, (pid, began, ended) in run_shards(
            Timed(self.make()),
            self.shards,
            Resources(workers=workers, device="cpu"),
            folder=self.folder,
            examples=lambda *_: self.examples,
        ):
            spans.setdefault(pid, []).append((began, ended))
        rate = 0.0
        for done in spans.values():
            done.sort()
            if len(done) > 1:
                rate += (len(done) - 1) * self.examples / (done[-1][1] - done[0][1])
        return rate, max(done[0][0] for done in spans.values()) - called


def write_random_caches(folder: Path, spec: StoreSpec, traces: Sequence[Record]) -> TeacherStore:
    """A teacher's store of these traces, again and again, with random numbers."""
    folder.mkdir()
    geometry = spec.geometry
    shape = (len(geometry.rows), geometry.kv_heads, geometry.head_dim)
    for shard in range(SHARDS):
        records = [
            replace(traces[(shard + i) % len(traces)], id=f"{shard}-{i}") for i in range(EVICTED)
        ]
        tokens = sum(len(record.cot_ids) for record in records)
        write_teacher_shard(
            folder,
            spec,
            shard,
            records,
            keys=torch.randn(tokens, *shape),
            values=torch.randn(tokens, *shape),
            importance=torch.rand(tokens, *shape[:2]),
            endpoint=torch.randn(EVICTED, geometry.model_layers + 1, geometry.hidden_size),
        )
    finalise(folder, spec, shards=SHARDS, settings={}, fingerprints={"teacher": "random"})
    return TeacherStore.open(folder)


def benches(home: Path) -> dict[str, Bench]:
    """Problems, a random teacher and a student of it in `home`; the jobs over them."""
    problems, test_sets, teacher = home / "problems", home / "test_sets", home / "teacher"
    source = Synthetic(steps=(4, 4), style="prose")
    splits = source.splits(SHARD * SHARDS, SHARD, SHARD * SHARDS, seed=0, traces="sentences")
    for folder, write in ((problems, write_problems), (test_sets, write_test_sets)):
        folder.mkdir()
        write(folder, splits, "sentences", {})
    tokenizer = train_tokenizer([p.question + " ".join(p.steps) for p in splits.train], 300)
    model = build_llama(tokenizer, context_length=1024, rope_theta=10000.0, seed=0, **MODEL)
    save_model(teacher, model, tokenizer)

    generate = Generate(shard_size=SHARD, batch_size=SHARD, threads=1)
    reading = Reading(problems, teacher, generate)
    (home / "store").mkdir()
    left_out = Quarantine(home / "quarantine")
    generated = GenerateJob(reading, home / "store", teacher_spec(model, generate), left_out)

    encoder = TraceEncoder(tokenizer, "sentences")
    traces = encoder.encode_all(splits.train)
    store = write_random_caches(home / "caches", teacher_spec(model, generate), traces)
    plan = TargetsPlan.of(Evict(budget=16), store.geometry)
    batches = (cache_batch(store, number) for number in range(store.shards))
    (home / "targets").mkdir()
    spec = targets_spec(plan, store.manifest.rotary.rotation, batches)
    cut = EvictJob(home / "caches", home / "targets", plan, spec)

    sizes: dict[str, Any] = {"batch_size": SHARD, "max_new_tokens": 16, "threads": 1}
    grid = Fidelity(
        split="test",
        limit=None,
        policies=(RKV(), Crop()),
        budgets=(4, 16),
        bits=(FidelityBits(keys=16, values=16),),
        **sizes,
    )
    answered = FidelityJob(test_sets, teacher, grid, home / "fidelity")
    material = FidelityMaterial.of(open_source(test_sets, grid), teacher, grid)

    student = LatentReasoner.from_teacher(
        model,
        latents=8,
        iterations=3,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=0,
    )
    student.save_pretrained(home / "student")
    systems = Systems(teacher, {"student": home / "student"}, frozenset())
    settings = Evaluate(interpret_records=0, **sizes)
    asked = Material.open(teacher, problems, test_sets, settings)
    parts = Plan.of(systems, asked, home / "targets", settings, home / "data/p/evaluation")
    (name,) = asked.test_sets
    asking = EvaluateJob(systems, parts, problems, test_sets, home / "targets", settings)

    def fresh() -> FidelityJob:  # it passes over what is there
        return replace(answered, work=Path(tempfile.mkdtemp(dir=home)))

    return {
        "generate": Bench(lambda: generated, range(SHARDS), SHARD, home),
        "evict": Bench(lambda: cut, range(SHARDS), EVICTED, home),
        "fidelity": Bench(fresh, range(material.shards), SHARD, home),
        "evaluate": Bench(lambda: asking, parts.of_kind("answers", "student", name), SHARD, home),
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the ratios.")
@click.option("--rounds", default=3, show_default=True, help="Timed rounds of each.")
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES), default=STAGES)
def main(as_json: bool, rounds: int, stages: tuple[str, ...]) -> None:
    """Compare two workers with one."""
    quiet()
    busy = os.getloadavg()[0]
    table = Table()
    for column in ("stage", "1 worker, examples/s", "2 workers", "ratio", "start-up, s (1, 2)"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    ratios = {}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        for stage, bench in benches(Path(name)).items():
            if stage not in stages:
                continue
            found = [(bench.run(1), bench.run(2)) for _ in range(rounds)]
            # Round by round, so that a machine that drifts drifts under both.
            ratios[stage] = statistics.median(two[0] / one[0] for one, two in found)
            one, two = (
                [statistics.median(run[which][i] for run in found) for i in (0, 1)]
                for which in (0, 1)
            )
            table.add_row(
                stage,
                f"{one[0]:.1f}",
                f"{two[0]:.1f}",
                f"{ratios[stage]:.2f}",
                f"{one[1]:.1f}, {two[1]:.1f}",
            )
    ray.shutdown()
    if as_json:
        print(json.dumps({"workers": ratios, "load_before": busy}))
        return
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(f"target: at least {TARGET}; load average before: {busy:.1f}")


if __name__ == "__main__":
    main()

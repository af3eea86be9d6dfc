"""What a student's step costs offline, with the frozen teacher in it, and as the paper's joint one.

    python benchmarks/train_step.py [--json]

Q = 64, a natural-language chain of C = 128, A = 8, M = 24 slots, T = 3, full weights in float32,
both distillation terms on, a small Llama, random records of exactly these lengths. A step is all of
it: next batch, loss, backward, clipping, AdamW.

offline: targets from a store on disk (bfloat16), w_cot = 0.
online:  the frozen teacher reads `Q C A` in the step and its cache is evicted; w_cot = 0.
joint:   the student is its own teacher, w_cot = 1. One pass of the current weights over `Q C A`
         with gradient for CE(C, A | Q); its keys, values and hidden states are evicted and become
         the targets, through which no gradient flows. Nothing is computed twice.

Rounds alternate between the three; ratios are medians over rounds. Memory is the peak of each in a
process of its own, above what imports take: weights, gradients, optimizer and activations.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from accelerate.utils import send_to_device
from kava_stages.cli import quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.match import Match
from kava_core.distill.objective import cross_entropy, objective_of
from kava_core.distill.terms import student_terms
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import to_device
from kava_core.models.teacher_pass import TeacherPass
from kava_core.record import Record
from kava_core.settings import Evict, Student, Training
from kava_core.store import (
    Codec,
    ShardShuffleSampler,
    StoreSpec,
    TargetsStore,
    finalise,
    write_targets_shard,
)
from kava_core.targets.generate import store_geometry
from kava_core.targets.online import OnlineTargets
from kava_core.targets.plan import Plan
from kava_core.targets.rounding import Rounding

TARGETS = {"online_frozen_vs_offline": 1.25, "joint_vs_offline": 1.7, "data_wait_share": 0.02}
QUESTION, CHAIN, PROMPT, ANSWER, SLOTS, ITERATIONS = 64, 128, 4, 8, 24, 3
VOCABULARY, BATCH, SHARD, SHARDS = 2048, 8, 32, 4
VARIANTS = ("offline", "online", "joint")
HALF, EXACT = Codec(), Codec(keys="float32", values="float32", endpoint="float32")


def model() -> LlamaForCausalLM:
    """A small Llama with random weights, always the same."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()


def traces(first: int, n: int) -> list[Record]:
    generator = torch.Generator().manual_seed(first)

    def some(length: int) -> list[int]:
        return torch.randint(8, VOCABULARY, (length,), generator=generator).tolist()

    return [
        Record(
            id=str(first + i),
            question_ids=some(QUESTION),
            cot_ids=some(CHAIN),
            answer_prompt_ids=list(range(3, 3 + PROMPT)),
            answer_ids=[*some(ANSWER - 1), 2],
            source="random",
            topic="",
            n_steps=1,
            answer="",
        )
        for i in range(n)
    ]


def write_store(folder: Path) -> None:
    """Targets of SHARDS · SHARD records in `folder`, in bfloat16, evicted by R-KV."""
    teacher = TeacherPass(to_device(model()))
    plan = Plan.of(Evict(budget=SLOTS), store_geometry(teacher.model.config))
    spec = StoreSpec(plan.geometry, HALF, "pre_rope", teacher.rotary)
    online = OnlineTargets(teacher, HALF, plan.cut, Rounding(EXACT, {}))
    for shard in range(SHARDS):
        records = traces(shard * SHARD, SHARD)
        parts = [online(records[i : i + BATCH]) for i in range(0, SHARD, BATCH)]
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("keys", "values", "slot_counts", "slot_positions", "endpoint")
        }
        write_targets_shard(folder, spec, shard, records, **tensors)
    finalise(folder, spec, shards=SHARDS, settings={}, fingerprints={})


class JointPass(TeacherPass):
    """The teacher's pass with gradient: its last hidden states also predict the chain."""

    def _read(self, ids: Tensor, positions: Tensor, at: Tensor) -> tuple[Tensor, Any]:
        with torch.enable_grad():
            endpoint, output = super()._read(ids, positions, at)
        self.last = output.last_hidden_state
        return endpoint.detach(), output

    def chain_loss(self, batch: dict[str, Any]) -> Tensor:
        """CE(C, A-prompt, A | Q) of the batch that was passed last."""
        logits = self.model.get_output_embeddings()(self.last[:, QUESTION - 1 : -1])
        return cross_entropy(logits, batch["chain_ids"], batch["chain_mask"])


class Steps:
    """Training steps of one variant over the store in `folder`, one after the other."""

    def __init__(self, variant: str, folder: Path) -> None:
        store = TargetsStore.open(folder)
        self.student = to_device(
            LatentReasoner.from_teacher(
                model(),
                latents=SLOTS,
                iterations=ITERATIONS,
                reasoning="jacobi",
                projection=True,
                per_position=True,
                answer_prompt_ids=list(range(3, 3 + PROMPT)),
                eos_token_id=2,
                seed=0,
            )
        ).train()
        self.device = self.student.device
        plan = Plan.of(Evict(budget=SLOTS), store.geometry)
        online = None
        self.joint: JointPass | None = None
        if variant == "online":
            teacher = TeacherPass(to_device(model()))
            online = OnlineTargets(teacher, HALF, plan.cut, Rounding.of(store))
        if variant == "joint":
            self.joint = JointPass(self.student.decoder)
            online = OnlineTargets(self.joint, EXACT, plan.cut, Rounding(EXACT, {}))
        training = Training(steps=1)  # not asked: the steps are taken here
        settings = Student(reads="kv_targets", training=training, alpha_kv=1.0, alpha_codi=1.0)
        self.terms = student_terms(objective_of(settings, store), Match.of(store), online)
        dataset = TargetsDataset(store, chains=variant == "joint", online=online is not None)
        sampler = ShardShuffleSampler(store.sizes, seed=0)
        self.loader = DataLoader(
            dataset,
            batch_size=BATCH,
            sampler=sampler,
            collate_fn=lambda batch: batch,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )
        self.batches = self._forever()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        for _ in range(len(self.loader)):  # each checksum is taken once in a run of hours
            next(self.batches)

    def _forever(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.loader

    def step(self) -> tuple[float, float]:
        """Seconds of one step, and of it the seconds waited for data."""
        began = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - began
        batch = send_to_device(batch, self.device)
        terms = self.terms(self.student, batch)
        if self.joint is not None:
            terms["cot"] = self.joint.chain_loss(batch)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began, waited


def rounds_of(folder: Path, rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Per variant and round, the medians of seconds and of seconds waited over `steps` steps."""
    work = {variant: Steps(variant, folder) for variant in VARIANTS}
    measured: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds + 1):
        for variant in VARIANTS:
            taken = [work[variant].step() for _ in range(steps)]
            if turn:  # the first round warms up
                measured[variant].append(
                    tuple(statistics.median(x) for x in zip(*taken, strict=True))
                )
    return measured


def peak_memory(variant: str, folder: Path) -> float:
    """Megabytes at the peak of three steps of a process of its own, above its imports."""
    command = [sys.executable, __file__, "--memory-of", variant, "--store", str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak(variant: str, folder: Path) -> float:
    """The same, measured in that process."""
    before = resident("VmRSS")
    work = Steps(variant, folder)
    for _ in range(3):
        work.step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Megabytes of memory of this process: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(field)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the ratios.")
@click.option("--rounds", default=5, show_default=True, help="Timed rounds of each.")
@click.option("--steps", default=2, show_default=True, help="Steps of a round.")
@click.option("--memory-of", type=click.Choice(VARIANTS), hidden=True)
@click.option("--store", type=click.Path(path_type=Path), hidden=True)
def main(as_json: bool, rounds: int, steps: int, memory_of: str | None, store: Path | None) -> None:
    """Compare a student's step offline, online and joint."""
    quiet()
    if memory_of and store:
        print(own_peak(memory_of, store))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder)
        measured = rounds_of(folder, rounds, steps)
        memory = {variant: peak_memory(variant, folder) for variant in VARIANTS}
    # Round by round, so that a machine that drifts drifts under all.
    offline = [seconds for seconds, _ in measured["offline"]]
    ratios = {
        key: statistics.median(
            seconds / base for (seconds, _), base in zip(measured[variant], offline, strict=True)
        )
        for key, variant in (("online_frozen_vs_offline", "online"), ("joint_vs_offline", "joint"))
    }
    ratios["data_wait_share"] = statistics.median(w / s for s, w in measured["offline"])
    if as_json:
        print(json.dumps(ratios))
        return
    parameters = sum(p.numel() for p in model().parameters())
    table = Table(
        title=f"{parameters / 1e6:.0f} M parameters, batch {BATCH}: Q = {QUESTION}, C = {CHAIN}, "
        f"A = {ANSWER}, M = {SLOTS}, T = {ITERATIONS}"
    )
    for column in ("", "ms a step (median)", "against offline", "waiting for data", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for variant in VARIANTS:
        seconds, waited = (statistics.median(x) for x in zip(*measured[variant], strict=True))
        against = statistics.median(
            s / base for (s, _), base in zip(measured[variant], offline, strict=True)
        )
        table.add_row(
            variant,
            f"{1000 * seconds:.0f}",
            f"{against:.2f}",
            f"{waited / seconds:.2%}",
            f"{memory[variant]:.0f}",
        )
    console = Console(file=sys.stdout)
    console.print(table)
    for key, target in TARGETS.items():
        bound = "below" if key == "data_wait_share" else "at least"
        console.print(f"{key}: {ratios[key]:.4g} (target: {bound} {target})")


if __name__ == "__main__":
    main()

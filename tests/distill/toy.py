"""A tiny student, a real store of random targets, and runs of `fit` on them.

`main` is what a child process runs; it may be told to die at a step.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from kava_core.distill.batches import TargetsDataset
from kava_core.distill.fit import FitSettings, fit
from kava_core.distill.match import Match
from kava_core.distill.objective import Objective
from kava_core.distill.student import add_lora, objective_of, student_terms
from kava_core.models.latent import LatentReasoner
from kava_core.models.phase import rotary_of
from kava_core.record import Record
from kava_core.store import (
    Codec,
    Geometry,
    ShardShuffleSampler,
    StoreSpec,
    TargetsStore,
    finalise,
    write_targets_shard,
)
from kava_core.store.layout import RotaryPhase
from tests.tiny import COMMON, EOS, PROMPT, VOCABULARY, tiny_model

FLOAT32 = Codec(keys="float32", values="float32", endpoint="float32")
PLAIN = Geometry.plain(layers=3, kv_heads=2, head_dim=8, hidden_size=32, slots=4)
SETTINGS = FitSettings(
    steps=10,
    batch_size=4,
    accumulation=2,
    learning_rate=1e-2,
    weight_decay=0.01,
    warmup=0.2,
    max_grad_norm=2.0,
    precision="float32",
    log_every=4,
    save_every=3,
    seed=5,
)


def toy_student(dropout: float = 0.0, lora: bool = False, **settings: Any) -> LatentReasoner:
    """A Llama of 3 layers, 4 latents, 2 Jacobi iterations, in float32."""
    teacher = tiny_model(LlamaConfig(**COMMON, attention_dropout=dropout), torch.float32)
    student = LatentReasoner.from_teacher(
        teacher,
        **{
            "latents": 4,
            "iterations": 2,
            "reasoning": "jacobi",
            "projection": True,
            "per_position": True,
            "answer_prompt_ids": PROMPT,
            "eos_token_id": EOS,
            "seed": 0,
            **settings,
        },
    )
    if lora:
        add_lora(student, rank=4, alpha=8, dropout=0.2, targets=["q_proj", "v_proj"], seed=0)
    return student


def toy_traces(n: int) -> list[Record]:
    """Traces of random tokens and lengths, some shorter than the 4 slots."""
    generator = torch.Generator().manual_seed(n)

    def some(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(8, VOCABULARY, (length,), generator=generator).tolist()

    return [
        Record(
            id=f"toy-{i}",
            question_ids=some(2, 7),
            cot_ids=some(2, 8),
            answer_prompt_ids=list(PROMPT),
            answer_ids=[*some(1, 3), EOS],
            source="toy",
            topic="",
            n_steps=2,
            answer="1",
        )
        for i in range(n)
    ]


def write_store(
    folder: Path,
    traces: list[Record],
    *,
    shard_size: int = 6,
    geometry: Geometry = PLAIN,
    codec: Codec = FLOAT32,
    phase: RotaryPhase = "pre_rope",
) -> TargetsStore:
    """A targets store of random numbers for `traces`; each layer has a spread of its own."""
    folder.mkdir(parents=True)
    spec = StoreSpec(geometry, codec, phase, rotary_of(tiny_model("llama", torch.float32)))
    rows, slots = len(geometry.rows), geometry.slots
    generator = torch.Generator().manual_seed(7)
    spread = torch.arange(1.0, rows + 1)[:, None, None, None]
    shards = range(0, len(traces), shard_size)
    for shard, first in enumerate(shards):
        records = traces[first : first + shard_size]
        lengths = torch.tensor([len(t.cot_ids) for t in records])
        counts = lengths.clamp(max=slots)[:, None, None].expand(-1, rows, geometry.kv_heads)
        places = torch.arange(slots).expand(len(records), rows, geometry.kv_heads, slots)
        lead = (*places.shape, geometry.head_dim)
        levels = (len(records), geometry.model_layers + 1, geometry.hidden_size)
        write_targets_shard(
            folder,
            spec,
            shard,
            records,
            keys=spread * torch.randn(lead, generator=generator),
            values=0.5 * spread * torch.randn(lead, generator=generator),
            slot_counts=counts.contiguous(),
            slot_positions=torch.where(places < counts[..., None], places, -1),
            endpoint=torch.randn(levels, generator=generator),
        )
    finalise(
        folder,
        spec,
        shards=len(shards),
        settings={},
        fingerprints={"problems": "p", "teacher": "t", "tokenizer": "k", "teacher_kv": "c"},
    )
    return TargetsStore.open(folder)


def toy_objective(store: TargetsStore | None, **changes: Any) -> Objective:
    return objective_of(
        store,
        **{"alpha_kv": 1.0, "alpha_codi": 1.0, "w_cot": 0.0, **changes},
        kv_distance="smooth_l1",
        kv_std=True,
        codi_distance="l1",
        codi_std=True,
    )


@dataclass(frozen=True)
class Toy:
    """One run of `fit` under `folder`, on the store in `store`.

    held_out: so many records of the last shard. signal_at: at the first batch of its own n-th step
    the process sends itself `signal`.
    """

    store: Path
    folder: Path
    settings: FitSettings = SETTINGS
    dropout: float = 0.1
    lora: bool = False
    chains: bool = False
    shares_every: int = 0
    loader_workers: int = 0
    held_out: int = 0
    signal_at: int | None = None
    signal: int = signal.SIGKILL

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self) -> dict[str, Tensor]:
        """The weights the run ends with."""
        model = toy_student(self.dropout, self.lora)
        store = TargetsStore.open(self.store)
        last, held_out = (
            store.sizes[-1] - self.held_out,
            range(len(store) - self.held_out, len(store)),
        )
        terms = student_terms(toy_objective(store, w_cot=float(self.chains)), Match.of(store))
        batches = 0

        def counted(student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
            nonlocal batches
            batches += student.training
            if self.signal_at and batches == self.settings.accumulation * (self.signal_at - 1) + 1:
                os.kill(os.getpid(), self.signal)
            return terms(student, batch)

        fit(
            model,
            counted,
            TargetsDataset(store, chains=self.chains),
            ShardShuffleSampler([*store.sizes[:-1], last], seed=self.settings.seed),
            self.settings,
            folder=self.checkpoints,
            live_folder=self.folder / "live",
            title="toy",
            loader_workers=self.loader_workers,
            shares_every=self.shares_every,
            held_out=held_out,
        )
        return {name: x.detach().clone() for name, x in model.state_dict().items()}

    def but(self, **changes: Any) -> Toy:
        return replace(self, **changes)


def main(toy: Toy) -> None:
    torch.set_num_threads(1)
    toy.run()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

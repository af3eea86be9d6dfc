"""A tiny student, a real store of random targets, and runs of `fit` on them.

`main` is what a child process runs; it may be told to die at a step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kava_core.distill.adapters import add_lora
from kava_core.distill.balance import Balance
from kava_core.distill.batches import TargetsDataset
from kava_core.distill.exact_match import Questions
from kava_core.distill.fit import fit
from kava_core.distill.match import Match
from kava_core.distill.objective import Objective, objective_of
from kava_core.distill.terms import student_terms
from kava_core.distill.tracking import Tracking
from kava_core.models.latent import LatentReasoner
from kava_core.problems.prompt import ANSWER_PROMPT
from kava_core.record import Record
from kava_core.rotary import Rotary
from kava_core.settings import Cadence, LoRA, Student, Training
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
TRAINING = Training(
    steps=10, batch_size=4, accumulation=2, learning_rate=1e-2, warmup=0.2, seed=5, threads=1
)
CADENCE = Cadence(log_every=4, save_every=3, gradient_share_every=7)
EVERY_STEP = Cadence(log_every=1, save_every=3, gradient_share_every=0)


def but(training: Training, **changes: Any) -> Training:
    """The same settings but for some."""
    return training.model_copy(update=changes)


def toy_student(dropout: float = 0.0, adapted: bool = False, **settings: Any) -> LatentReasoner:
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
    if adapted:
        add_lora(student.decoder, lora(4, 8, 0.2, "q_proj", "v_proj"), seed=0, path="toy")
    return student


def lora(rank: int, alpha: int, dropout: float, *targets: str) -> LoRA:
    return LoRA(rank=rank, alpha=alpha, dropout=dropout, targets=targets)


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
    spec = StoreSpec(geometry, codec, phase, _rotary(geometry))
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


def _rotary(geometry: Geometry) -> Rotary:
    """That of Llama, for a model of so many layers and so wide heads."""
    powers = torch.arange(0, geometry.head_dim, 2, dtype=torch.float64) / geometry.head_dim
    layers = geometry.model_layers
    return Rotary((10000.0**-powers).expand(layers, -1), torch.ones(layers, dtype=torch.float64))


def toy_objective(
    store: TargetsStore | None, match: Match | None = None, **changes: Any
) -> Objective:
    settings = {"alpha_kv": 1.0, "alpha_codi": 1.0, "codi_distance": "l1", **changes}
    if not settings["alpha_codi"]:  # then a distance of it means nothing
        del settings["codi_distance"]
    student = Student(reads="kv_targets", training=TRAINING, **settings)
    return objective_of(student, store, match)


def toy_questions(records: list[Record]) -> Questions:
    """Token n is written `n`."""
    words = {str(n): n for n in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token=str(EOS)
    )
    return Questions(records, tokenizer, ANSWER_PROMPT)


@dataclass(frozen=True)
class Toy:
    """One run of `fit` under `folder`, on the store in `store`.

    held_out: so many records of the last shard. signal_at: at the first batch of its own n-th step
    the process sends itself `signal`.
    """

    store: Path
    folder: Path
    settings: Training = TRAINING
    cadence: Cadence = CADENCE
    dropout: float = 0.1
    adapted: bool = False
    chains: bool = False
    loader_workers: int = 0
    held_out: int = 0
    balance: Balance | None = None
    tracking: Tracking | None = None
    signal_at: int | None = None
    signal: int = signal.SIGKILL

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self) -> dict[str, Tensor]:
        """The weights the run ends with."""
        model = toy_student(self.dropout, self.adapted)
        store = TargetsStore.open(self.store)
        last, held_out = (
            store.sizes[-1] - self.held_out,
            range(len(store) - self.held_out, len(store)),
        )
        terms = student_terms(toy_objective(store, w_cot=float(self.chains)), Match.of(store))
        seen = Seen()

        def counted(student: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
            at = seen.number(batch) if student.training else None
            if self.signal_at and at == self.settings.accumulation * (self.signal_at - 1) + 1:
                os.kill(os.getpid(), self.signal)
            return terms(student, batch)

        fit(
            model,
            counted,
            TargetsDataset(store, chains=self.chains),
            ShardShuffleSampler([*store.sizes[:-1], last], seed=self.settings.seed),
            self.settings,
            self.cadence,
            folder=self.checkpoints,
            curves=self.folder / "curves",
            title="toy",
            loader_workers=self.loader_workers,
            held_out=held_out,
            balance=self.balance,
            questions=toy_questions([store.index.record(i) for i in held_out]),
            tracking=self.tracking,
        )
        return {name: x.detach().clone() for name, x in model.state_dict().items()}

    def but(self, **changes: Any) -> Toy:
        return replace(self, **changes)


class Seen:
    """Training batches in the order in which a run first reads them; some it reads to measure, too.

    No two batches of the tests' runs are of the same records in the same order.
    """

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def number(self, batch: dict[str, Any]) -> int:
        """Of a batch, from 1."""
        if batch["ids"] not in self.batches:
            self.batches.append(batch["ids"])
        return 1 + self.batches.index(batch["ids"])


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


def curve(run: Toy, name: str) -> list[float]:
    """The values of a curve in DVCLive's file: a header, then `step`, tab, value."""
    text = (run.folder / "curves" / "plots" / "metrics" / f"{name}.tsv").read_text()
    header, *rows = text.splitlines()
    assert header.split("\t") == ["step", name]
    assert [int(row.split("\t")[0]) for row in rows] == list(
        range(run.cadence.log_every, run.settings.steps + 1, run.cadence.log_every)
    )
    return [float(row.split("\t")[1]) for row in rows]


def killed(toy: Toy) -> int | None:
    """The exit code of a process that does `run`; −9 for SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distill.toy"])
    process = context.Process(target=main, args=(toy,))
    process.start()
    process.join()
    return process.exitcode


def checkpoints(run: Toy) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in run.checkpoints.glob("checkpoint-*"))

"""Seconds on this machine, from a few steps of the pipeline's own code at its own shapes.

A model with random weights does what the stage will do: learn a batch, read one, cut its caches,
answer. What would take long is made smaller (vocabulary, then layers, then rows), and its time
scaled by the operations it saved.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kava_core.distill.adapters import add_lora
from kava_core.distill.batches import ChainDataset, answer_batch
from kava_core.distill.objective import Objective
from kava_core.distill.terms import chain_terms
from kava_core.eviction import CacheBatch
from kava_core.models.batching import pad
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import DTYPES, attention_implementation, to_device
from kava_core.models.phase import rotary_of
from kava_core.models.teacher_pass import TeacherCache, TeacherPass, over
from kava_core.parallel.threads import torch_threads
from kava_core.planning.architecture import Architecture
from kava_core.planning.costs import Call, flops, parts
from kava_core.planning.lengths import Lengths, longest
from kava_core.record import Record
from kava_core.settings import Evict, Generate, Resources, Student, Training
from kava_core.store import StoreSpec, write_targets_shard, write_teacher_shard
from kava_core.targets.generate import teacher_spec
from kava_core.targets.plan import Plan
from kava_core.targets.specs import store_codec

# Operations after which a step takes long enough to be measured: about a second.
_ENOUGH = {"cpu": 3e10, "cuda": 2e13}
_NARROW = 8192  # of a vocabulary made smaller
_REPEATS = 3
_WRITTEN = 8  # tokens of an answer that is timed
_CHECKED = 64  # records of a shard that is timed


class Clock(Protocol):
    """How long things take. Steps and reads are in seconds each."""

    def start(self, workers: bool) -> float:
        """Of a stage before it works; workers: with Ray's."""
        ...

    def workers(self, resources: Resources, pieces: int) -> int:
        """How many share so many pieces of work."""
        ...

    def teacher_step(
        self, a: Architecture, training: Training, lengths: Lengths, calls: Sequence[Call]
    ) -> float: ...

    def student_step(
        self, a: Architecture, student: Student, slots: int, calls: Sequence[Call]
    ) -> float: ...

    def read(self, a: Architecture, generate: Generate, calls: Sequence[Call]) -> float:
        """A batch of `generate.batch_size` records, its caches written."""
        ...

    def cut(self, a: Architecture, generate: Generate, evict: Evict) -> float:
        """The targets of a record."""
        ...

    def answer(self, a: Architecture, calls: Sequence[Call], batch: int, threads: int) -> float:
        """A batch of questions."""
        ...

    def written(self, size: float) -> float:
        """`size` bytes."""
        ...


@dataclass(frozen=True)
class Rates:
    """A clock of given rates: floating-point operations and bytes to or from the disk, a second.

    They are those of one device and one disk, whatever the machine has that this runs on.
    """

    flops: float
    bytes: float

    def start(self, workers: bool) -> float:
        return 0.0

    def workers(self, resources: Resources, pieces: int) -> int:
        return 1

    def teacher_step(
        self, a: Architecture, training: Training, lengths: Lengths, calls: Sequence[Call]
    ) -> float:
        return flops(a, calls, training) / self.flops

    def student_step(
        self, a: Architecture, student: Student, slots: int, calls: Sequence[Call]
    ) -> float:
        return flops(a, calls, student.training) / self.flops

    def read(self, a: Architecture, generate: Generate, calls: Sequence[Call]) -> float:
        return flops(a, calls, None) / self.flops

    def cut(self, a: Architecture, generate: Generate, evict: Evict) -> float:
        return 0.0  # a few operations on what takes long to read and write

    def answer(self, a: Architecture, calls: Sequence[Call], batch: int, threads: int) -> float:
        return flops(a, calls, None) / self.flops

    def written(self, size: float) -> float:
        return size / self.bytes


class Calibration:
    """A clock that measures, on this machine. Nothing is measured twice."""

    def __init__(self, lengths: Lengths) -> None:
        self.lengths = lengths
        self.enough = _ENOUGH["cuda" if torch.cuda.is_available() else "cpu"]
        self._known: dict[Hashable, float] = {}

    @cached_property
    def _imports(self) -> float:
        began = time.perf_counter()
        modules = "kava_core.distill.student_job, kava_core.evaluation.comparison"
        subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, capture_output=True)
        return time.perf_counter() - began

    def start(self, workers: bool) -> float:
        """Imports, once more in the workers."""
        return self._imports * (2 if workers else 1)

    def workers(self, resources: Resources, pieces: int) -> int:
        if resources.workers == 0:
            return 1
        room = max(1, int((os.cpu_count() or 1) / resources.cpus_per_worker))
        return min(resources.workers or room, room, pieces)

    def teacher_step(
        self, a: Architecture, training: Training, lengths: Lengths, calls: Sequence[Call]
    ) -> float:
        def measure(small: Architecture, rows: int) -> Callable[[], object]:
            model = _learner(_model(small), training)
            batch = ChainDataset(self._records(rows)).__getitems__(list(range(rows)))
            return _step(model, training, lambda: chain_terms(model, batch))

        return self._scaled(
            ("teacher", a.source, training), a, training.batch_size, calls, training, measure,
            training.threads,
        )  # fmt: skip

    def student_step(
        self, a: Architecture, student: Student, slots: int, calls: Sequence[Call]
    ) -> float:
        training = student.training

        def measure(small: Architecture, rows: int) -> Callable[[], object]:
            reasoner = self._reasoner(_model(small), student, slots)
            reasoner.decoder = _learner(reasoner.decoder, training)
            reasoner.train()
            return _step(reasoner, training, self._student_terms(small, reasoner, student, rows))

        rows = training.batch_size // parts(student.processes)
        return self._scaled(
            ("student", a.source, student, slots),
            a,
            rows,
            calls,
            training,
            measure,
            training.threads,
        )

    def _reasoner(self, model: PreTrainedModel, student: Student, slots: int) -> LatentReasoner:
        return LatentReasoner.from_teacher(
            model,
            latents=slots if student.reads == "kv_targets" else 0,
            iterations=student.iterations,
            reasoning=student.reasoning,
            projection=student.projection,
            per_position=student.per_position,
            answer_prompt_ids=[5, 6, 7, 8],
            eos_token_id=2,
            seed=0,
        )

    def _student_terms(
        self, a: Architecture, reasoner: LatentReasoner, student: Student, rows: int
    ) -> Callable[[], dict[str, Tensor]]:
        records = self._records(rows)
        batch = answer_batch(
            [r.id for r in records],
            [r.question_ids for r in records],
            [r.answer_ids for r in records],
            [r.cot_ids + r.answer_prompt_ids + r.answer_ids for r in records]
            if student.taught("w_cot")
            else None,
        )
        device = reasoner.device
        batch = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}
        shape = (rows, a.layers, a.kv_heads, max(1, reasoner.config.latents), a.head_dim)
        batch["keys"] = batch["values"] = torch.zeros(shape, device=device)
        batch["slot_mask"] = torch.ones(shape[:-1], device=device, dtype=torch.bool)
        batch["endpoint"] = torch.zeros(rows, a.layers + 1, a.hidden_size, device=device)
        batch["slot_ids"] = torch.zeros(rows, shape[3], device=device, dtype=torch.long)
        batch["slot_filled"] = torch.ones_like(batch["slot_ids"])
        objective = Objective(  # a weight costs nothing: which terms there are does
            alpha_kv=float(student.taught("alpha_kv")),
            alpha_codi=float(student.taught("alpha_codi")),
            w_cot=float(student.taught("w_cot")),
            kv_distance=student.kv_distance,
            codi_distance=student.codi_distance,
            alpha_readout=float(student.taught("alpha_readout")),
            kv_parts=student.kv_parts,
        )

        def terms() -> dict[str, Tensor]:
            reasoning = reasoner(
                batch["question_ids"], batch["question_mask"], batch["answer_ids"],
                batch["answer_mask"], batch.get("chain_ids"), batch.get("chain_mask"),
                readout=student.taught("alpha_readout"),
            )  # fmt: skip
            if not student.taught("alpha_kv"):
                return objective.weighted(reasoning, batch, None, None)
            keys = reasoner.slot_keys(reasoning, "pre_rope")
            return objective.weighted(reasoning, batch, keys, torch.stack(reasoning.values, 1))

        return terms

    def read(self, a: Architecture, generate: Generate, calls: Sequence[Call]) -> float:
        def measure(small: Architecture, rows: int) -> Callable[[], object]:
            model = to_device(_model(small, DTYPES[generate.model_dtype]))
            teacher, records = TeacherPass(model), self._records(rows)
            spec = teacher_spec(model, generate)

            def work() -> None:
                _write_caches(spec, records, over(teacher, records, generate.rows))

            return work

        return self._scaled(
            ("read", a.source, generate),
            a,
            generate.rows,
            calls,
            None,
            measure,
            generate.threads,
        )

    def cut(self, a: Architecture, generate: Generate, evict: Evict) -> float:
        key = ("cut", a.source, evict)
        if key not in self._known:
            with torch_threads(evict.threads):
                work, share = self._cutting(a, evict)
                self._known[key] = _timed(work) / _CHECKED / share
        return self._known[key]

    def _cutting(self, a: Architecture, evict: Evict) -> tuple[Callable[[], object], float]:
        """The eviction of some records' caches of few layers, and which share of all it is."""
        layers = min(a.layers, 4)
        small = _smaller(a, layers=layers, vocabulary=a.vocabulary)
        whole = Plan.of(evict, a.geometry)
        plan = Plan.of(evict.model_copy(update={"layers": "all"}), small.geometry)
        records = self._records(_CHECKED)
        tokens = sum(len(r.cot_ids) for r in records)
        offsets = torch.tensor([0, *(len(r.cot_ids) for r in records)]).cumsum(0)
        shape = (tokens, layers, a.kv_heads, a.head_dim)
        keys, values = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
        importance = torch.rand(shape[:-1])
        rotary = rotary_of(_model(_smaller(small, layers=layers, vocabulary=64)))
        spec = StoreSpec(
            plan.geometry, store_codec(evict.model_copy(update={"granularity": "token"})),
            evict.phase, rotary,
        )  # fmt: skip
        endpoint = torch.randn(len(records), layers + 1, a.hidden_size)

        def work() -> None:
            batch = CacheBatch.of_records(keys, values, importance, offsets, records, rotary)
            found = plan.cut(batch)
            with tempfile.TemporaryDirectory() as folder:
                write_targets_shard(
                    Path(folder), spec, 0, records, keys=found.keys, values=found.values,
                    slot_counts=found.slot_counts, slot_positions=found.slot_positions,
                    endpoint=endpoint,
                )  # fmt: skip

        return work, layers / len(whole.layers)

    def answer(self, a: Architecture, calls: Sequence[Call], batch: int, threads: int) -> float:
        def measure(small: Architecture, rows: int) -> Callable[[], object]:
            model = to_device(_model(small))
            system = LatentReasoner.plain(model, answer_prompt_ids=[5], eos_token_id=-1)
            ids, mask = pad([r.question_ids for r in self._records(rows)], "left")
            ids, mask = ids.to(system.device), mask.to(system.device)
            return lambda: system.generate(ids, mask, max_new_tokens=_WRITTEN)

        question = longest(self.lengths.question, batch)
        timed = [Call(batch, question + 1, logits=1)]
        timed += [Call(batch, 1, question + 1 + i, logits=1) for i in range(_WRITTEN - 1)]
        seconds = self._scaled(
            ("answer", a.source, batch, threads), a, batch, timed, None, measure, threads
        )
        # Calls of a token or two cost what a call costs; a long one costs what it computes.
        per_call = seconds / len(timed)
        rate = flops(a, timed, None) / seconds
        return sum(max(per_call, flops(a, [call], None) / rate) for call in calls)

    def written(self, size: float) -> float:
        if "disk" not in self._known:
            piece = b"\0" * 2**24
            with tempfile.NamedTemporaryFile() as file:

                def work() -> None:
                    file.seek(0)
                    file.write(piece)
                    file.flush()

                self._known["disk"] = _timed(work) / len(piece)
        return size * self._known["disk"]

    def _scaled(
        self,
        key: Hashable,
        a: Architecture,
        rows: int,
        calls: Sequence[Call],
        training: Training | None,
        measure: Callable[[Architecture, int], Callable[[], object]],
        threads: int,
    ) -> float:
        """Seconds of `calls` on `rows` rows, measured on as much of them as is enough."""
        if key in self._known:
            return self._known[key]
        whole = flops(a, calls, training)
        small, few, done = a, rows, whole
        if done > self.enough:
            small = _smaller(a, layers=a.layers, vocabulary=min(a.vocabulary, _NARROW))
            done = flops(small, calls, training)
        if done > self.enough:
            small = _smaller(small, layers=min(2, a.layers), vocabulary=small.vocabulary)
            done = flops(small, calls, training)
        if done > self.enough:
            few = max(1, int(rows * self.enough / done))
            done *= few / rows
        with torch_threads(threads):
            self._known[key] = _timed(measure(small, few)) * whole / done
        return self._known[key]

    def _records(self, count: int) -> list[Record]:
        """Records of the sample's lengths, of random tokens that every vocabulary has."""
        lengths, generator = self.lengths, torch.Generator().manual_seed(0)
        sizes = len(lengths.trace)
        chosen = torch.randint(sizes, (count,), generator=generator).tolist()

        def ids(n: float) -> list[int]:
            return torch.randint(3, 60, (max(1, int(n)),), generator=generator).tolist()

        return [
            Record(
                id=f"r{number}", question_ids=ids(lengths.question[i]),
                cot_ids=(chain := ids(lengths.trace[i])), answer_prompt_ids=ids(lengths.prompt[i]),
                answer_ids=ids(lengths.answer[i]), source="", topic="", n_steps=1,
                step_ends=[len(chain)], results=[len(chain) - 1],
            )
            for number, i in enumerate(chosen)
        ]  # fmt: skip


def _write_caches(spec: StoreSpec, records: list[Record], cache: TeacherCache) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_teacher_shard(
            Path(folder), spec, 0, records, keys=cache.keys, values=cache.values,
            importance=cache.importance, endpoint=cache.endpoint,
        )  # fmt: skip


def _smaller(a: Architecture, *, layers: int, vocabulary: int) -> Architecture:
    """The same architecture with fewer layers and tokens."""
    config = deepcopy(a.config)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = kinds[:layers]
    config.num_hidden_layers, config.vocab_size = layers, vocabulary
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    return Architecture.of(config, a.source)


def _model(a: Architecture, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        a.config, attn_implementation=attention_implementation(a.config), dtype=dtype
    )
    return model


def _learner(model: PreTrainedModel, training: Training) -> PreTrainedModel:
    """The model as `training` fits it, with adapters where there are to be some."""
    if training.lora is not None:
        add_lora(model, training.lora, seed=training.seed, path="training")
    return model


def _step(
    model: nn.Module, training: Training, terms: Callable[[], dict[str, Tensor]]
) -> Callable[[], object]:
    """A step of the optimiser, as the Trainer takes it."""
    to_device(model).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    device = parameters[0].device.type

    def work() -> None:
        half = training.precision == "bfloat16"
        with torch.autocast(device, torch.bfloat16) if half else nullcontext():
            loss = torch.stack(list(terms().values())).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return work


def _timed(work: Callable[[], object]) -> float:
    """Seconds of `work` once it is warm; the median of a few."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]

"""The files of a small pipeline as the other stages leave them, with plausible numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kava_core.artefacts import write_json
from kava_core.fidelity.grid import Cell
from kava_core.fidelity.results import costs_of, write_results
from kava_core.fidelity.trial import Result
from kava_core.findings.base import write_finding
from kava_core.findings.fidelity import BatchCost, CachedAnswer
from kava_core.findings.scores import wilson
from kava_core.record import Record
from kava_core.store import Geometry, TargetsStore, write_targets_shard
from kava_core.store.summary import eviction_findings
from tests.store.make import finish, make_spec

GEOMETRY = Geometry.plain(layers=2, kv_heads=2, head_dim=4, hidden_size=8, slots=8)
# system → accuracy on 2-, 3- and 4-step problems, forward passes, tokens, milliseconds
SYSTEMS: dict[str, tuple[tuple[float, float, float], float, float, float]] = {
    "teacher-cot": ((1.0, 1.0, 0.99), 33.4, 33.4, 14.2),
    "teacher-no-cot": ((0.12, 0.04, 0.02), 3.6, 3.6, 1.9),
    "kava": ((0.88, 0.6, 0.42), 7.1, 3.1, 3.3),
    "codi": ((0.84, 0.55, 0.38), 7.1, 3.1, 3.2),
    "pccot": ((0.9, 0.62, 0.4), 7.1, 3.1, 3.2),
    "no-cot": ((0.6, 0.3, 0.18), 3.1, 3.1, 1.6),
    "no-cot-equal-time": ((0.66, 0.36, 0.22), 3.1, 3.1, 1.6),
}
WEIGHTS = {"kava": (1.0, 1.0), "codi": (0.0, 1.0), "pccot": (0.0, 0.0)}
STUDENTS = ["kava", "codi", "pccot", "no-cot", "no-cot-equal-time"]
MACHINE = {"processor": "a <fast> one", "cores": "2"}
TRAINING = {"steps": 1000, "batch_size": 64, "accumulation": 1, "seed": 0}


@dataclass
class Pipeline:
    """Where the files are, and what can be asked of them; change a file to break it."""

    data: Path
    name: str = "made"
    students: list[str] = field(default_factory=lambda: list(STUDENTS))

    @property
    def folder(self) -> Path:
        return self.data / self.name

    @property
    def log(self) -> Path:
        return self.data / ".runs" / f"{self.name}.jsonl"


def make_pipeline(
    data: Path,
    *,
    name: str = "made",
    problems: int = 60,
    records: int = 40,
    test_sets: Sequence[str] = ("synthetic",),
) -> Pipeline:
    """Write everything that a report reads; the same arguments write the same files."""
    made = Pipeline(data, name)
    digest = _targets(made.folder / "kv_targets", records)
    store = TargetsStore.open(made.folder / "kv_targets")
    write_finding(made.folder / "eviction.json", eviction_findings(store))
    _evaluation(made.folder / "evaluation", problems, test_sets)
    write_json(made.folder / "evaluation/interpretability.json", _insights())
    _fidelity(made.folder)
    for student in STUDENTS:
        _student(made.folder, student, digest)
    _write(
        made.folder / "teacher/teacher.json",
        {"settings": {"training": TRAINING}, "steps": 1000},
    )
    _curves(made.folder / "curves/teacher", {"loss": (5.0, 0.02), "loss_chain": (5.0, 0.02)})
    _write(
        made.folder / "teacher/metrics.json",
        {"n": 50, "exact_match_cot": 98.0, "exact_match_no_cot": 4.0},
    )
    counts = {"problems": 60, "by_steps": {"2": 20, "3": 20, "4": 20}}
    _write(
        made.folder / "problems/metrics.json",
        {"train": counts, "validation": counts, "rows": {}},
    )
    _write(
        made.folder / "test_sets/metrics.json",
        {"test_sets": dict.fromkeys(["test", *test_sets[1:]], counts), "rows": {}, "leaked": {}},
    )
    _write(
        made.folder / "test_sets/test_sets.json",
        {"traces": "equations", "settings": {"source": {"name": "synthetic"}, "seed": 7}},
    )
    _log(made.log)
    return made


def _evaluation(folder: Path, problems: int, test_sets: Sequence[str]) -> None:
    rows: list[dict[str, Any]] = []
    metrics, differences = {}, {}
    for test_set in test_sets:
        asked, metrics[test_set], differences[test_set] = _answers(test_set, problems)
        rows += asked
    write_finding(folder / "metrics.json", metrics)
    write_json(folder / "comparisons.json", differences)
    costs = {
        system: {
            "seconds_per_problem": milliseconds / 1000,
            "peak_memory_mb": 12.5 if system.startswith("teacher") else 25.5,
        }
        for system, (_, _, _, milliseconds) in SYSTEMS.items()
    }
    write_finding(
        folder.parent / "measured/evaluation.json",
        {"hardware": MACHINE, "systems": dict.fromkeys(test_sets, costs)},
    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "predictions.parquet")
    rng = random.Random(0)
    cells: dict[str, Any] = {"keys": _grid(rng, 2, 8), "values": _grid(rng, 2, 8)}
    cells["keys"][1][7] = None
    _write(
        folder / "similarity.json",
        {name: {"records": 32, "layers": [0, 1], **cells} for name in WEIGHTS},
    )


def _answers(
    test_set: str, problems: int
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Rows of predictions, metrics and differences of one test set."""
    rows, metrics = [], {}
    correct: dict[str, list[bool]] = {}
    for system, (accuracy, passes, tokens, _) in SYSTEMS.items():
        rng = random.Random(test_set + system)
        marks: dict[int, list[bool]] = {}
        for i in range(problems):
            steps = 2 + i % 3
            right = rng.random() < accuracy[steps - 2]
            marks.setdefault(steps, []).append(right)
            gold = str(7 + i)
            answer = gold if right else str(rng.randrange(200))
            chain = "<<3+4=7>><<7*2=14>>" if system == "teacher-cot" else ""
            rows.append(
                {
                    "test_set": test_set,
                    "system": system,
                    "id": f"{test_set}-{i:04d}",
                    "n_steps": steps,
                    "topic": "farm",
                    "gold": gold,
                    "question": f"ian has {i} apples. he sells 3 and doubles the rest. how many?",
                    "text": f"{chain}The answer is: {answer}",
                    "answer": answer,
                    "correct": answer == gold,
                    "passes": round(passes),
                    "tokens": round(tokens),
                    "nll": 0.5,
                    "answer_tokens": 2,
                    "operations": ["+"],
                    "trace_tokens": 12,
                }
            )
        right = sum(map(sum, marks.values()))
        share = right / problems
        spread = 1.96 * math.sqrt(max(share * (1 - share), 0.002) / problems)
        metrics[system] = {
            "exact_match": 100 * share,
            "ci95": [100 * max(0, share - spread), 100 * min(1, share + spread)],
            "n": problems,
            "forward_passes": passes,
            "tokens": tokens,
            "perplexity": 1.0 + 40 * (1 - share),
            "by_steps": {str(n): _score(m) for n, m in marks.items()},
            "by_operation": {"+": _score(marks[2] + marks[3]), "−": _score(marks[4])},
            "by_trace_length": {"9-16": _score(marks[2]), "17-32": _score(marks[3] + marks[4])},
        }
        correct[system] = [mark for m in marks.values() for mark in m]
    differences = {
        student: {
            other: _difference(correct[student], correct[other])
            for other in SYSTEMS
            if other != student
        }
        for student in STUDENTS
    }
    return rows, metrics, differences


def _score(marks: list[bool]) -> dict[str, Any]:
    return {"exact_match": 100 * sum(marks) / len(marks), "n": len(marks)}


def _difference(left: list[bool], right: list[bool]) -> dict[str, Any]:
    gain = 100 * (sum(left) - sum(right)) / len(left)
    return {"difference": gain, "ci95": [gain - 6, gain + 6], "p_value": 0.01}


def _grid(rng: random.Random, rows: int, columns: int, scale: float = 1.0) -> list[list[float]]:
    return [[round(scale * rng.uniform(0.1, 0.9), 3) for _ in range(columns)] for _ in range(rows)]


def _insights() -> dict[str, Any]:
    """What three students with 8 latents and 3 passes hold."""
    rng = random.Random(1)
    trace = ["<<", "3", "+", "4", "=", "7", ">>", "<<", "7", "*", "2", "=", "14", ">>", "\n"]
    words = ["3", " 4", "7", "14", " apples", "=", "*", "?", "\n", "<b>"]

    def tokens(first: str) -> list[list[Any]]:
        top = rng.uniform(0.3, 0.95)
        rest = rng.sample([w for w in words if w != first], 2)
        return [[first, top], *([word, (1 - top) / 3] for word in rest)]

    kept = [1, 2, 3, 5, 8, 10, 12, None]
    decoded = [
        {
            "id": f"synthetic-{i:04d}",
            "question": f"ian has {i} apples. he sells 3 and doubles the rest. how many?",
            "trace": trace,
            "answer": str(7 + i),
            "iterations": [
                {
                    "slots": [
                        {
                            "student": tokens(rng.choice(words)),
                            "teacher": [] if place is None else tokens(trace[place + 1]),
                            "teacher_position": place,
                            "teacher_share": 0.0 if place is None else 0.75,
                        }
                        for place in kept
                    ]
                }
                for _ in range(3)
            ],
        }
        for i in range(3)
    ]
    parts = ["numbers", "names", "verbs", "question mark"]

    def maps(columns: int, scale: float = 1.0) -> dict[str, Any]:
        return {"keys": _grid(rng, 2, columns, scale), "values": _grid(rng, 2, columns, scale)}

    return {
        name: {
            "records": 32,
            "question_parts": parts,
            "decoded": decoded,
            "similarity_evicted": {"layers": [0, 1], **maps(8)},
            "similarity_full": {"layers": [0, 1], **maps(8)},
            "similarity_truncated": {"8": {"layers": [0, 1], **maps(8)}},
            "attention": {
                "sources": [*(f"latent {i}" for i in range(8)), "answer"],
                "targets": [*parts, "latents"],
                "iterations": [_grid(rng, 9, 5, 0.4) for _ in range(3)],
                "teacher_full": [0.2] * 5,
                "teacher_truncated": {"8": [0.2] * 5},
            },
            "magnitudes": {
                "iterations": [maps(8, 12.0) for _ in range(3)],
                "teacher_full": maps(20, 12.0),
                "teacher_truncated": {"4": maps(4, 12.0), "8": maps(8, 12.0)},
            },
            "interventions": _interventions(rng),
        }
        for name in WEIGHTS
    }


def _interventions(rng: random.Random) -> dict[str, Any]:
    """Of 60 problems with 8 latents, the first of which hold nothing."""

    def changed(right: int, others: int) -> dict[str, Any]:
        """So many answers right, and so many others than the 37 of 60 untouched ones."""
        difference = 100 * (right - 37) / 60
        return {
            "exact_match": 100 * right / 60,
            "ci95": wilson(right, 60),
            "difference": {
                "difference": difference,
                "ci95": (difference - 6, difference + 6),
                "p_value": 0.5,
            },
            "changed": 100 * others / 60,
        }

    def donated(right: int, following: int) -> dict[str, Any]:
        follows = {
            "share": 100 * following / 54,
            "ci95": wilson(following, 54),
            "n": 54,
            "untouched": 7.4,
        }
        return {**changed(right, following), "follows": follows}

    def slot(i: int) -> int:
        return 37 - int(4 * i * rng.random())

    return {
        "n": 60,
        "none": 100 * 37 / 60,
        "ci95": wilson(37, 60),
        "together": {
            "removed": changed(6, 50),
            "mean": changed(9, 48),
            "shuffled": changed(36, 2),
            "donor": donated(7, 45),
        },
        "alone": {
            "removed": [changed(slot(i), 3 * i) for i in range(8)],
            "mean": [changed(slot(i), 3 * i) for i in range(8)],
            "donor": [donated(slot(i), 4 * i) for i in range(8)],
        },
        "iterations": [changed(5, 50), changed(30, 20)],
    }


def _fidelity(folder: Path) -> None:
    """The fidelity stage's own files, of made-up answers: more slots, more of them right."""
    (folder / "fidelity").mkdir()
    results = []
    grid = [
        (policy, m, bits) for policy in ("rkv", "random") for m in (2, 4, 8, 16) for bits in (16, 4)
    ]
    for cell in (Cell("full"), Cell("none"), *(Cell(p, m, b, b) for p, m, b in grid)):
        slots = {"full": 32, "none": 0}.get(cell.policy, cell.budget or 0)
        need = 3.0 if cell.policy == "random" else 2.0
        answers = [
            CachedAnswer(
                id=f"validation-{i:03d}",
                n_steps=2 + i % 3,
                topic="farm",
                cot_tokens=32,
                policy=cell.policy,
                budget=cell.budget,
                keys_bits=cell.keys_bits,
                values_bits=cell.values_bits,
                text="7",
                answer="7",
                gold="7",
                correct=i % 20 < 20 * slots / (need * (2 + i % 3)),
                nll=0.5,
                kl=0.1,
                answer_tokens=3,
                tokens_kept=float(slots),
                bytes=100 * slots,
            )
            for i in range(60)
        ]
        costs = [
            BatchCost(
                problems=20,
                n_steps=n,
                seconds_per_problem=(0.2 + 0.01 * slots + 0.05 * n) / 1000,
                peak_memory_bytes=None,
                hardware=MACHINE,
            )
            for n in (2, 3, 4)
        ]
        results.append(Result(cell, answers, costs))
    write_results(folder / "fidelity", results, split="validation", within=2.0)
    write_finding(folder / "measured/fidelity.json", costs_of(results))


def _student(folder: Path, name: str, digest: str) -> None:
    alpha_kv, alpha_codi = WEIGHTS.get(name, (0.0, 0.0))
    longer = name == "no-cot-equal-time"
    _write(
        folder / "students" / name / "student.json",
        {
            "name": name,
            "settings": {
                "training": {**TRAINING, "steps": None, "epochs": 23 if longer else 10},
                "reads": "kv_targets" if name in WEIGHTS else "problems",
                "reasoning": "jacobi",
                "iterations": 3,
                "alpha_kv": alpha_kv,
                "alpha_codi": alpha_codi,
                "w_cot": 0.0,
            },
            "fingerprints": {"teacher": "t" * 64}
            | ({"kv_targets": digest} if name in WEIGHTS else {"problems": "p" * 64}),
            "traces": "equations",
            "steps": 2300 if longer else 1000,
        },
    )
    terms = {"answer": (2.5, 0.3), "kv": (1.0, 0.35), "codi": (0.8, 0.2)}
    used = ["answer", *(["kv"] if alpha_kv else []), *(["codi"] if alpha_codi else [])]
    curves = {f"loss_{term}": terms[term] for term in used}
    curves["loss"] = (sum(terms[t][0] for t in used), sum(terms[t][1] for t in used))
    curves |= {f"gradient_share_{t}": (1 / len(used), 1 / len(used)) for t in used}
    _curves(folder / "curves/students" / name, curves)


def _curves(folder: Path, ends: dict[str, tuple[float, float]]) -> None:
    plots = folder / "plots/metrics"
    plots.mkdir(parents=True)
    for metric, (first, last) in ends.items():
        lines = [f"step\t{metric}"]
        for step in range(25, 1001, 25):
            value = last + (first - last) * math.exp(-step / 220) + 0.01 * math.sin(step)
            lines.append(f"{step}\t{value}")
        (plots / f"{metric}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _targets(folder: Path, records: int) -> str:
    """A store of traces of 5 to 20 tokens cut to 8 slots; returns its digest."""
    rng = random.Random(0)
    made = [
        Record(
            id=f"train-{i}",
            question_ids=[1, 2],
            cot_ids=[3] * max(5, min(20, round(rng.gauss(13, 4)))),
            answer_prompt_ids=[4],
            answer_ids=[5],
            source="synthetic",
            topic="farm",
            n_steps=2,
        )
        for i in range(records)
    ]
    spec = make_spec(GEOMETRY)
    counts = torch.tensor([min(len(r.cot_ids), GEOMETRY.slots) for r in made])
    slots = torch.arange(GEOMETRY.slots)
    lead = (records, 2, 2, GEOMETRY.slots)
    positions = torch.where(slots < counts[:, None], slots, -1)[:, None, None].expand(lead)
    folder.mkdir(parents=True)
    write_targets_shard(
        folder,
        spec,
        0,
        made,
        keys=torch.randn(*lead, 4, generator=torch.Generator().manual_seed(0)),
        values=torch.randn(*lead, 4, generator=torch.Generator().manual_seed(1)),
        slot_counts=counts[:, None, None].expand(lead[:-1]),
        slot_positions=positions,
        endpoint=torch.ones(records, 3, 8) * torch.arange(1, records + 1)[:, None, None],
    )
    return finish(folder, spec, 1).digest


def _log(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stages = ["prepare", "teacher", "generate", "evict", *(f"distill {s}" for s in STUDENTS)]
    entries = [
        {
            "stage": stage,
            "seconds": 12.5 + 30 * i,
            "started": f"2026-01-02T03:{i:02d}:00+00:00",
            "host": "here",
        }
        for i, stage in enumerate([*stages, "evaluate"])
    ]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)

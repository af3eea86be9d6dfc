"""The files of a small pipeline as the other stages leave them, with plausible numbers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kava_core.artefacts import write_json
from kava_core.store import Codec, Geometry, Record, write_targets_shard
from tests.store.make import finish

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


def make_pipeline(data: Path, *, problems: int = 60, records: int = 40) -> Pipeline:
    """Write everything that a report reads; the same arguments write the same files."""
    made = Pipeline(data)
    digest = _targets(made.folder / "kv_targets", records)
    _evaluation(made.folder / "evaluation", problems)
    for name in STUDENTS:
        _student(made.folder / "students" / name, name, digest)
    _write(made.folder / "teacher/teacher.json", {"settings": {"training": TRAINING}})
    _curves(made.folder / "teacher/live", {"loss": (5.0, 0.02), "loss_chain": (5.0, 0.02)})
    _write(
        made.folder / "teacher/metrics.json",
        {"n": 50, "exact_match_cot": 98.0, "exact_match_no_cot": 4.0},
    )
    counts = {"problems": 60, "by_steps": {"2": 20, "3": 20, "4": 20}}
    _write(
        made.folder / "problems/metrics.json",
        {"train": counts, "validation": counts, "test": counts, "dropped": {}},
    )
    _write(
        made.folder / "problems/problems.json",
        {"traces": "equations", "settings": {"source": "synthetic", "seed": 7}},
    )
    _log(made.log)
    return made


def _evaluation(folder: Path, problems: int) -> None:
    rows, metrics = [], {}
    for system, (accuracy, passes, tokens, milliseconds) in SYSTEMS.items():
        rng = random.Random(system)
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
                    "test_set": "synthetic",
                    "system": system,
                    "id": f"test-{i:04d}",
                    "n_steps": steps,
                    "topic": "farm",
                    "gold": gold,
                    "question": f"ian has {i} apples. he sells 3 and doubles the rest. how many?",
                    "text": f"{chain}The answer is: {answer}",
                    "answer": answer,
                    "correct": answer == gold,
                    "passes": round(passes),
                    "tokens": round(tokens),
                    "seconds": milliseconds / 1000,
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
            "seconds_per_problem": milliseconds / 1000,
            "by_steps": {
                str(n): {"exact_match": 100 * sum(m) / len(m), "n": len(m)}
                for n, m in marks.items()
            },
        }
    _write(folder / "metrics.json", {"synthetic": metrics})
    pq.write_table(pa.Table.from_pylist(rows), folder / "predictions.parquet")
    rng = random.Random(0)
    cells: dict[str, Any] = {
        part: [[round(rng.uniform(0.1, 0.9), 3) for _ in range(8)] for _ in range(2)]
        for part in ("keys", "values")
    }
    cells["keys"][1][7] = None
    _write(
        folder / "similarity.json",
        {name: {"records": 32, "layers": [0, 1], **cells} for name in WEIGHTS},
    )


def _student(folder: Path, name: str, digest: str) -> None:
    alpha_kv, alpha_codi = WEIGHTS.get(name, (0.0, 0.0))
    reasoning = "jacobi" if name in WEIGHTS else "none"
    _write(
        folder / "student.json",
        {
            "name": name,
            "settings": {
                "training": TRAINING,
                "reasoning": reasoning,
                "iterations": 3,
                "alpha_kv": alpha_kv,
                "alpha_codi": alpha_codi,
                "w_cot": 0.0,
            },
            "fingerprints": {"teacher": "t" * 64}
            | ({"kv_targets": digest} if name in WEIGHTS else {"problems": "p" * 64}),
            "traces": "equations",
        },
    )
    terms = {"answer": (2.5, 0.3), "kv": (1.0, 0.35), "codi": (0.8, 0.2)}
    used = ["answer", *(["kv"] if alpha_kv else []), *(["codi"] if alpha_codi else [])]
    curves = {f"loss_{term}": terms[term] for term in used}
    curves["loss"] = (sum(terms[t][0] for t in used), sum(terms[t][1] for t in used))
    curves |= {f"gradient_share_{t}": (1 / len(used), 1 / len(used)) for t in used}
    _curves(folder / "live", curves)


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
    codec = Codec(keys="float32", values="float32", endpoint="float32")
    counts = torch.tensor([min(len(r.cot_ids), GEOMETRY.slots) for r in made])
    slots = torch.arange(GEOMETRY.slots)
    lead = (records, 2, 2, GEOMETRY.slots)
    positions = torch.where(slots < counts[:, None], slots, -1)[:, None, None].expand(lead)
    folder.mkdir(parents=True)
    write_targets_shard(
        folder,
        0,
        made,
        keys=torch.randn(*lead, 4, generator=torch.Generator().manual_seed(0)),
        values=torch.randn(*lead, 4, generator=torch.Generator().manual_seed(1)),
        slot_counts=counts[:, None, None].expand(lead[:-1]),
        slot_positions=positions,
        endpoint=torch.ones(records, 3, 8) * torch.arange(1, records + 1)[:, None, None],
        geometry=GEOMETRY,
        codec=codec,
    )
    return finish(folder, "kv_targets", 1, GEOMETRY, codec).digest


def _log(path: Path) -> None:
    path.parent.mkdir(parents=True)
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

"""What is looked at in every stage's artefact, and how the stage is run to make it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from kava_core.answers import extract_answer, same_answer
from kava_core.artefacts import read_json
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.written import read_chain
from kava_core.settings import Traces
from kava_core.store import TargetsStore, TeacherStore
from kava_core.targets.traces import WriteJob, shard_file
from stages.cli import kava
from tests.golden.comparison import digest, signature, without
from tests.golden.inputs import NAME, with_settings
from tests.reporting.pipeline import make_pipeline

# No golden values: they are not the same twice.
MEASURED = ("second", "byte", "memory", "duration", "hardware")
POLICIES: dict[str, dict[str, Any]] = {
    name: {"policy": name}
    for name in (
        "rkv",
        "attention",
        "redundancy",
        "crop",
        "uniform",
        "random",
        "key_norm",
        "value_norm",
        "streaming",
    )
}
EVICTIONS: dict[str, dict[str, Any]] = {
    **POLICIES,
    "pyramid": {"budget_shape": "pyramid"},
    "selection": {"share": "selection"},
    "merged": {"share": "merged"},
    "post_rope": {"phase": "post_rope"},
    "last layer": {"layers": {"last": 1}},
    "8 and 4 bits": {"keys_bits": 8, "values_bits": 4, "endpoint_bits": 8},
    "channels": {"keys_bits": 8, "values_bits": 8, "granularity": "channel"},
}


CHAINS: tuple[tuple[TraceForm, str], ...] = (
    ("equations", "<<3 + 4=7>>\n<<7+5=12>>The answer is: 12.0"),
    ("equations", "So <<7+5=12>>The answer is: 12"),
    ("equations", "<<7+5=12>>The answer is:"),
    ("sentences", "Ann has 7.\n\nThe answer is: 7\nNo, 12.The answer is: 12"),
    ("results", " 7 12The answer is: 12"),
    ("results", " 7 12The answer is: 7"),
    ("checked", " 7: 3+4 = 7 12: 7+5 = 12The answer is: 12"),
)
# The answers of random models are digits; what else an answer may be is judged beside them.
GENERATED = (
    "<<10-9=1>>The answer is: 1,234.50 dollars",
    "The answer is: 12\nThe next problem has 99 apples",
    "He sold 3.\n#### 1,080",
    "so $x = \\boxed{\\frac{1}{2}}$ and that is 3",
    "it grew by 50%",
    "about 3 million",
    "He had 10, sold 9, so -3 remains",
    "The answer is: 13333.33",
    "The answer is: $x^2 + 1$",
    "The answer is: Evelyn",
    "no number",
)
GOLD = (
    "1234.5",
    "12",
    "1080",
    "1/2",
    "50",
    "3000000",
    "-3",
    "13333.333333333334",
    "1+x^2",
    "evelyn",
)


@dataclass(frozen=True)
class Project:
    """A copy of the inputs, in which one stage is run."""

    home: Path

    @property
    def data(self) -> Path:
        return self.home / "data" / NAME

    def run(self, *command: str, pipeline: str = NAME) -> None:
        """`kava …` in process."""
        paths = [
            "--pipelines",
            str(self.home / "pipelines.yaml"),
            "--data",
            str(self.home / "data"),
        ]
        result = CliRunner(catch_exceptions=False).invoke(
            kava, [*command, *paths, "--pipeline", pipeline]
        )
        assert result.exit_code == 0, result.output


def prepare(project: Project) -> dict[str, Any]:
    shutil.rmtree(project.home / "data")
    found = {}
    for pipeline in (NAME, "rows"):
        project.run("prepare", pipeline=pipeline)
        for folder in ("problems", "test_sets"):
            made = project.home / "data" / pipeline / folder
            found[f"{pipeline}/{folder}"] = {
                **{file.name: _problems(file) for file in sorted(made.glob("*.parquet"))},
                "metrics": digest(read_json(made / "metrics.json")),
                "rows": read_json(made / "metrics.json")["rows"],
            }
    return found


def teacher(project: Project) -> dict[str, Any]:
    shutil.rmtree(project.data / "teacher")
    project.run("teacher")
    folder = project.data / "teacher"
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {
        "weights": _weights(folder),
        "vocabulary": digest(tokenizer["model"]["vocab"]),
        "pieces": digest(tokenizer["pre_tokenizer"]),
        "curves": _curves(project.data / "curves/teacher"),
        "metrics": read_json(folder / "metrics.json"),
    }


def traces(project: Project) -> dict[str, Any]:
    """No chain of a random model is kept: what it writes and what is read in chains, apart."""
    found = {}
    for name, settings in {
        "likeliest": Traces(max_new_tokens=8, batch_size=5),
        "drawn": Traces(max_new_tokens=8, batch_size=5, samples=3, temperature=0.7, seed=1),
    }.items():
        shards = project.home / name
        shards.mkdir()
        job = WriteJob(project.data / "problems", project.data / "teacher", settings, shards)
        assert job.open()(0) == 24
        found[name] = digest(read_json(shard_file(shards, 0)))
    gold = Problem("p", "?", (), "12", "golden", "")
    found["read"] = {
        f"{form}: {text}": asdict(
            read_chain(text, gold, form, answer_prompt="The answer is:", ended=True)
        )
        for form, text in CHAINS
    }
    return found


def generate(project: Project) -> dict[str, Any]:
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "16 bits": {},
        "8 and 4 bits": {"keys_bits": 8, "values_bits": 4, "endpoint_bits": 8},
        "half of each trace": {"latent_fraction": 0.5},
    }
    for name, settings in variants.items():
        with_settings(project.home, "generate", **{"latent_fraction": 1.0, **settings})
        project.run("generate")
        store = TeacherStore.open(project.data / "teacher_kv")
        shards = [store.shard(number) for number in range(store.shards)]
        found[name] = {
            "records": _records(record for shard in shards for record in shard.records),
            "keys": signature(torch.cat([shard.keys.dequantise().float() for shard in shards])),
            "values": signature(torch.cat([shard.values.dequantise().float() for shard in shards])),
            "importance": signature(torch.cat([shard.importance.float() for shard in shards])),
            "endpoint": signature(
                torch.cat([shard.endpoint.dequantise().float() for shard in shards])
            ),
            "codec": store.codec.model_dump(mode="json"),
        }
    return found


def evict(project: Project) -> dict[str, Any]:
    found = {}
    plain = {"policy": "rkv", "budget_shape": "uniform", "share": "none", "phase": "pre_rope"}
    plain |= {"layers": "all", "granularity": "token"}
    bits = {"keys_bits": 16, "values_bits": 16, "endpoint_bits": 16}
    for name, settings in EVICTIONS.items():
        with_settings(project.home, "evict", **{**plain, **bits, **settings})
        project.run("evict")
        store = TargetsStore.open(project.data / "kv_targets")
        targets = store.batch(range(len(store))).dequantise()
        mask = targets.slot_mask[..., None]
        found[name] = {
            "counts": digest(targets.slot_counts.tolist()),
            "positions": digest(targets.slot_positions.tolist()),
            "first": targets.slot_positions[0].tolist(),
            "keys": signature(targets.keys.masked_fill(~mask, 0)),
            "values": signature(targets.values.masked_fill(~mask, 0)),
            "metrics": without(read_json(project.data / "eviction.json"), MEASURED),
        }
    return found


def fidelity(project: Project) -> dict[str, Any]:
    project.run("fidelity")
    folder = project.data / "fidelity"
    return {
        "metrics": without(read_json(folder / "metrics.json"), MEASURED),
        "answers": _table(folder / "answers.parquet"),
        "judged": _judged(),
    }


def distill(project: Project) -> dict[str, Any]:
    shutil.rmtree(project.data / "students")
    found = {}
    for name in ("kava", "no-cot"):
        project.run("distill", name)
        found[name] = {
            "weights": _weights(project.data / "students" / name),
            "curves": _curves(project.data / "curves/students" / name),
        }
    return found


def evaluate(project: Project) -> dict[str, Any]:
    project.run("evaluate")
    folder = project.data / "evaluation"
    metrics = without(read_json(folder / "metrics.json"), MEASURED)
    insights = without(read_json(folder / "interpretability.json"), MEASURED)
    return {
        "metrics": metrics,
        "comparisons": without(read_json(folder / "comparisons.json"), MEASURED),
        "similarity": without(read_json(folder / "similarity.json"), MEASURED),
        "latents": {"numbers": signature(_numbers(insights)), "words": digest(_words(insights))},
        "answers": _table(folder / "predictions.parquet"),
        "judged": _judged(),
    }


def report(project: Project) -> dict[str, Any]:
    """From a pipeline of made-up results, with every kind of file that the page reads."""
    shutil.rmtree(project.home / "data")
    made = make_pipeline(project.home / "data", name=NAME)
    project.run("report")
    folder = made.folder / "report"
    return {
        "files": sorted(
            str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()
        ),
        "summary": without(read_json(folder / "summary.json"), MEASURED),
        "table": (folder / "table.txt").read_text(encoding="utf-8").splitlines(),
    }


STAGES: dict[str, Callable[[Project], dict[str, Any]]] = {
    "prepare": prepare,
    "teacher": teacher,
    "traces": traces,
    "generate": generate,
    "evict": evict,
    "fidelity": fidelity,
    "distill": distill,
    "evaluate": evaluate,
    "report": report,
}


def _table(file: Path) -> dict[str, Any]:
    """Rows of a Parquet file: how many, their text as a hash, and their numbers."""
    rows = pq.read_table(file).to_pylist()
    plain = without(rows, MEASURED)
    return {
        "rows": len(rows),
        "words": digest(_words(plain)),
        "numbers": signature(_numbers(plain)),
    }


def _judged() -> dict[str, list[str]]:
    """Of each generated text the answer that is found in it, and which of the gold ones it is."""
    found = {text: extract_answer(text) for text in GENERATED}
    return {
        text: [str(answer), *(gold for gold in GOLD if same_answer(answer, gold))]
        for text, answer in found.items()
    }


def _problems(file: Path) -> str:
    """All texts of a file of problems, as a hash."""
    return digest(pq.read_table(file).to_pylist())


def _weights(folder: Path) -> dict[str, Any]:
    """Of a model, and of the latents of a student beside it."""
    tensors = {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    return {name: signature(tensors[name]) for name in sorted(tensors)}


def _curves(folder: Path) -> dict[str, list[float]]:
    """Every logged number, by the name of its file."""
    found = {}
    for file in sorted(folder.rglob("*.tsv")):
        lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        column = lines[0].index(file.stem) if file.stem in lines[0] else -1
        if not any(word in file.stem for word in MEASURED):
            found[file.stem] = [float(line[column]) for line in lines[1:]]
    return found


def _records(records: Any) -> str:
    fields = ("id", "question_ids", "cot_ids", "answer_prompt_ids", "answer_ids", "answer")
    return digest([[getattr(record, name) for name in fields] for record in records])


def _numbers(value: Any) -> list[float]:
    """Every number in a JSON value, in order."""
    if isinstance(value, bool | str) or value is None:
        return []
    if isinstance(value, int | float):
        return [float(value)]
    inside = [value[key] for key in sorted(value)] if isinstance(value, dict) else value
    return [number for item in inside for number in _numbers(item)]


def _words(value: Any) -> Any:
    """A JSON value without its numbers that are not whole."""
    if isinstance(value, dict):
        return {key: _words(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_words(inner) for inner in value]
    return None if isinstance(value, float) else value

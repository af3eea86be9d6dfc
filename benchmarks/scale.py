"""What the stages take as the number of records grows.

    python benchmarks/scale.py [--records 20000 --records 100000 …] [--json]

Every stage as its own command, with one worker, over synthetic problems and a tiny teacher, so that
what grows is what is kept of the records. Reported for each number: records per second, the peak of
RssAnon (memory that no file stands behind) of the stage's own process and of its largest other one,
and the bytes of what it made. Training takes a few steps, whatever the number. The keys compare the
largest number with the smallest: time and bytes per record of the sharded stages; memory is that at
the largest.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import yaml
from rich.console import Console
from rich.table import Table

NUMBERS = (20_000, 100_000, 385_620)
STAGES = (
    (("prepare",), "problems"),
    (("teacher",), "teacher"),
    (("generate",), "teacher_kv"),
    (("evict",), "kv_targets"),
    (("distill", "kava"), "students/kava"),
    (("distill", "no-cot"), "students/no-cot"),
)
SHARDED = ("generate", "evict")
TRAINING = {"steps": 5, "batch_size": 8, "learning_rate": 1.0e-3, "threads": 1}
TARGETS = {
    "driver_gb": 1.0,
    "worker_gb": 0.6,
    "time_per_record": 1.1,
    "bytes_per_record": 1.1,
}


@dataclass(frozen=True)
class Taken:
    """What one stage took: seconds, bytes made, and the peak of RssAnon, in bytes, of its own
    process and of the largest other one (0: there was none)."""

    seconds: float
    made: int
    driver: int
    worker: int


def settings(records: int) -> dict[str, Any]:
    """A pipeline of so many training problems."""
    return {
        "prepare": {
            "source": {"name": "synthetic", "steps": [8, 8], "style": "prose"},
            "traces": "sentences",
            "train": records,
            "validation": 8,
            "test": 8,
        },
        "teacher": {
            "scratch": {
                "vocabulary": 300,
                "hidden_size": 16,
                "layers": 1,
                "heads": 2,
                "kv_heads": 1,
                "intermediate_size": 16,
                "context_length": 1024,
            },
            "training": TRAINING,
            "validate_on": 2,
            "max_new_tokens": 2,
        },
        "generate": {"shard_size": 2048, "batch_size": 64},
        "evict": {"budget": 8},
        "students": {
            "kava": {
                "reads": "kv_targets",
                "iterations": 1,
                "alpha_kv": 1.0,
                "training": TRAINING,
            },
            "no-cot": {"reads": "problems", "training": TRAINING},
        },
        "evaluate": {"max_new_tokens": 2},
        "report": {"title": "Scale"},
        "resources": {"workers": 1},
    }


def anonymous(process: psutil.Process) -> int:
    """RssAnon in bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def run(command: tuple[str, ...], home: Path, made: str) -> Taken:
    """A stage in `home`, watched ten times a second."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (home / "log.txt").open("ab") as log:
        child = psutil.Popen(
            [sys.executable, "-m", "stages", *command, "--pipelines", home / "pipelines.yaml",
             "--data", home / "data"],
            stdout=log, stderr=log, env=environment, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        driver = worker = 0
        while child.poll() is None:
            driver = max(driver, anonymous(child))
            others = [p for p in child.children(recursive=True) if "ray::" in " ".join(_name(p))]
            worker = max([worker, *(anonymous(p) for p in others)])
            time.sleep(0.1)
    if child.returncode != 0:
        said = (home / "log.txt").read_text(encoding="utf-8")
        raise click.ClickException(f"{' '.join(command)} failed:\n{said}")
    folder = home / "data/scale" / made
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Taken(time.monotonic() - began, size, driver, worker)


def _name(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def measure(records: int) -> dict[str, Taken]:
    """All stages over so many records, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        document = {"pipeline": "scale", "pipelines": {"scale": settings(records)}}
        (home / "pipelines.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        return {" ".join(command): run(command, home, made) for command, made in STAGES}


def ratios(taken: dict[int, dict[str, Taken]]) -> dict[str, float]:
    """What TARGETS are about: GB at the largest number, the rest against the smallest."""
    few, many = min(taken), max(taken)
    grown = {
        kind: max(
            (getattr(taken[many][name], kind) / many) / (getattr(taken[few][name], kind) / few)
            for name in SHARDED
        )
        for kind in ("seconds", "made")
    }
    return {
        "driver_gb": max(each.driver for each in taken[many].values()) / 1e9,
        "worker_gb": max(each.worker for each in taken[many].values()) / 1e9,
        "time_per_record": grown["seconds"],
        "bytes_per_record": grown["made"],
    }


@click.command()
@click.option("--records", type=click.IntRange(1), multiple=True, default=NUMBERS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def main(records: tuple[int, ...], as_json: bool) -> None:
    """Measure the stages at these numbers of records."""
    taken = {number: measure(number) for number in sorted(records)}
    found = ratios(taken)
    if as_json:
        print(json.dumps(found))
        return
    table = Table("records", "stage", "records/s", "driver MB", "worker MB", "MB made")
    for number, stages in taken.items():
        for name, each in stages.items():
            table.add_row(
                f"{number:,}",
                name,
                f"{number / each.seconds:,.0f}",
                f"{each.driver / 1e6:,.0f}",
                f"{each.worker / 1e6:,.0f}" if each.worker else "",
                f"{each.made / 1e6:,.1f}",
            )
    Console().print(table)
    for name, value in found.items():
        print(f"{name} {value:.2f} (target {TARGETS[name]})")


if __name__ == "__main__":
    main()

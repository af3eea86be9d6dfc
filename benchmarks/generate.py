"""What the generate stage costs beyond the teacher's own forward pass.

    python benchmarks/generate.py [--json]

Examples per second of the whole stage in process (encoding, capture, scores, un-rotation, store)
over those of a bare teacher-forced forward with a cache in the same batches, on a Llama of over
50 M parameters. The bare forward has no LM head, which the stage does not need either. Rounds
alternate between the two; medians are reported.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from kava_stages.cli import quiet
from rich.console import Console
from rich.table import Table

from kava_core.models.loading import build_llama, load_model, load_tokenizer, save_model
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Generate
from kava_core.targets.build import ShardCounts
from kava_core.targets.generate import GenerateJob, teacher_spec
from kava_core.targets.quarantine import Quarantine
from kava_core.targets.reading import Reading

TARGET = 0.85
EXAMPLES, BATCH = 32, 8


def build(folder: Path) -> tuple[GenerateJob, int]:
    """Problems and a teacher in `folder`; the job over them and the teacher's parameter count."""
    source = Synthetic(steps=(8, 8), style="prose")
    splits = source.splits(EXAMPLES, 1, 1, seed=0, traces="sentences")
    (folder / "problems").mkdir()
    write_problems(folder / "problems", splits, "sentences", {})
    texts = [p.question + " ".join(p.steps) for p in splits.train]
    tokenizer = train_tokenizer(texts, 300)
    model = build_llama(
        tokenizer,
        hidden_size=640,
        layers=12,
        heads=10,
        kv_heads=5,
        intermediate_size=1728,
        context_length=1024,
        rope_theta=10000.0,
        seed=0,
    )
    save_model(folder / "teacher", model, tokenizer)
    (folder / "store").mkdir()
    settings = Generate(shard_size=EXAMPLES, batch_size=BATCH, threads=torch.get_num_threads())
    reading = Reading(folder / "problems", folder / "teacher", settings)
    left_out = Quarantine(folder / "quarantine")
    job = GenerateJob(reading, folder / "store", teacher_spec(model, settings), left_out)
    return job, sum(p.numel() for p in model.parameters())


def bare_forward(job: GenerateJob) -> Callable[[], None]:
    """The teacher over the same sequences in the same batches, with a cache and nothing else."""
    source = open_problems(job.reading.problems)
    traces = TraceEncoder(load_tokenizer(str(job.reading.teacher)), source.traces).encode_all(
        source.load("train")
    )
    model = load_model(str(job.reading.teacher))
    rows = sorted(
        (t.question_ids + t.cot_ids + t.answer_prompt_ids + t.answer_ids for t in traces), key=len
    )

    @torch.no_grad()
    def run() -> None:
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            ids = torch.zeros(len(chosen), max(map(len, chosen)), dtype=torch.long)
            for i, row in enumerate(chosen):
                ids[i, : len(row)] = torch.tensor(row)
            model.base_model(input_ids=ids, use_cache=True)

    return run


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the ratio.")
@click.option("--rounds", default=5, show_default=True, help="Timed rounds of each.")
def main(as_json: bool, rounds: int) -> None:
    """Compare the generate stage with a bare forward pass."""
    quiet()
    with tempfile.TemporaryDirectory() as name:
        job, parameters = build(Path(name))
        work, bare = job.open(), bare_forward(job)
        seconds: dict[str, list[float]] = {"stage": [], "forward": []}
        tokens = 0
        for turn in range(rounds + 1):
            for what, call in (("forward", bare), ("stage", partial(work, 0))):
                began = time.perf_counter()
                result = call()
                if turn:  # the first round warms up
                    seconds[what].append(time.perf_counter() - began)
                if isinstance(result, ShardCounts):
                    tokens = result.tokens
    # Pair by pair, so that a machine that drifts drifts under both.
    pairs = zip(seconds["forward"], seconds["stage"], strict=True)
    ratio = statistics.median(forward / stage for forward, stage in pairs)
    if as_json:
        print(json.dumps({"generate_vs_forward": ratio}))
        return
    table = Table(
        title=f"{parameters / 1e6:.0f} M parameters, {EXAMPLES} examples, {tokens} CoT tokens"
    )
    for column in ("", "seconds (median)", "examples/s"):
        table.add_column(column, justify="left" if not column else "right")
    for what, label in (("forward", "bare forward with cache"), ("stage", "generate stage")):
        middle = statistics.median(seconds[what])
        table.add_row(label, f"{middle:.2f}", f"{EXAMPLES / middle:.1f}")
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(f"generate_vs_forward: {ratio:.2f} (target: at least {TARGET})")


if __name__ == "__main__":
    main()

"""What reasoning in latents saves a server.

    python benchmarks/serve.py [--json]

Two servers, `kava serve` of a latent student and of a teacher with the same weights, which writes
its chain of thought; the model and the lengths of `benchmarks/inference.py`: Q = 64, a trace of 128
tokens, A = 8; M = 24 latents, T = 3 Jacobi iterations. Weights are random and nothing ends a
sequence, so the lengths are forced.

One client asks one question after the other; p50 is the median of its seconds. Then, for batches
(`--max-batch`) of 1, 8 and 32, an open-loop generator on loopback sends requests at times that were
drawn before (Poisson), whatever the server does; four times as many as the batch has places (at
least 8), so that its filling and emptying weigh little. They come ten times faster than the teacher
answers, which gives the requests/s that either server comes to; and at half the teacher's rate, the
same times to both, which gives p50 and p99 of the seconds from the time a request was to be sent to
the end of its answer. Beside them the server's seconds of processor time per request at full load,
which other programs on the machine change little. Rounds alternate between the two servers; ratios
are medians over rounds.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import httpx2
import psutil
import torch
from kava_stages.cli import quiet
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from kava_core.artefacts import write_json
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import save_model
from kava_core.problems.tokenizer import train_tokenizer

QUESTION, TRACE, ANSWER, PROMPT = 64, 128, 8, 4
LATENTS, ITERATIONS = 24, 3
BATCHES = (1, 8, 32)
ALONE = 8  # questions of the one client, in a round
TARGETS = {
    "latent_vs_cot_p50_one_client": 4.0,
    **{f"latent_vs_cot_requests_b{batch}": None for batch in BATCHES},
    "latent_vs_cot_requests_b32": 2.5,
}


def build(root: Path) -> dict[str, Path]:
    """Folders of a Llama of 18 M parameters as a teacher, and of the student made from it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["how many ?"], 300)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # never the likeliest
    student = LatentReasoner.from_teacher(
        model,
        latents=LATENTS,
        iterations=ITERATIONS,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=list(range(5, 5 + PROMPT)),
        eos_token_id=tokenizer.eos_token_id,
        seed=0,
    )
    folders = {"cot": root / "cot", "latent": root / "latent"}
    save_model(folders["cot"], model, tokenizer)
    write_json(folders["cot"] / "teacher.json", {})
    student.save_pretrained(folders["latent"])
    tokenizer.save_pretrained(folders["latent"])
    return folders


@dataclass(frozen=True)
class Server:
    """Where it is, and its process."""

    url: str
    process: psutil.Process

    @property
    def busy(self) -> float:
        """Seconds of processor time so far."""
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)


@contextmanager
def served(folder: Path, batch: int) -> Iterator[Server]:
    """A server that answers `batch` requests at a time."""
    options = ["--port", "0", "--max-batch", str(batch), "--queue", "10000", "--timeout", "3600"]
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "serve", str(folder), *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.search(r"at (http://\S+)/v1$", line.strip())
            if found:
                yield Server(found[1], psutil.Process(process.pid))
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.communicate()


async def ask(client: httpx2.AsyncClient, url: str, system: str, seed: int) -> None:
    """One question of its own, answered to its last token."""
    rng = random.Random(seed)
    tokens = {"cot": TRACE + ANSWER, "latent": ANSWER}[system]
    body = {
        "model": system,
        "prompt": [rng.randrange(8, 8000) for _ in range(QUESTION)],
        "max_tokens": tokens,
    }
    found = await client.post(f"{url}/v1/completions", json=body)
    assert found.json()["usage"]["completion_tokens"] == tokens, found.text


async def alone(url: str, system: str) -> list[float]:
    """Seconds of one client's requests, one after the other."""
    seconds = []
    async with httpx2.AsyncClient(timeout=3600) as client:
        for seed in range(ALONE):
            began = time.perf_counter()
            await ask(client, url, system, seed)
            seconds.append(time.perf_counter() - began)
    return seconds


async def load(url: str, system: str, times: Sequence[float]) -> tuple[float, list[float]]:
    """Requests/s and seconds of requests that are sent at these times."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(timeout=3600, limits=limits) as client:
        began = time.perf_counter()

        async def one(seed: int, at: float) -> float:
            await asyncio.sleep(began + at - time.perf_counter())
            await ask(client, url, system, seed)
            return time.perf_counter() - began - at  # not from when it could at last be sent

        seconds = await asyncio.gather(*(one(seed, at) for seed, at in enumerate(times)))
        return len(times) / (time.perf_counter() - began - times[0]), list(seconds)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    return times


def quantile(seconds: Sequence[float], share: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


class Round(dict[str, float]):
    """What one round measured of one system: requests, busy, p50, p99, and alone."""


def measure(folders: dict[str, Path], batch: int, rounds: int) -> dict[str, list[Round]]:
    found: dict[str, list[Round]] = {"cot": [], "latent": []}
    count = max(8, 4 * batch)
    with served(folders["cot"], batch) as cot, served(folders["latent"], batch) as latent:
        servers = {"cot": cot, "latent": latent}
        for system, server in servers.items():  # warm up
            asyncio.run(load(server.url, system, [0.0] * min(batch, 4)))
        rate = 20.0
        for turn in range(rounds):
            both = {system: Round() for system in servers}
            for system, server in servers.items():
                if batch == 1:
                    seconds = asyncio.run(alone(server.url, system))
                    both[system]["alone"] = statistics.median(seconds)
                times, before = arrivals(count, 10 * rate, turn), server.busy
                both[system]["requests"], _ = asyncio.run(load(server.url, system, times))
                both[system]["busy"] = (server.busy - before) / count
                if system == "cot":
                    rate = both[system]["requests"]
            for system, server in servers.items():
                _, seconds = asyncio.run(load(server.url, system, arrivals(count, rate / 2, turn)))
                both[system]["p50"] = quantile(seconds, 0.5)
                both[system]["p99"] = quantile(seconds, 0.99)
                found[system].append(both[system])
    return found


def middle(rounds: Sequence[Round], name: str) -> float:
    return statistics.median(one[name] for one in rounds)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the ratios.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Timed rounds of each."
)
def main(as_json: bool, rounds: int) -> None:
    """Compare a server of latents with one of written chains of thought."""
    quiet()
    table = Table(
        title=f"Q = {QUESTION}, trace of {TRACE} tokens, A = {ANSWER}; "
        f"M = {LATENTS}, T = {ITERATIONS}; p50 and p99 at half the chain's rate"
    )
    columns = ("requests/s", "processor s", "p50 (s)", "p99 (s)", "one client, p50 (s)")
    for column in ("", "batch", *columns):
        table.add_column(column, justify="left" if not column else "right")
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        folders = build(Path(root))
        for batch in BATCHES:
            found = measure(folders, batch, rounds)
            # Pair by pair, so that a machine that drifts drifts under both.
            pairs = list(zip(found["cot"], found["latent"], strict=True))
            if batch == 1:
                ratios["latent_vs_cot_p50_one_client"] = statistics.median(
                    cot["alone"] / latent["alone"] for cot, latent in pairs
                )
            ratios[f"latent_vs_cot_requests_b{batch}"] = statistics.median(
                latent["requests"] / cot["requests"] for cot, latent in pairs
            )
            for system, label in (("cot", "teacher, its chain"), ("latent", "latent student")):
                one = found[system]
                table.add_row(
                    label,
                    str(batch),
                    f"{middle(one, 'requests'):.1f}",
                    f"{middle(one, 'busy'):.3f}",
                    f"{middle(one, 'p50'):.3f}",
                    f"{middle(one, 'p99'):.3f}",
                    f"{middle(one, 'alone'):.3f}" if batch == 1 else "",
                )
    if as_json:
        print(json.dumps(ratios))
        return
    console = Console(file=sys.stdout)
    console.print(table)
    for name, ratio in ratios.items():
        target = TARGETS[name]
        console.print(f"{name}: {ratio:.2f}" + (f" (target: at least {target})" if target else ""))


if __name__ == "__main__":
    main()

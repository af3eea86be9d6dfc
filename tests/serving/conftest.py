"""A tiny student and a tiny teacher on the disk, and servers of them on loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch
from openai import OpenAI
from transformers import LlamaConfig

from kava_core.artefacts import write_json
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import save_model
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import make_encoder, problems
from tests.stages.project import ROOT
from tests.tiny import COMMON, tiny_model

QUESTIONS = [problem.question for problem in problems()[:6]]
NAME = "talker"


def talker(encoder: TraceEncoder, ends: float, context: int = 1024) -> LatentReasoner:
    """A student that writes random digits; the larger `ends`, the sooner its answers end."""
    tokenizer = encoder.tokenizer
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    model = tiny_model(LlamaConfig(**{**COMMON, **sizes}), dtype=torch.float32)
    model.generation_config.eos_token_id = encoder.eos
    digits = [tokenizer.encode(str(n), add_special_tokens=False)[0] for n in range(10)]
    with torch.no_grad():
        kept = model.lm_head.weight[[*digits, encoder.eos]].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[digits] = kept[:10]
        model.lm_head.weight[encoder.eos] = ends * kept[10]
    return LatentReasoner.from_teacher(
        model,
        latents=3,
        iterations=2,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=0,
    ).eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`student`; `teacher`, with the same weights; `endless`, a student that never ends."""
    root = tmp_path_factory.mktemp("served")
    encoder = make_encoder()
    found = {}
    for kind, ends, context in (("student", 1.3, 1024), ("endless", 0.0, 20_000)):
        student = talker(encoder, ends, context)
        found[kind] = root / kind / NAME
        student.save_pretrained(found[kind])
        encoder.tokenizer.save_pretrained(found[kind])
    found["teacher"] = root / "teacher" / NAME
    save_model(found["teacher"], talker(encoder, 1.3).decoder, encoder.tokenizer)
    write_json(found["teacher"] / "teacher.json", {})
    return found


@dataclass
class Running:
    """A `kava serve` in a process of its own; `lines`: what it says on stderr."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="nobody's", max_retries=0, timeout=120)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=120)

    def post(self, path: str, body: dict[str, object]) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=120)

    def meter(self, name: str) -> float:
        found = re.findall(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").text, re.M)
        return float(found[0]) if found else 0.0


Start = Callable[..., Running]


def start_server(folder: Path, *options: str, token: str | None = None) -> Running:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("KAVA_SERVE_TOKEN", None)
    if token is not None:
        environment["KAVA_SERVE_TOKEN"] = token
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "serve", str(folder), "--port", "0", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        at = re.search(r"at (http://\S+)/v1$", line.strip())
        if at:
            # Read on, or a full pipe would hold the server up.
            threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()
            return Running(process, at[1], lines)
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start a server; all end with the module."""
    started: list[Running] = []

    def begin(folder: Path, *options: str, token: str | None = None) -> Running:
        started.append(start_server(folder, *options, token=token))
        return started[-1]

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGKILL)
        server.process.wait()


@pytest.fixture(scope="module")
def student(start: Start, folders: dict[str, Path]) -> Running:
    return start(folders["student"], "--max-tokens", "40")

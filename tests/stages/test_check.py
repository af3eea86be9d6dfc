"""`kava check --model` as a person runs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from kava_core.models.loading import save_model
from kava_core.problems.tokenizer import train_tokenizer
from tests.tiny import COMMON, tiny_model

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def check(*arguments: str, expect: int = 0, hub: dict[str, str] = OFFLINE) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    done = subprocess.run(
        [sys.executable, "-m", "stages", "check", *arguments],
        env={**environment, **hub},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout or done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train_tokenizer(["1 2 3"] * 8, 270)
    save_model(folder, tiny_model("llama", torch.float32), tokenizer)
    return folder


def test_a_model_that_can_be_both(folder: Path) -> None:
    assert check("--model", str(folder)).splitlines() == [
        f"{folder}: model_type llama, layers 3, kv_heads 2, head_dim 8, hidden_size 32, "
        "context 512",
        "tokenizer: whole",
        "weights: whole",
        "teacher: yes",
        "student: yes",
        "kv loss: yes",
    ]


def test_a_configuration_alone_is_enough_and_size_costs_no_time(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    ).save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "warm").mkdir()
    found = json.loads(check("--model", str(tmp_path), "--json", expect=1))
    assert found["uses"] == {"teacher": None, "student": None, "kv_loss": None}
    assert found["shape"]["layers"] == 80 and found["shape"]["kv_heads"] == 8
    assert found["files"]["tokenizer"].startswith("no tokenizer could be loaded from")
    assert "found none. Save the model as safetensors" in found["files"]["weights"]


def test_judging_takes_a_second() -> None:
    from kava_core.models.check import judge_config

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    judge_config(config)
    began = time.process_time()
    assert judge_config(config).reasons == []
    assert time.process_time() - began < 2


def test_a_model_that_can_be_neither(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_next").save_pretrained(tmp_path)
    said = check("--model", str(tmp_path), expect=1)
    assert "teacher: no. qwen3_next has layers of kind linear_attention, which keep" in said
    assert "student: no. qwen3_next has layers of kind" in said


def test_one_that_can_only_learn(tmp_path: Path) -> None:
    settings = {**COMMON, "vocab_size": 270}
    model = tiny_model(AutoConfig.for_model("diffllama", **settings), torch.float32)
    save_model(tmp_path, model, train_tokenizer(["1 2 3"] * 8, 270))
    found = json.loads(check("--model", str(tmp_path), "--json"))
    assert found["files"] == {"tokenizer": None, "weights": None}
    assert "calls transformers' attention interface 2 times" in found["uses"]["teacher"]
    assert found["uses"]["student"] is None and found["uses"]["kv_loss"] is None


def test_what_is_no_model_is_a_sentence(tmp_path: Path) -> None:
    said = check("--model", str(tmp_path), expect=1)
    assert said.startswith(f"error: no model configuration could be loaded from {tmp_path}: ")
    assert "run `hf download team/none`" in check("--model", "team/none", expect=1)


def test_without_a_network_it_does_not_wait_for_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # where nobody listens once it is closed
    hub = f"http://127.0.0.1:{port}"
    seconds = []
    for environment in (OFFLINE, {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}):
        began = time.monotonic()
        said = check("--model", "team/none", expect=1, hub=environment)
        seconds.append(time.monotonic() - began)
        assert "run `hf download team/none`" in said
    assert f"{hub} cannot be reached: only what this machine's cache has is checked" in said
    assert seconds[1] < seconds[0] + 15  # its library tries again for 23 seconds and more

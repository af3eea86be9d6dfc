"""A Hub id is loaded at its revision, and a folder has none; what is missing says what to do.

The Hub here is a cache as `huggingface_hub` lays one out, without a network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.errors import KavaError
from kava_core.models.loading import (
    commit_of,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    save_model,
)
from kava_core.problems.tokenizer import train_tokenizer
from tests.tiny import tiny_model

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
PROGRAM = """
import json, sys
from kava_core.errors import KavaError
from kava_core.models.loading import commit_of, load_model, load_tokenizer, model_fingerprint
found = []
for asked in sys.argv[1:]:
    name, revision = (asked.split("@") + [None])[:2]
    try:
        model = load_model(name, revision=revision)
        found.append({
            "commit": commit_of(name, revision),
            "weight": float(next(model.parameters()).flatten()[0]),
            "fingerprint": model_fingerprint(name, revision),
            "tokens": len(load_tokenizer(name, revision)),
        })
    except KavaError as error:
        found.append({"error": str(error)})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, the one at v1."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(folder, tiny_model("llama", torch.float32), train_tokenizer(["1 2 3"] * 8, 270))
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with team/tiny, whose weights on the main branch are others."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--team--tiny"
    for name, commit in COMMITS.items():
        snapshot = repository / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    model = load_model(str(folder))
    with torch.no_grad():
        next(model.parameters()).fill_(7.0)
    save_model(repository / "snapshots" / COMMITS["main"], model, None)
    return home


def asked(hub: Path, *names: str) -> list[dict[str, Any]]:
    """What a machine without a network loads for each name or name@revision."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env={**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_revision_names_the_weights_and_its_commit_is_known(hub: Path, folder: Path) -> None:
    newest, older, same = asked(hub, "team/tiny", "team/tiny@v1", f"team/tiny@{COMMITS['v1']}")
    assert newest["commit"] == COMMITS["main"] and newest["weight"] == 7.0
    assert older["commit"] == COMMITS["v1"] and older["weight"] != 7.0
    assert older["fingerprint"] == model_fingerprint(str(folder)) != newest["fingerprint"]
    assert same == older


def test_what_the_cache_lacks_says_what_to_do_without_a_network(hub: Path) -> None:
    places = {"team/none": "", "team/tiny": " at revision v2"}
    for (name, at), found in zip(
        places.items(), asked(hub, "team/none", "team/tiny@v2"), strict=True
    ):
        said = found["error"]
        assert said.startswith(f"no model configuration could be loaded from {name}{at}: ")
        assert f"without a network, run `hf download {name}`" in said
        assert "\n" not in said


def test_a_folder_has_no_commit_and_no_revision(folder: Path) -> None:
    name = str(folder)
    assert commit_of(name) is None
    for load in (
        lambda: load_config(name, "v1"),
        lambda: load_model(name, revision="v1"),
        lambda: load_tokenizer(name, "v1"),
        lambda: model_fingerprint(name, "v1"),
        lambda: commit_of(name, "v1"),
    ):
        with pytest.raises(KavaError, match=r"tiny is a folder, which has no revision 'v1'\. Take"):
            load()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match=f"no model configuration could be loaded from {tmp_path}"):
        load_model(str(tmp_path))

"""Adapters and lengths of training as the commands have them: what is written, and who reads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kava_core.artefacts import read_json
from kava_core.errors import KavaError
from kava_core.models.loading import load_model, model_fingerprint
from stages.distill import distill
from stages.evaluate import evaluate
from stages.evict import evict
from stages.generate import generate
from stages.prepare import prepare
from stages.teacher import teacher
from tests.stages.project import digest
from tests.stages.test_methods import PIPELINE, QUICK, call, write

LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
TAUGHT = {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(4)
    for name in ("self_attn.q_proj", "mlp.down_proj")
}
DATA = Path("data/tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, and a model in `base` to start from."""
    home = tmp_path_factory.mktemp("adapters")
    write(home, PIPELINE)
    call(prepare, home)
    call(teacher, home)
    shutil.move(home / DATA / "teacher", home / "base")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def train_teacher(home: Path, lora: dict[str, Any] | None, **training: Any) -> dict[str, Any]:
    """Train one from `base`; returns teacher.json."""
    length = {} if "epochs" in training else {"steps": QUICK["steps"]}
    settings = {
        "batch_size": 8,
        **length,
        **training,
        "lora": None if lora is None else {**LORA, **lora},
    }
    pipeline = {**PIPELINE["teacher"], "model": "base", "training": settings}
    del pipeline["scratch"]
    write(home, {**PIPELINE, "teacher": pipeline})
    call(teacher, home)
    about: dict[str, Any] = read_json(DATA / "teacher/teacher.json")
    return about


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def changed(folder: Path) -> set[str]:
    """The tensors of the decoder in `folder` that are not the base's."""
    base, found = weights(Path("base")), weights(folder)
    assert base.keys() == found.keys()
    return {name for name, x in base.items() if not torch.equal(x, found[name])}


# --- teachers -------------------------------------------------------------------------------------


def test_a_teacher_changes_the_weights_its_settings_name(home: Path) -> None:
    train_teacher(home, None)
    assert changed(DATA / "teacher") == set(weights(Path("base")))
    train_teacher(home, {})
    assert changed(DATA / "teacher") == TAUGHT
    assert not (DATA / "teacher/adapter").exists()


def test_a_teachers_adapters_are_kept_beside_it_or_alone(home: Path) -> None:
    about = train_teacher(home, {"save": "both"})
    assert changed(DATA / "teacher") == TAUGHT
    merged = load_model(str(DATA / "teacher"))
    ids = torch.tensor([[9, 10, 11]])
    base = AutoModelForCausalLM.from_pretrained("base")
    theirs = PeftModel.from_pretrained(base, DATA / "teacher/adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, merged(ids).logits)
    kept = read_json(DATA / "teacher/adapter/base.json")
    assert kept == {"model": "base", "commit": None, "fingerprint": about["fingerprints"]["model"]}
    call(generate, home)
    caches = digest(home / DATA / "teacher_kv")
    beside = digest(home / DATA / "teacher")

    train_teacher(home, {"save": "adapter"})
    alone = digest(home / DATA / "teacher")
    assert beside.keys() - alone.keys() == {"model.safetensors"}
    assert {n for n in alone if alone[n] != beside[n]} <= {"teacher.json"}
    found = load_model(str(DATA / "teacher")).state_dict()
    assert all(torch.equal(x, found[name]) for name, x in merged.state_dict().items())
    # The stages behind it read it as any other, and make of it what they do of the merged one.
    call(generate, home)
    again = digest(home / DATA / "teacher_kv")
    assert {name for name in caches if caches[name] != again[name]} == {"manifest.json"}
    for stage in (evict, distill, evaluate):
        call(stage, home, *(["none"] if stage is distill else []))
    # Another base under the same name is found out.
    shutil.rmtree(DATA / "teacher_kv")
    shutil.copytree("base", "kept")
    wrong = AutoModelForCausalLM.from_pretrained("base")
    wrong.get_input_embeddings().weight.data.mul_(2)
    wrong.save_pretrained("base")
    expected, there = model_fingerprint("kept"), model_fingerprint("base")
    with pytest.raises(KavaError, match=rf"belong on the model {expected}.* is {there}"):
        call(generate, home)


def test_a_teacher_trains_for_epochs_in_half_precision_with_less_memory(home: Path) -> None:
    """32 problems are 4 batches of 8."""
    about = train_teacher(
        home, {}, epochs=2, precision="bfloat16", gradient_checkpointing=True, accumulation=2
    )
    assert about["steps"] == 4 and about["settings"]["training"]["steps"] is None
    assert changed(DATA / "teacher") == TAUGHT
    assert {x.dtype for x in weights(DATA / "teacher").values()} == {torch.float32}
    rows = (DATA / "curves/teacher/plots/metrics/loss_chain.tsv").read_text().splitlines()
    assert len(rows) == 1 + 4


def test_targets_that_fit_no_module_are_named_by_their_path(home: Path) -> None:
    said = r"teacher\.training\.lora\.targets \['c_attn'\] fit no module of llama .*Choose among do"
    with pytest.raises(KavaError, match=said):
        train_teacher(home, {"targets": ["q_proj", "c_attn"]})
    assert not (DATA / "teacher").exists()

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
from kava_core.models.students import open_student
from stages.distill import distill
from stages.evaluate import evaluate
from stages.evict import evict
from stages.generate import generate
from stages.prepare import prepare
from stages.teacher import teacher
from tests.stages.project import digest
from tests.stages.test_methods import PIPELINE, QUICK, call, small_model, write

LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "down_proj"]}
TAUGHT = {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(4)
    for name in ("self_attn.q_proj", "mlp.down_proj")
}
DATA = Path("data/tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline up to its targets; `base` is a copy of its teacher."""
    home = tmp_path_factory.mktemp("adapters")
    write(home, PIPELINE)
    for stage in (prepare, teacher, generate, evict):
        call(stage, home)
    shutil.copytree(home / DATA / "teacher", home / "base")
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
    return different(Path("base"), folder)


def different(one: Path, other: Path) -> set[str]:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return {name for name, x in ours.items() if not torch.equal(x, theirs[name])}


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
    before = digest(home / DATA / "teacher")
    with pytest.raises(KavaError, match=said):
        train_teacher(home, {"targets": ["q_proj", "c_attn"]})
    assert digest(home / DATA / "teacher") == before
    with pytest.raises(
        KavaError, match=r"students\.it\.training\.lora\.targets \['wq'\] fit no mo"
    ):
        train_student(home, "it", {"targets": ["wq"]})


# --- students -------------------------------------------------------------------------------------


def train_student(home: Path, name: str, lora: dict[str, Any] | None, **settings: Any) -> Path:
    training = {**QUICK, "lora": None if lora is None else {**LORA, **lora}}
    student = {"reads": "kv_targets", "iterations": 1, "alpha_kv": 1.0, "training": training}
    write(home, {**PIPELINE, "students": {name: {**student, **settings}}})
    call(distill, home, name)
    return DATA / "students" / name


def test_a_student_changes_the_weights_its_settings_name(home: Path) -> None:
    whole = train_student(home, "whole", None)
    assert changed(whole) == set(weights(Path("base")))
    adapted = train_student(home, "adapted", {})
    assert changed(adapted) == TAUGHT
    own = [load_file(folder / "latents.safetensors") for folder in (whole, adapted)]
    assert own[0].keys() == own[1].keys()
    assert not any(torch.equal(x, own[1][name]) for name, x in own[0].items())


def test_a_students_adapters_load_with_peft_and_with_us_and_are_small(home: Path) -> None:
    merged = train_student(home, "merged", {"save": "merged"})
    both = train_student(home, "both", {"save": "both"})
    alone = train_student(home, "alone", {"save": "adapter"})
    assert {n for n in digest(both) if not n.startswith("adapter/")} == digest(merged).keys()
    assert different(merged, both) == set()
    assert not list(alone.glob("model*")) and not (alone / "custom_generate").exists()
    assert digest(alone / "adapter") == digest(both / "adapter")
    size = sum(file.stat().st_size for file in (alone / "adapter").iterdir())
    assert size < 0.3 * (merged / "model.safetensors").stat().st_size
    assert read_json(alone / "adapter/adapter_config.json")["base_model_name_or_path"] == (
        "data/tiny/teacher"
    )
    # with PEFT, for which the decoder is an adapted teacher
    decoder = AutoModelForCausalLM.from_pretrained(merged)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(DATA / "teacher"), alone / "adapter"
    ).eval()
    ids = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, decoder(ids).logits)
    # with us
    expected, found = open_student(merged), open_student(alone)
    same = {
        name: torch.equal(x, found.state_dict()[name]) for name, x in expected.state_dict().items()
    }
    assert all(same.values())
    assert torch.equal(found.generate(ids), expected.generate(ids))
    write(home, {**PIPELINE, "students": {"alone": read_json(alone / "student.json")["settings"]}})
    call(evaluate, home)


def test_a_student_of_adapters_finds_its_base_or_says_which_it_needs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = (home / train_student(home, "alone", {"save": "adapter"})).absolute()
    ids = torch.tensor([[9, 10, 11]])
    expected = open_student(alone).generate(ids)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(open_student(alone).generate(ids), expected)
    shutil.copytree(alone, tmp_path / "sent")
    with pytest.raises(KavaError, match=r"belong on the model \w+, expected in the folder data/"):
        open_student(tmp_path / "sent")
    assert torch.equal(open_student(tmp_path / "sent", home / "base").generate(ids), expected)
    write(home, {**PIPELINE, "teacher": {**PIPELINE["teacher"], "training": {**QUICK, "seed": 1}}})
    call(teacher, home)
    theirs, other = (model_fingerprint(str(home / n)) for n in ("base", DATA / "teacher"))
    with pytest.raises(KavaError, match=rf"belong on the model {theirs}.* is {other}"):
        open_student(alone)


def test_a_student_from_another_model_keeps_its_adapters_on_that(home: Path) -> None:
    small_model(home)
    alone = train_student(home, "alone", {"save": "adapter"}, model="models/small")
    base = read_json(alone / "adapter/base.json")
    assert base["model"] == "models/small"
    assert base["fingerprint"] == model_fingerprint("models/small")
    assert open_student(alone).decoder.config.num_hidden_layers == 2


def test_a_student_trains_for_epochs_and_without_a_cache_in_less_memory(home: Path) -> None:
    training = {"epochs": 2, "batch_size": 8, "gradient_checkpointing": True}
    write(home, {**PIPELINE, "students": {"it": {"reads": "problems", "training": training}}})
    call(distill, home, "it")
    about = read_json(DATA / "students/it/student.json")
    assert (about["steps"], about["settings"]["training"]["steps"]) == (8, None)

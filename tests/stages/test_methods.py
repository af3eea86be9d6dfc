"""The methods of docs/methods.md train as the page says, and what cannot be trained is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml

from kava_core.artefacts import read_json, write_json
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import build_llama, load_tokenizer, save_model
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.settings import Student
from kava_core.store import TargetsStore
from kava_core.store.manifest import manifest_digest
from stages.ask import ask
from stages.distill import distill
from stages.evaluate import evaluate
from stages.evict import evict
from stages.generate import generate
from stages.prepare import prepare
from stages.teacher import teacher
from tests.stages.project import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
SNIPPETS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
METHODS = {name: snippet for snippet in SNIPPETS for name in snippet["students"]}
TERMS = {
    name: set(terms.split(", "))
    for name, terms in re.findall(r"^\|[^|]*\| `([a-z-]+)` \| ([a-z, ]+) \|$", PAGE, re.M)
}
QUICK = {"steps": 3, "batch_size": 8}
SMALL = {"hidden_size": 32, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate_size": 48}
PIPELINE: dict[str, Any] = {
    "prepare": {"source": "synthetic", "train": 32, "validation": 8, "test": 8},
    "teacher": {
        "scratch": {"vocabulary": 300, "context_length": 256, **SMALL},
        "training": {"learning_rate": 1.0e-3, **QUICK},
        "validate_on": 4,
        "max_new_tokens": 4,
    },
    "generate": {"shard_size": 16},
    "evict": {"budget": 4},
    "students": {"none": {"reads": "problems", "training": QUICK}},
    "evaluate": {"max_new_tokens": 4},
    "report": {"title": "Tiny"},
    "resources": {"workers": 0},
    "cadence": {"log_every": 1},
}


def call(command: click.Command, home: Path, *arguments: str) -> None:
    paths = ["--pipelines", str(home / "pipelines.yaml"), "--data", str(home / "data")]
    command.main([*arguments, *paths], standalone_mode=False)


def write(home: Path, pipeline: dict[str, Any]) -> None:
    document = {"pipeline": "tiny", "pipelines": {"tiny": pipeline}}
    (home / "pipelines.yaml").write_text(yaml.safe_dump(document))


def small_model(
    home: Path, folder: str = "models/small", tokenizer: Any = None, **changes: Any
) -> None:
    """A model of two layers that is not the teacher's, with the teacher's tokenizer."""
    tokenizer = tokenizer or load_tokenizer(str(home / "data/tiny/teacher"))
    settings: dict[str, Any] = {
        **SMALL, "layers": 2, "context_length": 256, "rope_theta": 10000.0, "seed": 9, **changes,
    }  # fmt: skip
    save_model(home / folder, build_llama(tokenizer, **settings), tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline up to its targets, and a model beside it."""
    home = tmp_path_factory.mktemp("methods")
    write(home, PIPELINE)
    for command in (prepare, teacher, generate, evict):
        call(command, home)
    small_model(home)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def student(home: Path, evict_settings: dict[str, Any] | None = None, **settings: Any) -> None:
    """Distil a student `it` of these settings."""
    training = {"learning_rate": 1.0e-3, **QUICK, **settings.pop("training", {})}
    settings = {"reads": "kv_targets", **settings}
    changed = {"evict": {**PIPELINE["evict"], **(evict_settings or {})}}
    write(home, {**PIPELINE, **changed, "students": {"it": {"training": training, **settings}}})
    call(distill, home, "it")


def curves(home: Path, name: str) -> set[str]:
    folder = home / "data/tiny/curves/students" / name / "plots/metrics"
    return {file.stem for file in folder.iterdir()}


# --- methods --------------------------------------------------------------------------------------


def test_every_method_has_a_snippet_and_a_row() -> None:
    assert METHODS.keys() == TERMS.keys()
    assert len(METHODS) == len(SNIPPETS) >= 11
    steps = {n: s["students"][n]["training"]["steps"] for n, s in METHODS.items()}
    assert steps["no-cot"] == steps["kava"] < steps["no-cot-equal-time"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_with_the_terms_it_says(home: Path, name: str) -> None:
    snippet = METHODS[name]
    settings = Student.model_validate(snippet["students"][name])
    quick: dict[str, Any] = {"training": {**snippet["students"][name]["training"], **QUICK}}
    if settings.curriculum is not None:
        quick["curriculum"] = {**snippet["students"][name]["curriculum"], "steps": 1}
    plain = {**snippet["students"][name], **quick}
    changed = {"evict": {**PIPELINE["evict"], **snippet.get("evict", {})}}
    write(home, {**PIPELINE, **changed, "students": {name: plain}})
    if "evict" in snippet:
        call(evict, home)
    call(distill, home, name)
    folder = home / "data/tiny/students" / name
    logged = curves(home, name)
    assert {x.removeprefix("loss_") for x in logged if x.startswith("loss_")} == TERMS[name]
    shares = {x.removeprefix("gradient_share_") for x in logged if x.startswith("gradient_share_")}
    assert shares == (TERMS[name] if len(TERMS[name]) > 1 else set())
    trained = LatentReasoner.from_pretrained(folder).eval()
    assert not any("projectors" in parameter for parameter, _ in trained.named_parameters())
    assert trained.config.latents == (0 if settings.reads == "problems" else 4)
    assert trained.decoder.config.num_hidden_layers == (2 if settings.model else 4)
    asked = trained.generate(
        torch.tensor([[9, 10, 11]]), max_new_tokens=2, return_dict_in_generate=True
    )
    assert (asked.passes > 0).all()
    about = read_json(folder / "student.json")
    assert about["settings"] == Student.model_validate(plain).model_dump(mode="json")
    assert ("model" in about["fingerprints"]) == (settings.model is not None)
    assert not list((home / "data/.work").glob(f"{name}-*"))


def test_an_explicit_map_and_adapters_go_with_another_model(home: Path) -> None:
    small_model(home, "models/wide", heads=8, kv_heads=4, hidden_size=32)
    student(
        home, model="models/wide", layer_map=[1, 3], alpha_kv=1.0, alpha_codi=1.0,
        training={"lora": {"rank": 2, "alpha": 2, "targets": ["q_proj", "k_proj"]}},
    )  # fmt: skip
    trained = LatentReasoner.from_pretrained(home / "data/tiny/students/it")
    assert trained.decoder.config.num_key_value_heads == 4
    assert not any("lora" in n or "projectors" in n for n, _ in trained.named_parameters())


# --- what cannot be trained -----------------------------------------------------------------------


def refused(said: str, run: Callable[[], None]) -> None:
    """`run` ends in a KavaError that says so, and leaves no student behind."""
    with pytest.raises(KavaError, match=said):
        run()


def test_another_number_of_slots_than_evict_makes_is_refused(home: Path) -> None:
    said = r"kv_targets has 4 slots per layer and head, and evict\.budget 6 makes 6\. Run `kava ev"
    refused(said, lambda: student(home, {"budget": 6}, alpha_kv=1.0))
    assert not (home / "data/tiny/students").exists()
    student(home, {"budget": 6}, reads="problems")  # which reads no targets


def test_a_student_with_other_latents_than_there_are_slots_is_not_evaluated(home: Path) -> None:
    student(home, alpha_kv=1.0)
    pipeline = yaml.safe_load((home / "pipelines.yaml").read_text())["pipelines"]["tiny"]
    write(home, {**pipeline, "evict": {"budget": 2}})
    call(evict, home)
    said = (
        r"student it reasons in 4 latents, and \S+kv_targets has 2 slots .* `kava distill it` aga"
    )
    refused(said, lambda: call(evaluate, home))


def test_a_student_from_another_model_is_evaluated_without_similarity(home: Path) -> None:
    student(home, alpha_kv=1.0, model="models/small")
    call(evaluate, home)
    folder = home / "data/tiny/evaluation"
    assert read_json(folder / "similarity.json") == {}
    metrics = read_json(folder / "metrics.json")["synthetic"]
    assert metrics.keys() >= {"it", "teacher-cot"}


def test_a_pyramid_has_the_slots_of_its_largest_layer(home: Path) -> None:
    settings = {"budget_shape": "pyramid"}
    refused(r"has 4 slots .*budget 4 makes 7", lambda: student(home, settings, alpha_kv=1.0))
    call(evict, home)
    student(home, settings, alpha_kv=1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha_kv": 1.0}, r"record \S+ takes \d+ positions .* context is 24\. Leave long"),
        ({"reads": "problems"}, r"record \S+ takes \d+ positions .* context is 24\. Leave long"),
    ],
)
def test_a_question_longer_than_the_context_is_named(
    home: Path, settings: dict[str, Any], said: str
) -> None:
    small_model(home, "models/short", context_length=24)
    refused(said, lambda: student(home, model="models/short", **settings))


def test_a_question_asked_that_is_longer_than_the_context_is_refused(home: Path) -> None:
    student(home, alpha_kv=1.0)
    folder = home / "data/tiny/students/it"
    question = "how many cups ? " * 100
    tokens = len(load_tokenizer(str(folder))(question)["input_ids"])
    refused(
        rf"a question of {tokens + 1} tokens takes \d+ positions .* context is 256\. Ask a shorter",
        lambda: ask.main([str(folder), question], standalone_mode=False),
    )


def test_the_written_chain_counts_where_it_is_read(home: Path) -> None:
    store = TargetsStore.open(home / "data/tiny/kv_targets")
    records = [store.index.record(i) for i in range(len(store))]
    read = [len(r.question_ids) + len(r.answer_prompt_ids) + len(r.answer_ids) for r in records]
    context = max(read) + 6  # 4 latents, <bot> and <eot>
    chain = max(n + len(r.cot_ids) for n, r in zip(read, records, strict=True))
    assert chain > context
    small_model(home, "models/short", context_length=context)
    student(home, model="models/short", alpha_kv=1.0)
    refused(
        rf"takes {chain} positions .* context is {context}\.",
        lambda: student(home, model="models/short", alpha_kv=1.0, w_cot=1.0),
    )


def test_another_tokenizer_is_refused_with_both_fingerprints(home: Path) -> None:
    other = train_tokenizer(["some other text entirely , with 1 2 3"] * 8, 280)
    small_model(home, "models/foreign", tokenizer=other)
    said = r"tokenizer of \S+foreign is [0-9a-f]{64}, and the teacher's is [0-9a-f]{64}"
    for settings in ({"alpha_kv": 1.0}, {"reads": "problems"}):
        refused(said, lambda s=settings: student(home, model="models/foreign", **s))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ({"kv_heads": 4}, {"alpha_kv": 1.0}, r"2 × 8 = 16 .* student's have 4 × 8 = 32"),
        (
            {"hidden_size": 64, "heads": 8},
            {"alpha_codi": 1.0},
            r"have 32 numbers, the student's 64\. Set alpha_codi",
        ),
        ({}, {"alpha_kv": 1.0, "layer_map": [0, 1, 3]}, r"names 3 layers, and the student has 2"),
        ({}, {"alpha_kv": 1.0, "fake_quantise": True}, r"evict\.keys_bits is 16 and evict\.values"),
    ],
)
def test_another_model_that_does_not_fit_is_refused_with_both_values(
    home: Path, model: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    small_model(home, "models/other", **model)
    refused(said, lambda: student(home, model="models/other", **settings))
    assert not (home / "data/tiny/students").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"fake_quantise": True},
            r"students\.it: fake_quantise: means nothing here: .* alpha_kv is 0",
        ),
        (
            {"layer_map": [0, 1]},
            r"students\.it: layer_map: means nothing here: it says what is compared",
        ),
        ({"alpha_kv": 1.0, "layer_map": []}, r"students\.it\.layer_map: should be `uniform` or"),
        ({"alpha_kv": 1.0, "layer_map": "even"}, r"layer_map: should be .*, found 'even'"),
        ({"alpha_kv": 1.0, "layer_map": [-1, 0]}, r"students\.it\.layer_map: should be `uniform`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    home: Path, settings: dict[str, Any], said: str
) -> None:
    refused(said, lambda: student(home, **settings))


def test_a_model_that_is_not_there_is_named(home: Path) -> None:
    refused("models/nowhere", lambda: student(home, model="models/nowhere", alpha_kv=1.0))


def test_an_empty_store_is_refused(home: Path) -> None:
    file = home / "data/tiny/kv_targets/manifest.json"
    plain = json.loads(file.read_text())
    plain["records"] = 0
    plain["digest"] = manifest_digest(plain)
    write_json(file, plain)
    refused("zero records", lambda: student(home, alpha_kv=1.0))


def test_targets_of_another_teacher_are_refused_with_both_fingerprints(home: Path) -> None:
    weights = home / "data/tiny/teacher"
    small_model(home, "models/other-teacher", layers=4)
    shutil.copy(home / "models/other-teacher/model.safetensors", weights / "model.safetensors")
    said = r"made with the teacher [0-9a-f]{64}, this run has [0-9a-f]{64}"
    refused(said, lambda: student(home, alpha_kv=1.0))


def test_a_loss_that_is_no_number_names_the_records_saves_and_stops(home: Path) -> None:
    training = {"learning_rate": 1.0e30, "steps": 20, "warmup": 0.0}
    with pytest.raises(KavaError) as error:
        student(home, alpha_kv=1.0, alpha_codi=1.0, training=training)
    found = re.match(
        r"the loss became nan at step (\d+), on the records ([^ ]+(?:, [^ ]+){7})\. The state",
        str(error.value),
    )
    assert found, str(error.value)
    store = TargetsStore.open(home / "data/tiny/kv_targets")
    assert set(found[2].split(", ")) <= set(store.index.strings("id"))
    (work,) = (home / "data/.work").glob("it-*")
    before = int(found[1]) - 1
    assert (work / "checkpoints" / f"checkpoint-{before}" / "trainer_state.json").is_file()
    assert not (home / "data/tiny/students").exists()

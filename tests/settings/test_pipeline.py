"""Settings: what is wrong is named by its key path, what is right survives YAML."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kava_core.errors import KavaError
from kava_core.eviction import POLICIES
from kava_core.settings import Evaluate, Evict, Imported, Pipeline, Student, Training, load_pipeline

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines.yaml"
TRAINING = {"steps": 10, "learning_rate": 0.001}
SMALL: dict[str, Any] = {
    "prepare": {"source": "synthetic", "train": 8, "validation": 4, "test": 4},
    "teacher": {"training": TRAINING},
    "generate": {},
    "evict": {"budget": 4},
    "students": {
        "kava": {"reads": "kv_targets", "alpha_kv": 1.0, "training": TRAINING},
        "no-cot": {"reads": "problems", "training": TRAINING},
    },
    "evaluate": {},
    "report": {"title": "t"},
}


def load(tmp_path: Path, settings: Any, name: str = "small") -> Pipeline:
    path = tmp_path / "pipelines.yaml"
    path.write_text(yaml.safe_dump({"pipeline": name, "pipelines": {name: settings}}))
    return load_pipeline(path)[1]


def changed(key: str, value: Any) -> dict[str, Any]:
    """SMALL with another value at a dotted key; KeyError-free for new keys."""
    settings = copy.deepcopy(SMALL)
    *sections, last = key.split(".")
    place = settings
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return settings


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        # unknown keys
        ("evict.bugdet", 4, "evict.bugdet: no such setting"),
        ("evict.lambda", 0.1, "evict.lambda: no such setting"),
        ("evict.policy", {"name": "rkv", "lambda_": 0.1}, "evict.policy.lambda_: no such setting"),
        ("evict.policy", {"name": "crop", "lambda": 0.1}, "evict.policy.lambda: no such setting"),
        ("fidelity.policies", [{"name": "rkv", "first": 1}], "fidelity.policies.0.first: no such"),
        ("students.kava.training.stesp", 4, "students.kava.training.stesp: no such setting"),
        ("distil", {}, "distil: no such setting"),
        (
            "students.kava.alpha_kv",
            {"part": 0.3},
            "students.kava.alpha_kv: should be a number from",
        ),
        (
            "students.kava.alpha_kv",
            {"share": 1.0},
            "students.kava.alpha_kv: should be a number fro",
        ),
        (
            "students.kava.alpha_kv",
            True,
            "students.kava.alpha_kv: should be a number from 0, or {s",
        ),
        (
            "students.kava.balance_every",
            5,
            "students.kava: balance_every: means nothing here",
        ),
        # wrong types
        ("evict.budget", "eight", "evict.budget: Input should be a valid integer, found 'eight'"),
        ("evict.budget", "8", "evict.budget: Input should be a valid integer"),
        ("evict.budget", 8.5, "evict.budget: Input should be a valid integer, found 8.5"),
        ("evict.budget", True, "evict.budget: Input should be a valid integer, found True"),
        ("evict.budget", None, "evict.budget: Input should be a valid integer, found None"),
        (
            "evict.policy",
            {"name": "rkv", "lambda": True},
            "evict.policy.lambda: should be a number, found True",
        ),
        (
            "evict.policy",
            {"name": "rkv", "lambda": "much"},
            "evict.policy.lambda: Input should be a valid number",
        ),
        ("evict.policy", {"name": "random", "seed": "7"}, "evict.policy.seed: Input should be a v"),
        ("evict.policy", 3, "evict.policy: should be one of rkv, attention"),
        ("evict.policy", None, "evict.policy: should be one of rkv, attention"),
        ("evict.policy", {"lambda": 0.5}, "evict.policy: should be one of rkv, attention"),
        ("students.kava.projection", "yes", "students.kava.projection: Input should be a valid b"),
        ("students.kava.projection", 1, "students.kava.projection: Input should be a valid bool"),
        ("students.kava.training", 3, "students.kava.training: Input should be a valid dictionary"),
        ("generate", None, "generate: Input should be a valid dictionary"),
        ("prepare.seed", 0.5, "prepare.seed: Input should be a valid integer, found 0.5"),
        ("report.title", 3, "report.title: Input should be a valid string, found 3"),
        (
            "prepare.source",
            {"name": "synthetic", "steps": [2]},
            "prepare.source.steps.1: Field required",
        ),
        (
            "prepare.source",
            {"name": "synthetic", "steps": [2, 0]},
            "prepare.source: source synthetic: Expected `steps` to be two numbers from 2 to 8",
        ),
        ("prepare.synthetic", {"steps": [2, 3]}, "prepare.synthetic: no such setting"),
        ("prepare.latent_fraction", 0.5, "prepare.latent_fraction: no such setting"),
        (
            "prepare.prompt.question",
            "How many?\n",
            r"prepare.prompt: question: expected {question} where the question is to stand, found",
        ),
        ("prepare.prompt.answer", " ", "prepare.prompt.answer: String should match pattern"),
        ("prepare.prompt.stop", "", "prepare.prompt.stop: String should have at least 1 char"),
        ("prepare.prompt.chats", True, "prepare.prompt.chats: no such setting"),
        (
            "prepare.prompt.examples",
            [{"question": "1 + 1 ?", "steps": ["<<1+1=2>>"]}],
            "prepare.prompt.examples.0.answer: Field required",
        ),
        # impossible values
        ("evict.budget", 0, "evict.budget: Input should be greater than 0, found 0"),
        (
            "evict.policy",
            {"name": "rkv", "lambda": 1.5},
            "evict.policy: policy rkv: expected `lambda` to be from 0 to 1, found 1.5",
        ),
        ("evict.policy", "snapkv", "evict.policy: should be one of rkv, attention"),
        ("evict.layers", {"last": 0}, "evict.layers: should be `all`"),
        ("evict.layers", [], "evict.layers: should be `all`"),
        ("evict.layers", [0, -1], "evict.layers: should be `all`"),
        ("evict.layers", "some", "evict.layers: should be `all`"),
        ("evict.calibration_percentile", 50, "evict.calibration_percentile: Input should be great"),
        ("generate.keys_bits", 12, "generate.keys_bits: Input should be 32, 16, 8 or 4, found 12"),
        ("generate.endpoint_bits", 4, "generate.endpoint_bits: Input should be 32, 16 or 8"),
        ("generate.half", "float32", "generate.half: Input should be 'bfloat16' or 'float16'"),
        ("students.kava.training.learning_rate", 0, "learning_rate: Input should be greater tha"),
        (
            "students.kava.training.learning_rate",
            float("inf"),
            "learning_rate: Input should be a f",
        ),
        ("students.kava.training.learning_rate", float("nan"), "learning_rate: Input should be"),
        ("students.kava.alpha_kv", -1, "students.kava.alpha_kv: should be a number from 0, or "),
        ("students.kava.reasoning", "magic", "students.kava.reasoning: Input should be 'jacobi'"),
        ("students.a.b", {"training": TRAINING}, "students.a"),
        ("students", {}, "students: Dictionary should have at least 1 item"),
        ("students.kava.reads", "teacher_kv", "students.kava.reads: Input should be 'kv_targets'"),
        ("students.no-cot.reads", None, "students.no-cot.reads: Input should be 'kv_targets'"),
        ("teacher.training", None, "teacher: a teacher from scratch needs `training`"),
        ("teacher.scratch.heads", 3, "teacher.scratch: hidden_size 128 must be an even multiple"),
        ("teacher.scratch.hidden_size", 4, "teacher.scratch: hidden_size 4 must be an even multi"),
        ("teacher.scratch.kv_heads", 3, "teacher.scratch: hidden_size 128 must be an even multip"),
        ("prepare.source", "gsm8k", "prepare: source gsm8k needs a `path`"),
        ("prepare.train", None, "prepare: source synthetic needs the numbers `train` and `test`"),
        (
            "resources",
            {"gpus_per_worker": 1.5},
            "resources.gpus_per_worker: should be a share from 0 to 1, or a",
        ),
        (
            "resources",
            {"gpus_per_worker": -1},
            "resources.gpus_per_worker: should be a share from 0 to 1, or a",
        ),
        (
            "resources",
            {"device": "cpu", "gpus_per_worker": 1},
            "resources: gpus_per_worker: means nothing at `device: cpu`",
        ),
        (
            "resources",
            {"workers": 0, "gpus_per_worker": 0.5},
            "resources: gpus_per_worker: means nothing at `workers: 0`",
        ),
        (
            "resources",
            {"workers": 0, "ray_metrics": True},
            "resources: ray_metrics: means nothing at `workers: 0`",
        ),
        ("resources", {"wait_for_room": 0}, "resources.wait_for_room: Input should be greater"),
        ("resources", {"device": "cuda"}, "resources.device: Input should be 'auto' or 'cpu'"),
        ("teacher.processes", 0, "teacher.processes"),
        ("teacher.processes", 5, "teacher: training.batch_size 64 must be a multiple of processes"),
        (
            "teacher",
            {"model": "here", "training": None, "processes": 2},
            "teacher: processes: means nothing at `training: null`",
        ),
        ("students.kava.processes", "all", "students.kava.processes"),
        ("resources", {"workers": -1}, "resources.workers: Input should be greater than or equal"),
        ("evaluate.write_steps", ["kava", "kava"], "evaluate: write_steps must name none twice"),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(KavaError) as error:
        load(tmp_path, changed(key, value))
    assert f"pipelines.small.{message}" in str(error.value) or (
        f"pipelines.small.{key.rpartition('.')[0]}.{message}" in str(error.value)
    )
    assert str(tmp_path / "pipelines.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({}, "training: should have exactly one of `steps` and `epochs`, found neither"),
        ({"steps": 3, "epochs": 3}, "training: should have exactly .* found both"),
        ({"epochs": 0}, "training.epochs: Input should be greater than 0, found 0"),
        ({"epochs": 1.5}, "training.epochs: Input should be a valid integer"),
        ({"steps": 3, "lora": {"targets": []}}, "training.lora.targets: Tuple should have at le"),
        ({"steps": 3, "lora": {"save": "all"}}, "training.lora.save: .*'merged', 'adapter' or"),
        ({"steps": 3, "gradient_checkpointing": 1}, "training.gradient_checkpointing: Input"),
    ],
)
def test_a_training_that_cannot_be_is_named(
    tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    for section in ("teacher", "students.no-cot"):
        with pytest.raises(KavaError, match=rf"pipelines\.small\.{section}\.{message}"):
            load(tmp_path, changed(f"{section}.training", training))


def test_adapters_and_checkpointing_are_for_models_that_can_have_them(tmp_path: Path) -> None:
    training = {**TRAINING, "gradient_checkpointing": True, "lora": {"save": "adapter"}}
    teacher = {"model": "somewhere", "training": training}
    read = load(tmp_path, {**changed("students.no-cot.training", training), "teacher": teacher})
    assert read.teacher.training == read.students["no-cot"].training
    assert read.students["no-cot"].training.gradient_checkpointing


def test_a_teacher_from_scratch_cannot_chat(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match=r"prepare\.prompt\.chat: a teacher from scratch has no"):
        load(tmp_path, changed("prepare.prompt.chat", True))


@pytest.mark.parametrize("section", [name for name in SMALL if name != "generate"])
def test_a_missing_section_is_named(tmp_path: Path, section: str) -> None:
    settings = {name: value for name, value in SMALL.items() if name != section}
    with pytest.raises(KavaError, match=rf"pipelines\.small\.{section}: Field required"):
        load(tmp_path, settings)


def test_every_wrong_setting_is_named_at_once(tmp_path: Path) -> None:
    settings = changed("evict.budget", 0)
    del settings["report"]
    with pytest.raises(KavaError, match=r"has 2 wrong setting\(s\)(.|\n)*evict\.budget(.|\n)*rep"):
        load(tmp_path, settings)


KAVA = {"reads": "kv_targets", "alpha_kv": 1.0, "training": TRAINING}
NO_COT = {"reads": "problems", "training": TRAINING}
SEQUENTIAL = {"reads": "kv_targets", "reasoning": "sequential", "training": TRAINING}
SENTENCES = {**SMALL["prepare"], "traces": "sentences"}
HELD_OUT = {"records": 2, "every": 1}


@pytest.mark.parametrize(
    ("section", "settings", "named"),
    [
        # without latents
        ("students.no-cot", {**NO_COT, "alpha_kv": 0.5}, "alpha_kv"),
        ("students.no-cot", {**NO_COT, "alpha_codi": 0.5}, "alpha_codi"),
        ("students.no-cot", {**NO_COT, "reasoning": "sequential"}, "reasoning"),
        ("students.no-cot", {**NO_COT, "iterations": 2}, "iterations"),
        ("students.no-cot", {**NO_COT, "projection": False}, "projection"),
        ("students.no-cot", {**NO_COT, "targets": "online"}, "targets"),
        ("students.no-cot", {**NO_COT, "shard_window": 2}, "shard_window"),
        # without Jacobi iterations
        ("students.kava", {**KAVA, "reasoning": "sequential", "iterations": 2}, "iterations"),
        (
            "students.kava",
            {**KAVA, "reasoning": "sequential", "per_position": False},
            "per_position",
        ),
        # without the term
        ("students.kava", {**KAVA, "alpha_kv": 0, "kv_distance": "mse"}, "kv_distance"),
        ("students.kava", {**KAVA, "alpha_kv": 0, "kv_std": False}, "kv_std"),
        ("students.kava", {**KAVA, "alpha_kv": 0, "fake_quantise": True}, "fake_quantise"),
        ("students.kava", {**KAVA, "alpha_kv": 0, "targets": "online"}, "targets"),
        ("students.kava", {**KAVA, "alpha_kv": 0, "layer_map": [0, 1]}, "layer_map"),
        ("students.kava", {**KAVA, "codi_distance": "mse"}, "codi_distance"),
        ("students.kava", {**KAVA, "codi_std": False}, "codi_std"),
        ("students.kava", {**KAVA, "revision": "main"}, "revision"),
        # the teacher's
        ("teacher", {"training": TRAINING, "revision": "main"}, "revision"),
        ("teacher", {"training": {**TRAINING, "lora": {}}}, r"training\.lora: .* name a `model`"),
        (
            "students.kava",
            {**KAVA, "training": {**TRAINING, "gradient_checkpointing": True}},
            r"training\.gradient_checkpointing: .* latents",
        ),
        (
            "teacher",
            {"training": TRAINING, "model": "somewhere", "scratch": {"layers": 3}},
            "scratch",
        ),
        # caches and targets
        ("evict", {"budget": 4, "share_size": 3}, "share_size"),
        ("evict", {"budget": 4, "select": "record", "share": "selection"}, "share"),
        ("evict", {"budget": 4, "select": "record", "budget_shape": "pyramid"}, "select"),
        ("fidelity", {"select": "record", "share": "selection"}, "share"),
        ("evict", {"budget": 4, "calibration_records": 3}, "calibration_records"),
        ("evict", {"budget": 4, "calibration_percentile": 99}, "calibration_percentile"),
        (
            "evict",
            {
                "budget": 4,
                "keys_bits": 8,
                "values_bits": 8,
                "endpoint_bits": 32,
                "half": "float16",
            },
            "half",
        ),
        (
            "generate",
            {"keys_bits": 32, "values_bits": 4, "endpoint_bits": 8, "half": "float16"},
            "half",
        ),
        ("fidelity", {"share_size": 3}, "share_size"),
        ("fidelity", {"bits": [8, 4], "half": "float16"}, "half"),
        ("evaluate", {"interpret_records": 0, "intervention_problems": 5}, "intervention_problems"),
    ],
)
def test_a_setting_that_would_mean_nothing_is_an_error(
    tmp_path: Path, section: str, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(KavaError, match=rf"pipelines\.small\.{section}: .*{named}"):
        load(tmp_path, changed(section, settings))


@pytest.mark.parametrize(
    ("named", "further", "message"),
    [
        ("nobody", {}, "there is no student nobody. There are: .*no-cot"),
        ("kava", {}, r"student kava never learns .*Set students\.kava\.w_cot above 0"),
        ("both", {"students": {"both-cot": KAVA}}, "both would be called both-cot"),
        ("both", {"others": {"both-cot": "theirs"}}, r"others\.both-cot: a system of this pipe"),
        ("teacher", {"students": {"teacher": {**KAVA, "w_cot": 1}}}, "would be called teacher-cot"),
    ],
)
def test_a_student_that_cannot_write_its_steps_is_named(
    tmp_path: Path, named: str, further: dict[str, Any], message: str
) -> None:
    students = {**SMALL["students"], "both": {**KAVA, "w_cot": 1.0}, **further.get("students", {})}
    asked = {"write_steps": [named], "others": further.get("others", {})}
    with pytest.raises(KavaError, match=rf"pipelines\.small: evaluate\..*{message}"):
        load(tmp_path, {**SMALL, "students": students, "evaluate": asked})
    imported = {"students": students, "prepare": SMALL["prepare"], "evaluate": asked}
    with pytest.raises(ValidationError, match=message):
        Imported.model_validate(imported)
    asked = {"write_steps": ["both"]}
    small = {"students": {"both": students["both"]}, "evaluate": asked}
    assert load(tmp_path, {**SMALL, **small}).evaluate.write_steps == ("both",)
    assert "write_steps" not in Evaluate().model_dump()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"students": {"it": {**KAVA, "alpha_readout": 1.0}}},
            "students.it.alpha_readout: needs slots .* evict.select is head",
        ),
        (
            {"students": {"it": {**KAVA, "fake_quantise": True}}},
            "students.it.fake_quantise: .* evict.keys_bits is 16 and evict.values_bits 16",
        ),
        (
            {"students": {"it": {**SEQUENTIAL, "curriculum": {"latents_per_step": 3, "steps": 2}}}},
            "students.it.curriculum.latents_per_step: .* divisor of evict.budget 4, found 3",
        ),
        (
            {"students": {"it": {**KAVA, "training": {**TRAINING, "records": 9}}}},
            "students.it.training.records: expected at most 8, found 9: prepare.train is 8",
        ),
        (
            {"teacher": {"training": {**TRAINING, "records": 7, "held_out": HELD_OUT}}},
            "teacher.training.records: expected at most 6, found 7: .* 2 of which are held out",
        ),
        (
            {
                "traces": {"samples": 2, "temperature": 1.0},
                "students": {"it": {**KAVA, "training": {**TRAINING, "records": 17}}},
            },
            "students.it.training.records: expected at most 16, found 17: .* and traces.samples 2",
        ),
        (
            {"prepare": SENTENCES, "evict": {"budget": 4, "policy": "results"}},
            "evict.policy: results: prepare.traces is sentences",
        ),
        (
            {"prepare": SENTENCES, "fidelity": {"policies": ["rkv", "results"]}},
            "fidelity.policies.1: results: prepare.traces is sentences",
        ),
        (
            {
                "prepare": SENTENCES,
                "teacher": {"training": TRAINING, "forgets": {"keeps": "results"}},
            },
            "teacher.forgets.keeps: results: prepare.traces is sentences",
        ),
    ],
)
def test_sections_that_do_not_go_together_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(KavaError, match=rf"pipelines\.small: {message}"):
        load(tmp_path, {**SMALL, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {
            "evict": {"budget": 4, "select": "record"},
            "students": {"it": {**KAVA, "alpha_readout": 1.0}},
        },
        {
            "evict": {"budget": 4, "values_bits": 4},
            "students": {"it": {**KAVA, "fake_quantise": True}},
        },
        # how wide a pyramid is depends on the teacher's layers
        {
            "evict": {"budget": 4, "budget_shape": "pyramid"},
            "students": {"it": {**SEQUENTIAL, "curriculum": {"latents_per_step": 3, "steps": 2}}},
        },
        {"students": {"it": {**SEQUENTIAL, "curriculum": {"latents_per_step": 2, "steps": 2}}}},
        {"students": {"it": {**KAVA, "training": {**TRAINING, "records": 8}}}},
        {
            "prepare": {**SENTENCES, "traces": "checked"},
            "evict": {"budget": 4, "policy": "results"},
        },
    ],
)
def test_sections_that_go_together_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert load(tmp_path, {**SMALL, **changes}).students


def test_a_pipeline_without_fidelity_has_no_such_stage(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL).fidelity is None
    assert load(tmp_path, SMALL).traces is None
    assert load(tmp_path, changed("traces", {})).traces is not None
    assert load(tmp_path, changed("fidelity", {})).fidelity is not None


def test_settings_are_read_without_torch() -> None:
    """A look at the settings does not wait for torch, whatever policies they name."""
    script = (
        "import sys; from pathlib import Path; from kava_core.settings import load_pipeline; "
        f"load_pipeline(Path({str(PIPELINES)!r})); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["a.b", "a/b", "..", "a b"])
def test_names_of_pipelines_and_students_are_folder_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(KavaError, match=r"pipeline name .* DVC reads a dot as a path"):
        load(tmp_path, SMALL, name)
    settings = copy.deepcopy(SMALL)
    settings["students"][name] = {"training": TRAINING}
    with pytest.raises(KavaError, match=r"pipelines\.small\.students"):
        load(tmp_path, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no `pipelines:` mapping"),
        ("- a", "has no `pipelines:` mapping"),
        ("pipelines: 3", "has no `pipelines:` mapping"),
        ("pipelines: {a: 1}", "has no pipeline 'None'. There are: a."),
        ("pipeline: b\npipelines: {a: 1}", "has no pipeline 'b'. There are: a."),
        ("pipeline: [b]\npipelines: {a: 1}", "There are: a."),
        ("pipeline: a\npipelines: {a: 1}", "pipelines.a: Input should be a valid dictionary"),
        ("pipelines: {", "is not valid YAML"),
        ("pipelines: *nothing", "is not valid YAML"),
    ],
)
def test_a_file_that_holds_no_pipeline_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(KavaError) as error:
        load_pipeline(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match="is missing"):
        load_pipeline(tmp_path / "none.yaml")
    with pytest.raises(KavaError, match="cannot be read"):
        load_pipeline(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(KavaError, match="is not valid YAML"):
        load_pipeline(tmp_path / "binary.yaml")


def test_merges_copy_and_what_is_written_wins(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        """
pipeline: child
pipelines:
  base: &base
    prepare: {source: synthetic, train: 8, validation: 4, test: 4}
    teacher: {training: &training {steps: 10, learning_rate: 1e-3}}
    generate: {}
    evict: &evict {budget: 4, policy: {name: rkv, lambda: 0.5}}
    students: {kava: {reads: kv_targets, training: {<<: *training, steps: 20}}}
    evaluate: {}
    report: {title: base}
  child:
    <<: *base
    evict: {<<: *evict, budget: 8}
  2024: {<<: *base}
"""
    )
    name, child = load_pipeline(path)
    assert name == "child"
    assert (child.evict.budget, child.evict.policy) == (8, POLICIES["rkv"](lambda_=0.5))
    training = child.students["kava"].training
    assert (training.steps, training.learning_rate) == (20, 0.001)  # 1e-3 is text in YAML 1.1
    assert load_pipeline(path, "base")[1].evict.budget == 4
    assert load_pipeline(path, "2024")[0] == "2024"


def test_settings_do_not_change_after_reading(tmp_path: Path) -> None:
    settings = load(tmp_path, SMALL)
    with pytest.raises(ValueError, match="frozen"):
        settings.evict.budget = 5  # type: ignore[misc]


@pytest.mark.parametrize("name", POLICIES)
def test_a_bare_name_is_a_policy_at_its_defaults(name: str) -> None:
    bare = Evict.model_validate({"budget": 4, "policy": name})
    assert bare.policy == POLICIES[name]() and bare.policy.label == name
    written = bare.model_dump(mode="json")["policy"]
    assert (
        written["name"] == name and Evict.model_validate({"budget": 4, "policy": written}) == bare
    )


def test_a_policys_label_says_what_is_not_its_default() -> None:
    chosen = Evict.model_validate({"budget": 4, "policy": {"name": "rkv", "lambda": 0.5}}).policy
    assert chosen == POLICIES["rkv"](lambda_=0.5) and chosen.label == "rkv lambda=0.5"


# --- valid settings survive YAML ------------------------------------------------------------------

numbers = st.integers(1, 10**6)
shares = st.floats(0, 1, allow_nan=False)
weights = st.floats(0, 1e9, allow_nan=False)
rates = st.floats(1e-12, 10, allow_nan=False)
trainings = st.builds(
    lambda length, rest: {length: 7, **rest},
    st.sampled_from(["steps", "epochs"]),
    st.fixed_dictionaries(
        {"learning_rate": rates},
        optional={
            "batch_size": numbers,
            "weight_decay": weights,
            "warmup": shares,
            "precision": st.sampled_from(["float32", "bfloat16"]),
            "seed": st.integers(-(2**31), 2**31),
            "lora": st.none()
            | st.fixed_dictionaries({}, optional={"rank": numbers, "dropout": shares}),
        },
    ),
)
layers = st.one_of(
    st.just("all"),
    st.builds(lambda n: {"last": n}, numbers),
    st.builds(lambda n: {"every": n}, numbers),
    st.lists(st.integers(0, 99), min_size=1, max_size=4),
)
policies = st.one_of(
    st.sampled_from(list(POLICIES)),
    st.builds(lambda share: {"name": "rkv", "lambda": share}, shares),
    st.builds(lambda seed: {"name": "random", "seed": seed}, st.integers(-99, 99)),
)
evictions = st.fixed_dictionaries(
    {"budget": numbers},
    optional={
        "policy": policies,
        "budget_shape": st.sampled_from(["uniform", "pyramid"]),
        "layers": layers,
        "keys_bits": st.sampled_from([32, 16, 8, 4]),
    },
)
students = st.fixed_dictionaries(
    {"reads": st.just("kv_targets"), "training": trainings, "alpha_kv": st.floats(0.1, 1e9)},
    optional={
        "iterations": st.integers(0, 9),
        "projection": st.booleans(),
        "alpha_codi": weights,
        "kv_distance": st.sampled_from(["l1", "smooth_l1", "mse"]),
    },
)


@settings(deadline=None)  # a busy machine takes longer than its 200 ms
@given(training=trainings, evict=evictions, student=students, title=st.text(max_size=20))
def test_valid_settings_survive_yaml(
    tmp_path_factory: pytest.TempPathFactory,
    training: dict[str, Any],
    evict: dict[str, Any],
    student: dict[str, Any],
    title: str,
) -> None:
    given_settings = {
        **SMALL,
        "teacher": {"training": {**training, "lora": None}},
        "evict": evict,
        "students": {"s-1_A": student},
        "report": {"title": title},
    }
    folder = tmp_path_factory.getbasetemp()
    read = load(folder, given_settings)
    assert read.teacher.training == Training.model_validate({**training, "lora": None})
    assert read.evict == Evict.model_validate(evict)
    assert read.students == {"s-1_A": Student.model_validate(student)}
    assert read.report.title == title
    for key, value in {**evict, **student}.items():
        if key not in ("layers", "policy", "training"):
            section = read.evict if key in evict else read.students["s-1_A"]
            assert getattr(section, key) == value
    # and once more, from what was read
    again = load(folder, read.model_dump(mode="json", by_alias=True))
    assert again == read


# --- the repository's own pipelines ---------------------------------------------------------------


def own() -> dict[str, Any]:
    return yaml.safe_load(PIPELINES.read_text())


@pytest.mark.parametrize("name", own()["pipelines"])
def test_the_repositorys_pipelines_are_valid(name: str) -> None:
    found, settings = load_pipeline(PIPELINES, name)
    assert found == name and settings.students


def test_the_settings_on_the_page_about_training_are_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    shown = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    assert len(shown) == 3
    for section in shown:
        load(tmp_path, {**SMALL, **section})


def test_the_active_pipeline_is_one_of_them() -> None:
    assert load_pipeline(PIPELINES)[0] == own()["pipeline"]


def test_no_line_of_the_settings_file_says_another_ones_value() -> None:
    """`dvc exp run -S` writes merged and aliased mappings out in full, for every pipeline."""
    events = list(yaml.parse(PIPELINES.read_text(), Loader=yaml.SafeLoader))
    assert not [event for event in events if isinstance(event, yaml.AliasEvent)]

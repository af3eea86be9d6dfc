"""Settings: what is wrong is named by its key path, what is right survives YAML."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.settings import Evict, Pipeline, Policy, Student, Training, load_pipeline

ROOT = Path(__file__).parents[1]
PIPELINES = ROOT / "pipelines.yaml"
TRAINING = {"steps": 10, "learning_rate": 0.001}
SMALL: dict[str, Any] = {
    "prepare": {"source": "synthetic", "train": 8, "validation": 4, "test": 4},
    "teacher": {"training": TRAINING},
    "generate": {},
    "evict": {"budget": 4},
    "students": {"kava": {"training": TRAINING}, "no-cot": {"training": TRAINING}},
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
        ("evict.lambda_", 0.1, "evict.lambda_: no such setting"),
        ("students.kava.training.stesp", 4, "students.kava.training.stesp: no such setting"),
        ("distil", {}, "distil: no such setting"),
        # wrong types
        ("evict.budget", "eight", "evict.budget: Input should be a valid integer, found 'eight'"),
        ("evict.budget", "8", "evict.budget: Input should be a valid integer"),
        ("evict.budget", 8.5, "evict.budget: Input should be a valid integer, found 8.5"),
        ("evict.budget", True, "evict.budget: Input should be a valid integer, found True"),
        ("evict.budget", None, "evict.budget: Input should be a valid integer, found None"),
        ("evict.lambda", True, "evict.lambda: should be a number, found True"),
        ("evict.lambda", "much", "evict.lambda: Input should be a valid number"),
        ("students.kava.projection", "yes", "students.kava.projection: Input should be a valid b"),
        ("students.kava.projection", 1, "students.kava.projection: Input should be a valid bool"),
        ("students.kava.training", 3, "students.kava.training: Input should be a valid dictionary"),
        ("generate", None, "generate: Input should be a valid dictionary"),
        ("prepare.seed", 0.5, "prepare.seed: Input should be a valid integer, found 0.5"),
        ("report.title", 3, "report.title: Input should be a valid string, found 3"),
        ("prepare.synthetic.steps", [2], "prepare.synthetic.steps.1: Field required"),
        ("prepare.synthetic.steps", [2, 0], "prepare.synthetic.steps.1: Input should be greater"),
        # impossible values
        ("evict.budget", 0, "evict.budget: Input should be greater than 0, found 0"),
        ("evict.lambda", 1.5, "evict.lambda: Input should be less than or equal to 1, found 1.5"),
        ("evict.policy", "rvk", "evict.policy: Input should be 'rkv', 'attention'"),
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
        ("students.kava.alpha_kv", -1, "students.kava.alpha_kv: Input should be greater than or"),
        ("students.kava.reasoning", "magic", "students.kava.reasoning: Input should be 'jacobi'"),
        ("students.a.b", {"training": TRAINING}, "students.a"),
        ("teacher.training", None, "teacher: a teacher from scratch needs `training`"),
        ("teacher.scratch.heads", 3, "teacher.scratch: hidden_size 128 must be an even multiple"),
        ("teacher.scratch.hidden_size", 4, "teacher.scratch: hidden_size 4 must be an even multi"),
        ("teacher.scratch.kv_heads", 3, "teacher.scratch: hidden_size 128 must be an even multip"),
        ("prepare.source", "gsm8k", "prepare: source gsm8k needs a `path`"),
        ("prepare.train", None, "prepare: source synthetic needs the numbers `train` and `test`"),
        ("resources", {"workers": -1}, "resources.workers: Input should be greater than or equal"),
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


@pytest.mark.parametrize("weight", ["alpha_kv", "alpha_codi"])
def test_a_student_without_latents_cannot_be_taught_by_targets(tmp_path: Path, weight: str) -> None:
    student = {"training": TRAINING, "reasoning": "none", weight: 0.5}
    with pytest.raises(KavaError, match=r"students\.no-cot: .*`reasoning: none` reads no targets"):
        load(tmp_path, changed("students.no-cot", student))


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
    evict: &evict {budget: 4, lambda: 0.5}
    students: {kava: {training: {<<: *training, steps: 20}}}
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
    assert (child.evict.budget, child.evict.lambda_) == (8, 0.5)
    training = child.students["kava"].training
    assert (training.steps, training.learning_rate) == (20, 0.001)  # 1e-3 is text in YAML 1.1
    assert load_pipeline(path, "base")[1].evict.budget == 4
    assert load_pipeline(path, "2024")[0] == "2024"


def test_settings_do_not_change_after_reading(tmp_path: Path) -> None:
    settings = load(tmp_path, SMALL)
    with pytest.raises(ValueError, match="frozen"):
        settings.evict.budget = 5  # type: ignore[misc]


def test_policies_are_those_there_are() -> None:
    from kava_core.eviction import POLICIES

    assert list(get_args(Policy)) == list(POLICIES)


# --- valid settings survive YAML ------------------------------------------------------------------

numbers = st.integers(1, 10**6)
shares = st.floats(0, 1, allow_nan=False)
weights = st.floats(0, 1e9, allow_nan=False)
rates = st.floats(1e-12, 10, allow_nan=False)
trainings = st.fixed_dictionaries(
    {"steps": numbers, "learning_rate": rates},
    optional={
        "batch_size": numbers,
        "weight_decay": weights,
        "warmup": shares,
        "precision": st.sampled_from(["float32", "bfloat16"]),
        "seed": st.integers(-(2**31), 2**31),
        "lora": st.none()
        | st.fixed_dictionaries({}, optional={"rank": numbers, "dropout": shares}),
    },
)
layers = st.one_of(
    st.just("all"),
    st.builds(lambda n: {"last": n}, numbers),
    st.builds(lambda n: {"every": n}, numbers),
    st.lists(st.integers(0, 99), min_size=1, max_size=4),
)
evictions = st.fixed_dictionaries(
    {"budget": numbers},
    optional={
        "policy": st.sampled_from(get_args(Policy)),
        "lambda": st.none() | shares,
        "layers": layers,
        "keys_bits": st.sampled_from([32, 16, 8, 4]),
        "calibration_percentile": st.floats(51, 100),
    },
)
students = st.fixed_dictionaries(
    {"training": trainings},
    optional={
        "reasoning": st.sampled_from(["jacobi", "sequential"]),
        "iterations": st.integers(0, 9),
        "projection": st.booleans(),
        "alpha_kv": weights,
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
        "teacher": {"training": training},
        "evict": evict,
        "students": {"s-1_A": student},
        "report": {"title": title},
    }
    folder = tmp_path_factory.getbasetemp()
    read = load(folder, given_settings)
    assert read.teacher.training == Training.model_validate(training)
    assert read.evict == Evict.model_validate(evict)
    assert read.students == {"s-1_A": Student.model_validate(student)}
    assert read.report.title == title
    for key, value in {**evict, **student}.items():
        if key not in ("layers", "training"):
            section = read.evict if key in evict else read.students["s-1_A"]
            assert getattr(section, "lambda_" if key == "lambda" else key) == value
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


def test_the_active_pipeline_is_one_of_them() -> None:
    assert load_pipeline(PIPELINES)[0] == own()["pipeline"]


def mappings(node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.MappingNode]]:
    """Every mapping under `node` that a key (not a merge) leads to, with its path."""
    if isinstance(node, yaml.MappingNode):
        yield path, node
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                yield from mappings(value, f"{path}.{key.value}")


def shared_mappings(text: str) -> list[tuple[str, str]]:
    """Pairs of paths at which one and the same mapping stands."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    first: dict[int, str] = {}
    pairs = []
    for path, node in mappings(root, ""):
        if id(node) in first:
            pairs.append((first[id(node)], path))
        first.setdefault(id(node), path)
    return pairs


def inherited_sections(text: str) -> list[str]:
    """Pipelines that take whole sections from a merge, and with them the sections' mappings."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    (pipelines,) = [value for key, value in root.value if key.value == "pipelines"]
    return [
        name.value
        for name, pipeline in pipelines.value
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in pipeline.value)
    ]


def test_no_mapping_of_settings_stands_in_two_places() -> None:
    """`dvc exp run -S` into a mapping that two places share would be lost, or change both."""
    text = PIPELINES.read_text()
    assert shared_mappings(text) == []
    assert inherited_sections(text) == []


def test_the_trap_is_seen_where_it_is() -> None:
    shared = "a: {x: &s {n: 1}}\nb: {x: *s}"
    assert shared_mappings(shared) == [(".a.x", ".b.x")]
    assert shared_mappings("a: {x: &s {n: 1}}\nb: {x: {<<: *s}}") == []
    assert inherited_sections("pipelines: {a: &a {x: {n: 1}}, b: {<<: *a}}") == ["b"]


def merged_mappings(text: str) -> list[str]:
    """Paths of mappings that a merge brings along whole: shared, though no alias is written."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = []
    for path, node in mappings(root, ""):
        written = {key.value for key, _ in node.value}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                found += [
                    f"{path}.{inner.value}"
                    for source in sources
                    for inner, below in source.value
                    if isinstance(below, yaml.MappingNode) and inner.value not in written
                ]
    return found


def test_no_merge_brings_a_mapping_along() -> None:
    assert merged_mappings(PIPELINES.read_text()) == []
    assert merged_mappings("a: &a {t: {n: 1}}\nb: {<<: *a}") == [".b.t"]
    assert merged_mappings("a: &a {t: &t {n: 1}}\nb: {<<: *a, t: {<<: *t}}") == []

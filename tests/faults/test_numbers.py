"""Numbers that are none, too large or of no spread: named, counted, fatal unless the settings say
that such records are left out; then what goes in is stored or named by the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kava_core.artefacts import publish
from kava_core.distill.objective import objective_of
from kava_core.errors import KavaError
from kava_core.eviction import CacheBatch
from kava_core.models.loading import load_tokenizer, save_model
from kava_core.models.teacher_pass import TeacherPass, over
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.settings import Evict, Generate, Pipeline, Resources, Student
from kava_core.store import Geometry, TargetsStore, TeacherStore
from kava_core.store.summary import describe_store, quarantined
from kava_core.targets.build import Build
from kava_core.targets.evict import build_kv_targets
from kava_core.targets.generate import build_targets_alone, build_teacher_kv, store_geometry
from kava_core.targets.plan import Plan
from stages.cli import kava
from stages.graph import dvc_file
from tests.faults.conftest import Tell
from tests.faults.stage import Stage
from tests.golden.inputs import NAME, with_settings
from tests.settings.test_pipeline import SMALL
from tests.stages.project import digest
from tests.store.make import FLOAT32, finish, make_spec, targets_data, write_targets_shard
from tests.targets.test_generate import SPLITS, TOKENIZER
from tests.tiny import COMMON, assert_near, pad, tiny_model, tiny_student

IN_PROCESS = Resources(workers=0)
WIDE = {"keys_bits": 32, "values_bits": 32, "endpoint_bits": 32}
ENCODER = TraceEncoder(TOKENIZER, "equations")
TRACES = ENCODER.encode_all(SPLITS.train)
IDS = [trace.id for trace in TRACES]


PARTS = ("question_ids", "cot_ids", "answer_prompt_ids", "answer_ids")


def ids_in(trace: Record) -> set[int]:
    return {token for name in PARTS for token in getattr(trace, name)}


def length(trace: Record) -> int:
    return sum(len(getattr(trace, name)) for name in PARTS)


def rare_token() -> int:
    """One that some traces have, none of the first shard of 4, and that no probe of a model holds
    (`kava_core.models.proofs`)."""
    for token in range(64, len(TOKENIZER)):
        having = [token in ids_in(trace) for trace in TRACES]
        if 2 <= sum(having) <= 4 and not any(having[:4]) and not all(having[8:]):
            return token
    raise AssertionError("no such token")


RARE = rare_token()
BAD = [trace.id for trace in TRACES if RARE in ids_in(trace)]


def poison(model: PreTrainedModel, token: int, size: float) -> PreTrainedModel:
    """Make the first layer's values `size` times larger wherever the token stands: every weight
    remains a finite number."""
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, -1] = 0
        embedding[token, -1] = 1
        model.model.layers[0].self_attn.v_proj.weight[:, -1] = size
    return model


def llama(**changes: int) -> LlamaForCausalLM:
    config = LlamaConfig(**{**COMMON, "vocab_size": len(TOKENIZER), **changes})
    return tiny_model(config, torch.float32)


def make(folder: Path, model: PreTrainedModel) -> Path:
    """Problems and a teacher."""
    write_problems(folder / "problems", SPLITS, "equations", {})
    save_model(folder / "teacher", model, TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that gives no numbers for the records in BAD."""
    return make(tmp_path_factory.mktemp("broken"), poison(llama(), RARE, 3e38))


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose values for the records in BAD are too large for float16."""
    return make(tmp_path_factory.mktemp("loud"), poison(llama(), RARE, 1e6))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose context some of the traces exceed."""
    model = llama(max_position_embeddings=sorted(map(length, TRACES))[-3])
    return make(tmp_path_factory.mktemp("short"), model)


def generate(inputs: Path, place: Path, **settings: object) -> Build:
    return build_teacher_kv(
        inputs / "problems", inputs / "teacher",
        Generate.model_validate({"shard_size": 4, "batch_size": 3, **settings}),
        place / "data/one/teacher_kv", IN_PROCESS,
    )  # fmt: skip


def targets_alone(inputs: Path, place: Path, evict: Evict, **settings: object) -> Build:
    return build_targets_alone(
        inputs / "problems", inputs / "teacher",
        Generate.model_validate(
            {"shard_size": 4, "batch_size": 3, "keep": "targets", **settings}
        ),
        evict, place / "data/one/kv_targets", IN_PROCESS,
    )  # fmt: skip


def numbers(store: TeacherStore) -> dict[str, tuple[Tensor, ...]]:
    """What a store holds, by record."""
    found = {}
    for number in range(store.shards):
        shard = store.shard(number)
        for row, record in enumerate(shard.records):
            part = slice(*shard.offsets[row : row + 2].tolist())
            tensors = (shard.keys.codes, shard.values.codes, shard.importance)
            found[record.id] = (*(x[part].clone() for x in tensors), shard.endpoint.codes[row])
    return found


@pytest.mark.parametrize(
    ("teacher", "settings", "reason"),
    [
        ("broken", WIDE, "NaN or infinity in importance"),
        ("loud", {"half": "float16"}, "endpoint too large for float16"),
    ],
)
def test_a_record_without_numbers_is_named_and_counted(
    teacher: str, settings: dict[str, object], reason: str, tmp_path: Path,
    request: pytest.FixtureRequest, tell: Tell,
) -> None:  # fmt: skip
    inputs: Path = request.getfixturevalue(teacher)
    first = next(k for k in range(3) if set(IDS[4 * k : 4 * k + 4]) & set(BAD))
    some = [name for name in IDS[4 * first : 4 * first + 4] if name in BAD]
    with pytest.raises(KavaError) as error:
        generate(inputs, tmp_path, **settings)
    said = str(error.value)
    assert f"record {some[0]!r}: {reason}" in said
    assert f"({len(some)} of the 4 records of shard {first} cannot be kept)" in said
    assert "`generate.on_error: quarantine`" in said
    # Left out, it is in no store, and the store says so; what is there is what it would be.
    built = generate(inputs, tmp_path, on_error="quarantine", **settings)
    manifest = built.manifest
    left_out = dict(quarantined(manifest))
    assert left_out.keys() == set(BAD) and reason in left_out.values()
    assert manifest.records + len(BAD) == len(IDS)
    store = TeacherStore.open(built.folder)
    assert store.index.column("id").tolist() == [name for name in IDS if name not in BAD]
    others = replace(SPLITS, train=[p for p in SPLITS.train if p.id not in BAD])
    write_problems(tmp_path / "problems", others, "equations", {})
    alone = build_teacher_kv(
        tmp_path / "problems", inputs / "teacher",
        Generate.model_validate({"shard_size": 4, "batch_size": 1, **settings}),
        tmp_path / "data/alone/teacher_kv", IN_PROCESS,
    )  # fmt: skip
    expected = numbers(TeacherStore.open(alone.folder))
    for name, tensors in numbers(store).items():
        for ours, theirs in zip(tensors, expected[name], strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2)
    tell("NaN, infinity or overflow", reason, "named, counted; or left out")


def test_where_nothing_is_wrong_quarantine_changes_no_byte(tmp_path: Path) -> None:
    inputs = make(tmp_path, llama())
    kept = digest(generate(inputs, tmp_path / "a").folder)
    assert digest(generate(inputs, tmp_path / "b", on_error="quarantine").folder) == kept
    cut = Evict(budget=3)
    kept = digest(targets_alone(inputs, tmp_path / "a", cut).folder)
    found = targets_alone(inputs, tmp_path / "b", cut, on_error="quarantine")
    assert digest(found.folder) == kept


@pytest.mark.parametrize("granularity", ["token", "channel"])
def test_targets_alone_leave_out_what_caches_would(
    broken: Path, tmp_path: Path, granularity: str
) -> None:
    evict = Evict.model_validate(
        {"budget": 3, "keys_bits": 8, "values_bits": 8, "granularity": granularity}
    )
    caches = tmp_path / "data/two/teacher_kv"
    built = build_teacher_kv(
        broken / "problems", broken / "teacher",
        Generate(shard_size=4, batch_size=3, on_error="quarantine"), caches, IN_PROCESS,
    )  # fmt: skip
    publish((built.folder, caches))
    two = build_kv_targets(caches, evict, tmp_path / "data/two/kv_targets", IN_PROCESS)
    one = targets_alone(broken, tmp_path, evict, on_error="quarantine")
    assert digest(one.folder) == digest(two.folder)
    assert dict(quarantined(one.manifest)).keys() == set(BAD)
    with pytest.raises(KavaError, match=r"NaN or infinity in importance \(\d of the 4 records"):
        targets_alone(broken, tmp_path / "again", evict)


def test_targets_too_large_for_their_own_encoding(loud: Path, tmp_path: Path) -> None:
    evict = Evict.model_validate({"budget": 50, "half": "float16"})
    with pytest.raises(KavaError, match=r"too large for float16 \(2 of the 4 records"):
        targets_alone(loud, tmp_path, evict)
    built = targets_alone(loud, tmp_path, evict, on_error="quarantine")
    assert dict(quarantined(built.manifest)).keys() == set(BAD)
    assert built.manifest.records + len(BAD) == len(IDS)


def test_a_trace_longer_than_the_context(short: Path, tmp_path: Path, tell: Tell) -> None:
    with pytest.raises(KavaError, match=r"takes \d+ positions .* 2 of 11 problems are too long"):
        generate(short, tmp_path)
    assert not (tmp_path / "data").exists()
    built = generate(short, tmp_path, on_error="quarantine")
    left_out = quarantined(built.manifest)
    assert len(left_out) == 2 and built.manifest.records == 9
    assert all(reason.startswith("longer than the context of") for _, reason in left_out)
    tell("a trace longer than the context", "a teacher with few positions",
         "named, counted; or left out")  # fmt: skip


def test_the_work_of_a_run_that_failed_is_gone_on_with(broken: Path, tmp_path: Path) -> None:
    first = next(k for k in range(3) if set(IDS[4 * k : 4 * k + 4]) & set(BAD))
    with pytest.raises(KavaError):
        generate(broken, tmp_path, **WIDE)
    built = generate(broken, tmp_path, on_error="quarantine", **WIDE)
    assert built.examples == len(IDS[4 * first :]) - len(BAD)  # the shards before it are kept
    with pytest.raises(KavaError, match="cannot be kept"):  # and nothing is left out unasked
        generate(broken, tmp_path, **WIDE)


def test_a_torn_note_is_made_again(broken: Path, tmp_path: Path) -> None:
    built = generate(broken, tmp_path, on_error="quarantine", **WIDE)
    note = min((built.folder.parent / "quarantine").iterdir())
    note.write_text("{")
    again = generate(broken, tmp_path, on_error="quarantine", **WIDE)
    assert again.manifest == built.manifest and 0 < again.examples < built.examples


def test_a_shard_of_which_nothing_is_left(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(KavaError, match=r"would leave out all 1 records of shard \d+, the first"):
        generate(broken, tmp_path, on_error="quarantine", shard_size=1)


@pytest.mark.parametrize(
    ("number", "dtype"), [(float("nan"), "float32"), (float("inf"), "float32"), (7e4, "float16")]
)
def test_a_weight_that_is_no_number(tmp_path: Path, number: float, dtype: str, tell: Tell) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :3] = number
    inputs = make(tmp_path, model)
    for on_error in ("fail", "quarantine"):  # it is no matter of single records
        with pytest.raises(KavaError) as error:
            generate(inputs, tmp_path, model_dtype=dtype, on_error=on_error)
        assert "3 of 1536 numbers of model.layers.1.mlp.up_proj.weight" in str(error.value)
        assert f"NaN or infinite in {dtype}" in str(error.value)
    tell("NaN or infinity in a weight", f"{number:g} in {dtype}", "the weight is named")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_row_of_padding_alone(name: str, tell: Tell) -> None:
    """Among others, a student gives it numbers, and the others what they get without it."""
    student = tiny_student(name)
    question, mask = pad([[5, 6, 7, 8], [9, 10]], "left")
    empty, nothing = question.new_zeros(1, 4), mask.new_zeros(1, 4)
    answer, answer_mask = pad([[11, 2], [12, 2], [13, 2]])
    with torch.no_grad():
        found = student(
            torch.cat([question, empty]), torch.cat([mask, nothing]), answer, answer_mask
        )
        without = student(question, mask, answer[:2], answer_mask[:2])
        written = student.generate(torch.cat([question, empty]), torch.cat([mask, nothing]))
        alone = student.generate(question, mask)
    for got in (found.logits, *found.keys, *found.values):
        assert bool(got.isfinite().all())
    assert_near(found.logits[:2], without.logits)
    assert torch.equal(written[:2, : alone.shape[1]], alone)
    tell("a row of padding alone", f"in a batch of a student ({name})", "numbers; no other changes")


def test_a_question_of_nothing_is_named(tmp_path: Path) -> None:
    """So that no such row comes from problems."""
    nothing = replace(SPLITS.train[0], question=" ")
    with pytest.raises(KavaError, match=f"{nothing.id}"):
        write_problems(tmp_path, replace(SPLITS, train=[nothing]), "equations", {})


def test_a_trace_of_one_token(tell: Tell) -> None:
    """Between the others of a batch and alone: the same cache, and a target of one slot."""
    model = llama()
    traces = [replace(TRACES[0], id="one", cot_ids=TRACES[0].cot_ids[:1], step_ends=[], results=[])]
    teacher = TeacherPass(model)
    alone, among = over(teacher, traces, 4), over(teacher, [*TRACES[1:4], *traces], 4)
    assert alone.keys.shape[0] == 1 and bool(alone.importance.isfinite().all())
    torch.testing.assert_close(among.keys[-1:], alone.keys, rtol=1e-4, atol=1e-4)
    caches = CacheBatch.of_records(
        alone.keys, alone.values, alone.importance, alone.offsets, traces, teacher.rotary
    )
    targets = Plan.of(Evict(budget=4), store_geometry(model.config)).cut(caches)
    assert targets.slot_counts.unique().tolist() == [1]
    assert targets.slot_positions[..., 0].unique().tolist() == [0]
    tell("a trace of one token", "alone and among others", "the same cache; one slot")


def test_a_standard_deviation_of_zero(tmp_path: Path, tell: Tell) -> None:
    """A layer without spread is compared as it is, not divided by nothing."""
    geometry = Geometry.plain(layers=2, kv_heads=1, head_dim=4, hidden_size=8, slots=2)
    data = targets_data(3, geometry)
    (tmp_path / "store").mkdir()
    data = replace(data, values=torch.full_like(data.values, 2.0))
    write_targets_shard(tmp_path / "store", make_spec(geometry, FLOAT32), 0, **vars(data))
    finish(tmp_path / "store", make_spec(geometry, FLOAT32), 1)
    store = TargetsStore.open(tmp_path / "store")
    assert store.manifest.statistics.values_std == (0, 0)
    settings = Student.model_validate(
        {"reads": "kv_targets", "alpha_kv": 1.0, "training": {"steps": 1}}
    )
    objective = objective_of(settings, store)
    assert objective.values_std is not None and objective.values_std.tolist() == [1, 1]
    tell("a standard deviation of 0", "values that are all alike", "compared as they are")


def shorten_context(data: Path) -> int:
    """Make the teacher's context one token too short for the longest trace; what it is then."""
    teacher, source = data / "teacher", open_problems(data / "problems")
    encoder = TraceEncoder(load_tokenizer(str(teacher)), source.traces)
    context = max(map(length, encoder.encode_all(source.load("train")))) - 1
    config = json.loads((teacher / "config.json").read_text())
    config["max_position_embeddings"] = context
    (teacher / "config.json").write_text(json.dumps(config))
    return context


def test_the_stages_say_what_is_left_out(
    make_stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In generate's words, in the store, in eviction.json and in `kava store inspect`."""
    home = make_stage("generate").home
    context = shorten_context(home / "data" / NAME)
    with_settings(home, "generate", on_error="quarantine")
    monkeypatch.chdir(home)

    def run(*command: str) -> str:
        result = CliRunner().invoke(kava, list(command), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    said = run("generate")
    manifest = TeacherStore.open(home / "data" / NAME / "teacher_kv").manifest
    left_out = len(quarantined(manifest))
    assert 0 < left_out < 24 and manifest.records + left_out == 24
    words = f"{left_out} of 24 records: {left_out} for longer than the context of {context} tokens"
    assert words in said
    assert words in run("evict")
    found = json.loads((home / "data" / NAME / "eviction.json").read_text())
    assert found["quarantined_records"] == left_out
    store = TargetsStore.open(home / "data" / NAME / "kv_targets")
    assert words in dict(describe_store(store))["quarantined"]
    monkeypatch.setenv("COLUMNS", "200")
    assert "quarantined" in run("store", "inspect", f"data/{NAME}/kv_targets")


@pytest.mark.parametrize("keep", ["caches", "targets"])
def test_what_a_store_lacks_no_student_learns(
    make_stage: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch, keep: str, tell: Tell
) -> None:
    """A student of problems has the same records as one of targets: in two epochs as many steps."""
    home = make_stage("generate").home
    data = home / "data" / NAME
    shorten_context(data)
    training = {"epochs": 2, "batch_size": 1, "learning_rate": 0.01, "threads": 1}
    document = yaml.safe_load((home / "pipelines.yaml").read_text())
    for student in document["pipelines"][NAME]["students"].values():
        student["training"] = training
    (home / "pipelines.yaml").write_text(yaml.safe_dump(document))
    with_settings(home, "generate", on_error="quarantine", keep=keep)
    monkeypatch.chdir(home)
    for command in (["generate"], *([["evict"]] if keep == "caches" else []),
                    ["distill", "no-cot"], ["distill", "kava"]):  # fmt: skip
        result = CliRunner().invoke(kava, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    lacks = quarantined(TargetsStore.open(data / "kv_targets").manifest)
    for name in ("kava", "no-cot"):
        about = json.loads((data / "students" / name / "student.json").read_text())
        assert about["steps"] == 2 * (24 - len(lacks)) < 48
        assert ("left_out" in about["fingerprints"]) == (name == "no-cot")
    tell("records that were left out", f"students of targets and of problems, keep: {keep}",
         "neither learns them")  # fmt: skip


def test_dvc_knows_that_students_depend_on_what_was_left_out() -> None:
    for keep, store in (("caches", "teacher_kv"), ("targets", "kv_targets")):
        for on_error in ("fail", "quarantine"):
            generate = {"keep": keep, "on_error": on_error}
            settings = Pipeline.model_validate({**SMALL, "generate": generate})
            reads = dvc_file("p", settings)["stages"]["distill"]["do"]["deps"]
            assert (f"data/p/{store}/manifest.json" in reads) == (on_error == "quarantine")

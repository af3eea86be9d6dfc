"""A plan is what happens: bytes within a tenth, memory and time within a factor."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kava_core.artefacts import publish
from kava_core.distill.batches import ChainDataset
from kava_core.distill.start import start_teacher
from kava_core.distill.teacher_job import train_teacher
from kava_core.distill.terms import chain_terms
from kava_core.errors import KavaError
from kava_core.memory import peak_tensor_bytes
from kava_core.models.loading import save_model
from kava_core.planning.calibrate import Calibration, Rates
from kava_core.planning.costs import flops, teacher_step
from kava_core.planning.forecast import Forecast, StageCost, forecast
from kava_core.planning.lengths import Lengths, lengths_of
from kava_core.planning.memory import generate_bytes, trainer_bytes
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Pipeline
from kava_core.targets.evict import build_kv_targets
from kava_core.targets.generate import Reading, build_teacher_kv

SMALL: dict[str, Any] = {
    "prepare": {
        "source": {"name": "synthetic", "steps": [2, 3], "max_operand": 9},
        "train": 256, "validation": 8, "test": 8,
    },
    "teacher": {
        "scratch": {"vocabulary": 320, "hidden_size": 64, "intermediate_size": 128},
        "training": {"steps": 40, "batch_size": 32, "threads": 1},
        "validate_on": 8,
    },
    "generate": {"shard_size": 64, "batch_size": 32},
    "evict": {"budget": 4},
    "students": {
        "kava": {
            "reads": "kv_targets", "alpha_kv": 1.0, "alpha_codi": 1.0,
            "training": {"steps": 20, "batch_size": 32, "threads": 1},
        }
    },
    "evaluate": {},
    "report": {"title": "Small"},
    "resources": {"workers": 0},
}  # fmt: skip


def settings_with(**sections: dict[str, Any]) -> Pipeline:
    changed = {name: {**SMALL.get(name, {}), **section} for name, section in sections.items()}
    return Pipeline.model_validate({**SMALL, **changed})


def prepared(settings: Pipeline, folder: Path) -> None:
    """The problems of `settings`, and a teacher that has learnt nothing."""
    prepare = settings.prepare
    splits = prepare.source.splits(256, 8, 8, seed=0, traces="equations")  # type: ignore[attr-defined]
    write_problems(folder / "problems", splits, "equations", {})
    save_model(
        folder / "teacher", *start_teacher(settings.teacher, open_problems(folder / "problems"))
    )


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "data/small"
    prepared(Pipeline.model_validate(SMALL), folder)
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(
    ("generate", "evict"),
    [
        ({}, {}),
        ({"keys_bits": 8, "values_bits": 4, "endpoint_bits": 8}, {"budget": 8, "keys_bits": 4}),
        ({"keys_bits": 32}, {"layers": {"last": 1}, "values_bits": 8, "granularity": "channel"}),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_bytes_of_stores_hold_within_a_tenth(
    ready: Path, tmp_path: Path, generate: dict[str, Any], evict: dict[str, Any], known: bool
) -> None:
    settings = settings_with(generate=generate, evict=evict)
    found = forecast("small", settings, ready if known else tmp_path / "nothing")
    caches, targets = tmp_path / "data/one/teacher_kv", tmp_path / "data/one/kv_targets"
    built = build_teacher_kv(
        ready / "problems", ready / "teacher", settings.generate, caches, settings.resources
    )
    publish((built.folder, caches))
    publish((build_kv_targets(caches, settings.evict, targets, settings.resources).folder, targets))
    for folder, store in ((caches, found.teacher_kv), (targets, found.kv_targets)):
        assert store is not None
        assert store.bytes == pytest.approx(size_of(folder), rel=0.1)
        assert store.files == len(list(folder.iterdir()))
        assert store.shards == built.manifest.records // 64
    assert found.disk["teacher"] == pytest.approx(
        (ready / "teacher/model.safetensors").stat().st_size, rel=0.1
    )


def test_without_caches_there_is_no_store_of_them(tmp_path: Path) -> None:
    both = forecast("small", Pipeline.model_validate(SMALL), tmp_path)
    alone = forecast("small", settings_with(generate={"keep": "targets"}), tmp_path)
    assert both.teacher_kv is not None and alone.teacher_kv is None
    assert alone.kv_targets == both.kv_targets
    assert alone.bytes == both.bytes - both.teacher_kv.bytes
    assert "evict" not in {stage.stage for stage in alone.stages}


def test_chains_that_the_teacher_writes_are_planned_as_if_all_were_kept(tmp_path: Path) -> None:
    plain = forecast("small", Pipeline.model_validate(SMALL), tmp_path)
    traces = {"samples": 3, "temperature": 1.0, "batch_size": 32}
    epochs = {"steps": None, "epochs": 2, "batch_size": 32}
    by_epochs = settings_with(teacher={"training": epochs}, traces=traces)
    found = forecast("small", by_epochs, tmp_path)
    assert found.problems == 3 * plain.problems and "`traces` keeps at most" in found.lengths_from
    costs = {cost.stage: cost for cost in found.stages}
    assert [cost.stage for cost in found.stages][:3] == ["teacher", "traces", "generate"]
    assert costs["traces"].calls > 3 * 256 / 32  # a call a token
    given = forecast("small", settings_with(teacher={"training": epochs}), tmp_path)
    assert costs["teacher"] == given.stages[0]  # it learns from the given chains
    assert found.teacher_kv is not None and plain.teacher_kv is not None
    assert found.teacher_kv.bytes == pytest.approx(3 * plain.teacher_kv.bytes, rel=0.05)


def test_processes_share_a_batch_and_its_memory(tmp_path: Path) -> None:
    def stages(processes: int | str) -> dict[str, StageCost]:
        student = {**SMALL["students"]["kava"], "processes": processes}
        settings = settings_with(teacher={"processes": processes}, students={"kava": student})
        return {cost.stage: cost for cost in forecast("small", settings, tmp_path).stages}

    one, two = stages(1), stages(2)
    for name in ("teacher", "distill kava"):
        whole, half = one[name].memory, two[name].memory
        assert whole is not None and half is not None and half < whole
        assert two[name].flops == pytest.approx(one[name].flops, rel=0.1)
    assert stages("auto") == one


def test_students_are_as_large_as_what_is_kept_of_them(tmp_path: Path) -> None:
    def students(save: str) -> int:
        lora = {"rank": 8, "targets": ["q_proj"], "save": save}
        training = {**SMALL["students"]["kava"]["training"], "lora": lora}
        student = {**SMALL["students"]["kava"], "training": training}
        return forecast("small", settings_with(students={"kava": student}), tmp_path).disk[
            "students"
        ]

    adapters = 4 * 2 * 8 * (64 + 64)  # of both layers
    assert students("adapter") == adapters
    assert students("both") == students("merged") + adapters


def test_what_saves_most_comes_first_and_saves_what_it_says(tmp_path: Path) -> None:
    found = forecast("small", Pipeline.model_validate(SMALL), tmp_path)
    saved = [saving.saves for saving in found.cheaper]
    assert saved == sorted(saved, reverse=True) and len(saved) > 4
    four = next(s for s in found.cheaper if s.settings == {
        "generate.keys_bits": 4, "generate.values_bits": 4,
    })  # fmt: skip
    again = forecast("small", settings_with(generate={"keys_bits": 4, "values_bits": 4}), tmp_path)
    assert again.bytes == four.bytes == found.bytes - four.saves


def test_lengths_are_counted_where_the_problems_are_and_assumed_where_not(
    ready: Path, tmp_path: Path
) -> None:
    settings = Pipeline.model_validate(SMALL)
    drawn, counted = lengths_of(settings, tmp_path), lengths_of(settings, ready)
    assert "drawn" in drawn.origin and str(ready) in counted.origin
    assert drawn.trace_tokens() == counted.trace_tokens()
    published = settings_with(
        prepare={"source": "gsm8k-aug", "path": "whynlp/gsm8k-aug", "train": None, "test": None},
        teacher={"model": "meta-llama/Llama-3.2-1B", "scratch": {}},
    )
    found = forecast("aug", published, tmp_path)
    assert found.problems == 385620
    assert found.tokens["trace"] == pytest.approx(23, abs=0.5)
    assert "assumed" in found.lengths_from
    unknown = settings_with(
        prepare={"source": "math", "path": "x", "traces": "sentences", "train": None}
    )
    with pytest.raises(KavaError, match="Run `kava prepare` first"):
        lengths_of(unknown, tmp_path)


def test_a_share_of_the_trace_is_planned(tmp_path: Path) -> None:
    whole = forecast("small", Pipeline.model_validate(SMALL), tmp_path)
    half = forecast("small", settings_with(generate={"latent_fraction": 0.5}), tmp_path)
    assert half.tokens["trace"] < whole.tokens["trace"]
    assert half.tokens["prompt"] > whole.tokens["prompt"]


def test_a_written_chain_is_planned(tmp_path: Path) -> None:
    students = {"kava": {**SMALL["students"]["kava"], "w_cot": 1.0}}
    calls = []
    for asked in ({}, {"write_steps": ["kava"]}):
        found = forecast("small", settings_with(students=students, evaluate=asked), tmp_path)
        calls.append(next(stage.calls for stage in found.stages if stage.stage == "evaluate"))
    assert calls[1] > calls[0] + found.tokens["trace"]


# --- operations, memory, time ---------------------------------------------------------------------


def test_operations_are_those_that_torch_counts(ready: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    settings = Pipeline.model_validate(SMALL)
    training = settings.teacher.training
    assert training is not None
    model, batch = learning(settings, ready, training.batch_size)
    with FlopCounterMode(display=False) as counter:
        sum(chain_terms(model, batch).values()).backward()  # type: ignore[union-attr]
    lengths = lengths_of(settings, ready)
    from kava_core.planning.architecture import teacher_architecture

    teacher = teacher_architecture(settings.teacher, lengths.vocabulary)
    planned = flops(teacher, teacher_step(training, lengths), training)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.35)


def learning(settings: Pipeline, ready: Path, rows: int) -> tuple[Any, dict[str, Any]]:
    problems = open_problems(ready / "problems")
    model, tokenizer = start_teacher(settings.teacher, problems)
    traces = TraceEncoder(tokenizer, problems.traces).encode_all(problems.load("train"))
    return model.train(), ChainDataset(traces[:rows]).__getitems__(list(range(rows)))


def test_the_memory_of_a_trainer_is_near_what_it_takes(ready: Path) -> None:
    from kava_core.planning.architecture import teacher_architecture

    settings = Pipeline.model_validate(SMALL)
    training = settings.teacher.training
    assert training is not None
    model, batch = learning(settings, ready, training.batch_size)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        sum(chain_terms(model, batch).values()).backward()  # type: ignore[union-attr]
        optimizer.step()

    lengths = lengths_of(settings, ready)
    teacher = teacher_architecture(settings.teacher, lengths.vocabulary)
    planned = trainer_bytes(teacher, training, teacher_step(training, lengths), "x")
    taken = peak_tensor_bytes(step, torch.device("cpu")) + 4 * teacher.parameters
    assert taken / 1.6 < planned < taken * 1.6


def test_the_memory_of_a_generate_worker_is_near_what_it_takes(ready: Path) -> None:
    from kava_core.planning.architecture import teacher_architecture

    settings = Pipeline.model_validate(SMALL)
    read = Reading(ready / "problems", ready / "teacher", settings.generate).open()
    lengths = lengths_of(settings, ready)
    teacher = teacher_architecture(settings.teacher, lengths.vocabulary)
    taken = peak_tensor_bytes(partial(read, 0), torch.device("cpu")) + 4 * teacher.parameters
    assert taken / 1.6 < generate_bytes(settings, teacher, lengths) < taken * 1.6


def test_given_rates_need_no_measuring(tmp_path: Path) -> None:
    def clock(_: Lengths) -> Rates:
        return Rates(1e12, 1e9)

    found = forecast("small", Pipeline.model_validate(SMALL), tmp_path, clock)
    slower = forecast("small", Pipeline.model_validate(SMALL), tmp_path, lambda _: Rates(5e11, 5e8))
    assert found.seconds is not None and slower.seconds == pytest.approx(2 * found.seconds)
    assert forecast("small", Pipeline.model_validate(SMALL), tmp_path).seconds is None


def stage(found: Forecast, name: str) -> float:
    seconds = next(each.seconds for each in found.stages if each.stage == name)
    assert seconds is not None
    return seconds


def with_workers(workers: int | None, **sections: Any) -> Pipeline:
    fidelity = {"policies": ["rkv"], "budgets": [2], "limit": 64, "batch_size": 8}
    more = {"fidelity": fidelity, "evaluate": {"batch_size": 2}, "resources": {"workers": workers}}
    return Pipeline.model_validate({**SMALL, **more, **sections})


def test_workers_of_this_machine_share_what_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    clock = WithoutStart(lengths_of(with_workers(1), tmp_path))  # measures once
    one, four = (forecast("small", with_workers(n), tmp_path, lambda _: clock) for n in (1, 4))
    for shared in ("fidelity", "evaluate"):
        assert stage(four, shared) == pytest.approx(stage(one, shared) / 4), shared
    for shared, store in (("generate", four.teacher_kv), ("evict", four.kv_targets)):
        assert store is not None
        # Their work is shared, the disk is not.
        least = clock.written(store.bytes)
        assert max(least, stage(one, shared) / 4) <= stage(four, shared) <= stage(one, shared)
    assert stage(four, "teacher") == stage(one, "teacher")


def test_given_rates_are_of_one_device_and_one_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_workers(None, traces={"samples": 2, "temperature": 1.0})

    def planned(cores: int, each: Pipeline, rates: Rates) -> Forecast:
        monkeypatch.setattr("os.cpu_count", lambda: cores)
        return forecast("small", each, tmp_path, lambda _: rates)

    few, many = (planned(cores, settings, Rates(1e9, 1e9)).stages for cores in (2, 64))
    assert few == many
    slow_disk = planned(64, settings, Rates(1e15, 1e3))
    stores = slow_disk.teacher_kv, slow_disk.kv_targets
    caches, targets = (store.bytes for store in stores if store is not None)
    assert stage(slow_disk, "generate") == pytest.approx(caches / 1e3)
    assert stage(slow_disk, "evict") == pytest.approx((caches + targets) / 1e3)
    alone = with_workers(None, generate={**SMALL["generate"], "keep": "targets"})
    found = planned(64, alone, Rates(1e15, 1e3))
    assert stage(found, "generate") == pytest.approx(found.kv_targets.bytes / 1e3)
    slow_device = planned(64, settings, Rates(1e6, 1e15))
    operations = next(each.flops for each in slow_device.stages if each.stage == "generate")
    assert stage(slow_device, "generate") == pytest.approx(operations / 1e6)


def test_a_run_has_as_many_checkpoints_as_it_writes(tmp_path: Path) -> None:
    def checkpoints(save_every: int) -> float:
        disk = forecast("small", settings_with(cadence={"save_every": save_every}), tmp_path).disk
        return disk["checkpoints"] / disk["teacher"]

    # Weights and two moments: 3 each. The third is there before the first goes, the model after.
    assert [checkpoints(steps) for steps in (40, 20, 10)] == [3, 6, 8]


@pytest.mark.slow  # not long, but of use on a quiet machine only
def test_time_holds_within_a_factor_of_a_half(ready: Path, tmp_path: Path) -> None:
    settings = settings_with(
        teacher={"training": {"steps": 150, "batch_size": 64, "threads": 1}, "validate_on": 1},
        generate={"shard_size": 64, "batch_size": 16},
    )
    shutil.copytree(ready / "problems", tmp_path / "data/one/problems")
    one = tmp_path / "data/one"
    found = forecast("one", settings, one, WithoutStart)
    began = time.perf_counter()
    train_teacher(
        settings.teacher, open_problems(one / "problems"), one / "teacher", settings.cadence,
        settings.resources,
    )  # fmt: skip
    learnt = time.perf_counter() - began
    built = build_teacher_kv(
        ready / "problems", ready / "teacher", settings.generate, one / "teacher_kv",
        settings.resources,
    )  # fmt: skip
    publish((built.folder, one / "teacher_kv"))
    cut = build_kv_targets(
        one / "teacher_kv", settings.evict, one / "kv_targets", settings.resources
    )
    took = learnt + built.seconds + cut.seconds
    planned = sum(stage(found, name) for name in ("teacher", "generate", "evict"))
    assert took / 1.5 < planned < took * 1.5


class WithoutStart(Calibration):
    """What a stage takes beyond its start, which a test has behind it."""

    def start(self, workers: bool) -> float:
        return 0.0


# --- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evict": {"layers": [7]}}, "layer"),
        ({"teacher": {"model": "nobody/nothing", "scratch": {}}}, "teacher.model: the shapes of"),
        (
            {
                "teacher": {
                    "model": "openai-community/gpt2",
                    "scratch": {},
                    "training": {"steps": 1, "lora": {}},
                }
            },
            r"teacher\.training\.lora\.targets: k_proj, o_proj, q_proj, v_proj fit no module",
        ),
        (
            {"teacher": {"scratch": {"context_length": 16}}},
            "the context of a Llama from scratch is 16",
        ),
    ],
)
def test_what_cannot_work_is_named(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(KavaError, match=message):
        forecast("small", settings_with(**sections), tmp_path)


def test_layers_of_a_student_that_are_not_there(tmp_path: Path) -> None:
    student = SMALL["students"]["kava"] | {"layer_map": [0, 5]}
    with pytest.raises(KavaError, match=r"students\.kava\.layer_map: expected 2 layers"):
        forecast("small", settings_with(students={"kava": student}), tmp_path)


def test_what_is_sent_to_a_bucket_takes_no_disk(tmp_path: Path) -> None:
    for resource, artefact in (("caches_to", "teacher_kv"), ("targets_to", "kv_targets")):
        settings = settings_with(resources={resource: "gs://bucket/team"})
        assert artefact in forecast("small", settings_with(), tmp_path).disk
        assert artefact not in forecast("small", settings, tmp_path).disk


def test_a_disk_that_is_too_small_is_said(tmp_path: Path) -> None:
    found = forecast("small", Pipeline.model_validate(SMALL), tmp_path)
    assert found.fits and not replace(found, free=found.bytes - 1).fits

"""`kava evaluate` and `kava ask` as a person runs them, on a pipeline that knows nothing."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import dynamic_module_utils, pipeline

from kava_core.artefacts import read_json, tree_fingerprint, write_json
from kava_core.errors import KavaError
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import load_model, load_tokenizer
from kava_core.models.students import open_student
from kava_core.problems.folder import open_problems, open_test_sets
from kava_core.problems.parquet import save_problems
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import load_pipeline
from stages.ask import ask
from stages.distill import distill
from stages.evaluate import evaluate
from stages.evict import evict
from stages.generate import generate
from stages.graph import project_files
from stages.prepare import prepare
from stages.report import report
from stages.teacher import teacher
from tests.stages.project import ROOT, Project, digest

TRAINING = {"steps": 2, "batch_size": 8, "learning_rate": 1.0e-3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline up to two students, each trained for two steps, and a test set without steps."""
    home = tmp_path_factory.mktemp("evaluate")
    bare = [{"q": f"mo has {i} cups . how many ?", "a": str(i)} for i in range(3, 10)]
    (home / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    table = {
        "source": {"name": "table", "question": "q", "answer": "a"},
        "path": str(home / "bare.jsonl"),
    }
    pipeline = {
        "prepare": {
            "source": "synthetic",
            "train": 32,
            "validation": 8,
            "test": 14,
            "test_sets": {"bare": table},
        },
        "teacher": {
            "scratch": {
                "vocabulary": 300,
                "hidden_size": 32,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                "intermediate_size": 48,
            },
            "training": TRAINING,
            "validate_on": 4,
            "max_new_tokens": 4,
        },
        "generate": {"shard_size": 16},
        "evict": {"budget": 4},
        "students": {
            "kava": {
                "reads": "kv_targets",
                "training": TRAINING,
                "alpha_kv": 1.0,
                "iterations": 2,
            },
            "no-cot": {"reads": "problems", "training": TRAINING},
        },
        "evaluate": {"batch_size": 5, "max_new_tokens": 8, "similarity_records": 8, "limit": 12},
        "report": {"title": "Tiny"},
        "resources": {"workers": 0},
    }
    (home / "pipelines.yaml").write_text(
        yaml.safe_dump({"pipeline": "tiny", "pipelines": {"tiny": pipeline}})
    )
    for command in (prepare, teacher, generate, evict):
        call(command, home)
    for student in ("kava", "no-cot"):
        call(distill, home, student)
    call(evaluate, home)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def call(command: click.Command, home: Path, *arguments: str) -> None:
    paths = ["--pipelines", str(home / "pipelines.yaml"), "--data", str(home / "data")]
    command.main([*arguments, *paths], standalone_mode=False)


def change(home: Path, **settings: Any) -> None:
    """Settings of `evaluate`; None takes one out."""
    file = home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    section = document["pipelines"]["tiny"]["evaluate"] | settings
    section = {name: value for name, value in section.items() if value is not None}
    document["pipelines"]["tiny"]["evaluate"] = section
    file.write_text(yaml.safe_dump(document))


def test_every_system_is_measured_on_every_test_set(made: Path) -> None:
    folder = made / "data/tiny/evaluation"
    metrics = read_json(folder / "metrics.json")
    measured = read_json(made / "data/tiny/measured/evaluation.json")
    systems = ["kava", "no-cot", "teacher-cot", "teacher-no-cot"]
    sizes = {"synthetic": 12, "bare": 7}  # at most `limit` of each
    assert metrics.keys() == sizes.keys()
    compared, summary = (read_json(folder / f"{n}.json") for n in ("comparisons", "summary"))
    for test_set, n in sizes.items():
        assert sorted(metrics[test_set]) == systems == sorted(summary[test_set])
        assert {s: len(others) for s, others in compared[test_set].items()} == {
            "kava": 3,
            "no-cot": 3,
        }
        for name, entry in metrics[test_set].items():
            assert entry["n"] == n == sum(part["n"] for part in entry["by_trace_length"].values())
            assert entry["perplexity"] > 1
            cost = measured["systems"][test_set][name]
            assert cost["peak_memory_mb"] > 0 and cost["seconds_per_problem"] > 0
    for entry in metrics["synthetic"].values():
        assert set(entry["by_operation"]) <= {"+", "−", "×", "÷"}
    for entry in metrics["bare"].values():
        assert (*entry["by_steps"], *entry["by_operation"], *entry["by_trace_length"]) == (
            "0",
            "none",
            "none",
        )
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    assert len(rows) == 4 * (12 + 7) and all(row["question"] for row in rows)
    assert measured["hardware"]["cores"]


def test_again_it_has_the_same_bytes_and_only_what_was_measured_differs(
    made: Path, home: Path
) -> None:
    shutil.rmtree(home / "data/.kept")
    call(evaluate, home)
    before, after = (digest(root / "data/tiny/evaluation") for root in (made, home))
    assert before == after
    assert sorted(before) == [
        "comparisons.json",
        "interpretability.json",
        "lm_eval.json",
        "metrics.json",
        "plots/steps.json",
        "plots/systems.json",
        "predictions.parquet",
        "similarity.json",
        "summary.json",
        "weights.json",
    ]
    weights = read_json(home / "data/tiny/evaluation/weights.json")
    students = home / "data/tiny/students"
    assert weights["no-cot"] == tree_fingerprint(students / "no-cot")
    assert {"teacher-cot", "teacher-no-cot"} < weights.keys()
    one, two = (
        read_json(root / "data/tiny/measured/evaluation.json")["systems"] for root in (made, home)
    )
    assert one != two  # seconds

    def memory(costs: Any) -> list[float]:
        return [cost["peak_memory_mb"] for found in costs.values() for cost in found.values()]

    assert memory(one) == memory(two)


def parts(home: Path) -> dict[str, int]:
    """Every part that is kept, and when it was written."""
    kept = home / "data/.kept"
    return {str(p.relative_to(kept)): p.stat().st_mtime_ns for p in kept.glob("*/*-*.json")}


def test_a_changed_student_asks_only_itself(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, before = digest(home / "data/tiny/evaluation"), parts(home)
    call(evaluate, home)
    assert parts(home) == before and digest(home / "data/tiny/evaluation") == expected
    every = len(before) + 4 * 2 + 2  # memory of every system on every set; a student's latents
    assert f"{every} of {every} parts are finished already" in capsys.readouterr().err
    change_student(home, "no-cot")
    call(evaluate, home)
    after = parts(home)
    same = {name for name in before if after.get(name) == before[name]}
    asked = {name.partition("-")[0] for name in before.keys() - same}
    assert len(same) == 3 * len(before) // 4 and {"no"} == asked
    assert len(after) == len(before)  # what it answered before is not kept


def change_student(home: Path, name: str) -> None:
    """Other weights."""
    folder = home / "data/tiny/students" / name
    student = open_student(folder)
    with torch.no_grad():
        student.decoder.lm_head.weight[:] *= -1
    student.save_pretrained(folder)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_finds_the_same(home: Path, workers: int) -> None:
    expected = digest(home / "data/tiny/evaluation")
    shutil.rmtree(home / "data/.kept")
    file = home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    document["pipelines"]["tiny"]["resources"] = {"workers": workers}
    file.write_text(yaml.safe_dump(document))
    call(evaluate, home)
    assert digest(home / "data/tiny/evaluation") == expected


def test_killed_with_sigkill_it_goes_on_and_redoes_nothing(home: Path) -> None:
    expected = digest(home / "data/tiny/evaluation")
    shutil.rmtree(home / "data/.kept")
    shutil.rmtree(home / "data/tiny/evaluation")
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "evaluate"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(parts(home)) < 7:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = parts(home)
    assert not (home / "data/tiny/evaluation").exists()
    torn = home / "data/.kept" / min(done)
    torn.write_bytes(torn.read_bytes()[:20])
    call(evaluate, home)
    after = parts(home)
    again = {name for name, written in done.items() if after[name] != written}
    # What is scored behind answers that are asked again is scored again.
    assert again <= {n for n in done if Path(n).parent.name == torn.parent.name}
    assert min(done) in again
    assert digest(home / "data/tiny/evaluation") == expected


def test_the_validation_problems_can_be_asked_in_their_place(home: Path) -> None:
    change(home, split="validation", interpret_records=2, intervention_problems=0)
    call(evaluate, home)
    metrics = read_json(home / "data/tiny/evaluation/metrics.json")
    assert metrics.keys() == {"validation"} and metrics["validation"]["kava"]["n"] == 8
    asked = pq.read_table(home / "data/tiny/evaluation/predictions.parquet").to_pylist()
    problems = open_problems(home / "data/tiny/problems").load("validation")
    assert {row["id"] for row in asked} == {problem.id for problem in problems}


def test_weights_are_of_the_dtype_that_is_asked_for(home: Path) -> None:
    before = read_json(home / "data/tiny/evaluation/metrics.json")["synthetic"]
    change(home, model_dtype="bfloat16", interpret_records=0, max_new_tokens=2)
    call(evaluate, home)
    after = read_json(home / "data/tiny/evaluation/metrics.json")["synthetic"]
    for name, score in after.items():
        near = pytest.approx(before[name]["perplexity"], rel=0.2)
        assert score["perplexity"] == near and score["perplexity"] != before[name]["perplexity"]


def test_a_student_that_is_no_longer_in_the_settings_is_left_out_with_a_word(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    del document["pipelines"]["tiny"]["students"]["no-cot"]
    file.write_text(yaml.safe_dump(document))
    change(home, limit=4, interpret_records=3, intervention_problems=0, max_new_tokens=2)
    (home / "data/tiny/students/no-cot/student.json").unlink()
    call(evaluate, home)
    said = " ".join(capsys.readouterr().err.split())
    assert "students/no-cot is no student of the settings, and is left out" in said
    summary = read_json(home / "data/tiny/evaluation/summary.json")
    assert list(summary["synthetic"]) == ["teacher-cot", "teacher-no-cot", "kava"]


def test_latents_are_looked_into_as_far_as_wanted(home: Path) -> None:
    file = home / "data/tiny/evaluation/interpretability.json"
    found = read_json(file)
    assert found.keys() == {"kava"}  # the other student has no latents
    assert found["kava"]["records"] == found["kava"]["interventions"]["n"] == 12
    assert list(found["kava"]["magnitudes"]["teacher_truncated"]) == ["1", "2", "4", "8"]
    asked = pq.read_table(file.parent / "predictions.parquet").to_pylist()
    ids = {row["id"] for row in asked}
    assert {shown["id"] for shown in found["kava"]["decoded"]} <= ids
    marks = [row["correct"] for row in asked if row["system"] == "kava"]
    assert found["kava"]["interventions"]["none"] == pytest.approx(100 * sum(marks) / 12, abs=1e-3)
    change(home, interpret_records=3, intervention_problems=0, limit=4, max_new_tokens=2)
    call(evaluate, home)
    found = read_json(file)["kava"]
    assert (found["records"], found["interventions"]) == (3, None)
    change(home, interpret_records=0, intervention_problems=None)
    call(evaluate, home)
    assert not file.exists()


def test_a_student_is_asked_to_write_its_chain_as_well(home: Path) -> None:
    before, kept = digest(home / "data/tiny/evaluation"), parts(home)
    file = home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text())
    students = document["pipelines"]["tiny"]["students"]
    students["kava"] |= {"w_cot": 1.0}
    file.write_text(yaml.safe_dump(document))
    change(home, write_steps=["kava"])
    with pytest.raises(KavaError, match=r"student kava was trained with w_cot 0, .*kava distill"):
        call(evaluate, home)
    assert digest(home / "data/tiny/evaluation") == before
    students["both"] = students.pop("kava")
    file.write_text(yaml.safe_dump(document))
    change(home, write_steps=["both"])
    call(distill, home, "both")
    call(evaluate, home)
    others = {name for name in kept if not name.startswith("kava")}
    assert others and all(parts(home).get(name) == kept[name] for name in others)
    folder = home / "data/tiny/evaluation"
    systems = ["teacher-cot", "teacher-no-cot", "both", "no-cot", "both-cot"]
    assert list(read_json(folder / "summary.json")["bare"]) == systems
    assert read_json(folder / "comparisons.json")["bare"]["both-cot"].keys() == {*systems[:4]}
    assert read_json(folder / "interpretability.json").keys() == {"both"}
    weights = read_json(folder / "weights.json")
    assert weights.keys() == {*systems} and weights["both"] != weights["both-cot"]
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    texts = {row["question"]: row["text"] for row in rows if row["system"] == "both-cot"}
    question = rows[0]["question"]
    student = home / "data/tiny/students/both"
    asked = invoke(student, question, "--write-steps", "--json", "--max-new-tokens", "8")
    assert texts[question] == json.loads(asked.stdout)["text"]
    call(report, home)
    assert "both-cot" in (home / "data/tiny/report/table.txt").read_text()
    page = (home / "data/tiny/report/index.html").read_text()
    assert page.count("<small>writes its chain of thought</small>") == 2 * 2  # of two test sets


def rewrite_test(home: Path, answer: str | None) -> None:
    """The test split with this answer throughout; None: no problems."""
    from dataclasses import replace

    folder = open_test_sets(home / "data/tiny/test_sets")
    problems = [] if answer is None else [replace(p, answer=answer) for p in folder.load()]
    save_problems(folder.path / "test.parquet", problems, steps=False)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(None, "test set test has no problems"), ("a banana", "none in 12 problems")],
)
def test_problems_that_say_nothing_are_refused_and_nothing_is_lost(
    home: Path, answer: str | None, said: str
) -> None:
    before = digest(home / "data/tiny/evaluation")
    rewrite_test(home, answer)
    with pytest.raises(KavaError, match=said):
        call(evaluate, home)
    assert digest(home / "data/tiny/evaluation") == before


def test_missing_and_foreign_students_are_named(home: Path) -> None:
    about = home / "data/tiny/students/kava/student.json"
    changed = read_json(about)
    changed["fingerprints"]["teacher"] = "f" * 64
    write_json(about, changed)
    with pytest.raises(KavaError, match=r"student kava was made from the teacher ffffffffffff…"):
        call(evaluate, home)
    shutil.rmtree(about.parent)
    with pytest.raises(KavaError, match=r"students/kava is missing\. Run `kava distill kava "):
        call(evaluate, home)


@pytest.mark.parametrize(("student", "latents", "thinking"), [("kava", 4, 3), ("no-cot", 0, 1)])
def test_a_student_is_asked_from_the_command_line(
    made: Path, student: str, latents: int, thinking: int
) -> None:
    folder = made / "data/tiny/students" / student
    row = next(
        row
        for row in pq.read_table(made / "data/tiny/evaluation/predictions.parquet").to_pylist()
        if row["system"] == student
    )
    told = CliRunner().invoke(ask, [str(folder), row["question"], "--json"], catch_exceptions=False)
    found = json.loads(told.stdout)
    assert found["question"] == row["question"]
    assert (found["latents"], found["reasoning_passes"]) == (latents, thinking)
    assert found["passes"] >= thinking
    # `evaluate` stops at 8 tokens here
    assert found["text"].startswith(row["text"].rstrip("\ufffd"))

    assert found["seconds"] > 0 and not found["written_steps"]
    # what the head reads in the hidden states that became the latents
    model, tokenizer = open_student(folder), load_tokenizer(str(folder))
    ids = torch.tensor(TraceEncoder(tokenizer).encode_questions([row["question"]]))
    reasoning = model(
        ids, torch.ones_like(ids), ids[:, :1], torch.ones_like(ids[:, :1]), readout=True
    )
    expected = [] if reasoning.readout is None else reasoning.readout[0].argmax(-1).tolist()
    assert found["thoughts"] == [tokenizer.decode([i]) for i in expected]
    assert len(expected) == latents

    plain = CliRunner().invoke(ask, [str(folder), row["question"]], catch_exceptions=False)
    answer, passes, *decoded = plain.stdout.splitlines()
    assert answer == (found["answer"] or f"(no answer in {found['text']!r})")
    assert passes.startswith(f"{thinking} passes to read")
    assert passes.endswith(" s")
    assert [line.split(":")[0] for line in decoded] == ["latents decode to"] * bool(latents)


def test_a_file_of_questions_is_answered_as_each_is_alone(made: Path, tmp_path: Path) -> None:
    folder = made / "data/tiny/students/kava"
    texts = ["mo has 3 cups . how many ?", "how many ?", "liz has 40 cars . sells 2 . how many ?"]
    rows = [{"question": text, "answer": str(i), "id": f"q{i}"} for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "in.txt").write_text("\n".join(texts))
    short = ["--max-new-tokens", "6", "--compare"]
    encoder = TraceEncoder(load_tokenizer(str(folder)))
    teacher = LatentReasoner.plain(
        load_model(str(made / "data/tiny/teacher")), answer_prompt_ids=[], eos_token_id=encoder.eos
    )
    alone = [json.loads(invoke(folder, text, "--json", *short).stdout) for text in texts]
    out = tmp_path / "out/answers.jsonl"
    invoke(folder, "--file", tmp_path / "in.jsonl", "--out", out, "--batch-size", "2", *short)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    printed = invoke(folder, "--file", tmp_path / "in.txt", *short).stdout.splitlines()
    for row, one, other, given in zip(found, alone, map(json.loads, printed), rows, strict=True):
        assert row.pop("given") == {"answer": given["answer"], "id": given["id"]}
        for told in (row, one, other):
            assert told.pop("seconds") > 0 and told["teacher"].pop("seconds") > 0
        assert row == one == other
        ids = torch.tensor(encoder.encode_questions([row["question"]]))
        written = teacher.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
        assert row["teacher"]["text"] == encoder.tokenizer.decode(written, skip_special_tokens=True)
        assert row["teacher"]["passes"] <= 6


def test_questions_are_typed_one_after_the_other(made: Path) -> None:
    folder = made / "data/tiny/students/no-cot"
    texts = ["mo has 3 cups . how many ?", "how many ?"]
    for end in ("", "\n\nnot asked"):
        told = CliRunner().invoke(
            ask, [str(folder), "--interactive", "--json"], input="\n".join(texts) + end
        )
        assert told.exit_code == 0
        lines = [json.loads(line) for line in told.stdout.splitlines() if line.strip()]
        assert [line["question"] for line in lines] == texts


def test_a_student_that_keeps_its_chain_writes_its_steps(home: Path) -> None:
    folder, question = home / "data/tiny/students/kava", "mo has 3 cups . how many ?"
    with pytest.raises(KavaError, match="was trained with w_cot 0: it never learnt to write"):
        invoke(folder, question, "--write-steps")
    about = read_json(folder / "student.json")
    about["settings"]["w_cot"] = 1.0
    write_json(folder / "student.json", about)
    found = json.loads(invoke(folder, question, "--write-steps", "--json").stdout)
    encoder = TraceEncoder(load_tokenizer(str(folder)))
    ids = torch.tensor(encoder.encode_questions([question]))
    bare = load_model(str(folder))
    for _ in range(found["passes"]):
        ids = torch.cat((ids, bare(ids).logits[:, -1:].argmax(-1)), 1)
    written = ids[0, -found["passes"] :]
    assert found["text"] == encoder.tokenizer.decode(written, skip_special_tokens=True)
    assert found["written_steps"] and found["thoughts"] == []
    lines = invoke(folder, question, "--write-steps").stdout.splitlines()
    assert "passes to write its steps" in lines[1] and lines[2].startswith("steps: ")


def test_options_that_mean_nothing_and_wrong_files_are_refused(home: Path) -> None:
    folder, file = home / "data/tiny/students/kava", home / "questions.jsonl"
    question = "how many ?"
    file.write_text('{"question": "how many ?"}\n{"problem": "x"}\n')
    (home / "empty.txt").write_text("\n")
    other = home / "data/tiny/other"
    shutil.copytree(home / "data/tiny/students/no-cot", other)
    for arguments, said in (
        ([], "expected one of QUESTION, --interactive and --file, found none"),
        ([question, "--interactive"], "found several"),
        ([question, "--out", "x.jsonl"], "--out is for the questions of --file"),
        ([question, "--batch-size", "3"], "--batch-size is for the questions of --file"),
        (["--file", file, "--json"], "--json says nothing with --file"),
        (["--file", file], r"questions\.jsonl:2: expected a text in `question`, found no such"),
        (["--file", home / "empty.txt"], "holds no question"),
        (["--file", home / "none.txt"], "is missing"),
        ([question, "--compare", other], "was made from the teacher"),
    ):
        with pytest.raises(KavaError, match=said):
            invoke(folder, *arguments)


def invoke(folder: Path, *arguments: Any) -> Any:
    return CliRunner().invoke(ask, [str(folder), *map(str, arguments)], catch_exceptions=False)


def test_the_page_and_the_example_are_true(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    page = (ROOT / "docs/students.md").read_text(encoding="utf-8")
    shown = "".join(re.findall(r"```python\n(.*?)```", page, re.S))
    folder = made / "data/tiny/students/kava"
    names: dict[str, Any] = {}
    exec(shown.replace("data/quickstart/students/kava", str(folder)), names)
    assert names["tokenizer"].padding_side == "left"
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    (told,) = pipe(names["asked"][0], return_full_text=False)
    (answer,) = names["tokenizer"].batch_decode(names["answers"], skip_special_tokens=True)
    assert told["generated_text"].strip() == answer.strip()
    assert repr([answer]) in capsys.readouterr().out

    example = runpy.run_path(str(ROOT / "examples/use_a_student.py"))
    capsys.readouterr()
    example["main"](made / "data/tiny", "kava", 3)
    lines = capsys.readouterr().out.splitlines()
    asked = pq.read_table(made / "data/tiny/evaluation/predictions.parquet").to_pylist()
    texts = {r["question"]: r["text"] for r in asked if r["system"] == "kava"}
    for question, answer in zip(lines[:-1:2], lines[1:-1:2], strict=True):
        assert answer.strip().startswith(texts[question].strip().rstrip("\ufffd"))


def test_what_is_no_student_or_no_question_is_refused(home: Path) -> None:
    data = home / "data/tiny"
    shutil.rmtree(data / "problems")
    (data / "problems").mkdir()
    (data / "students/no-cot/model.safetensors").write_bytes(b"damaged")
    for folder, question, said in (
        (data / "nowhere", "How many?", "nowhere is no folder"),
        (data / "problems", "How many?", "is no student: .* found no model"),
        (data / "teacher", "How many?", "is no student: .* found a model of type llama"),
        (data / "students/no-cot", "How many?", "no student could be loaded from"),
        (data / "students/kava", " ", "expected a question, found nothing"),
    ):
        with pytest.raises(KavaError, match=said):
            ask.main([str(folder), question], standalone_mode=False)


def test_dvc_shows_few_metrics_readable_experiments_and_plots(home: Path) -> None:
    shutil.copytree(ROOT / ".dvc/plots", home / ".dvc/plots")
    shutil.copy(ROOT / ".dvc/config", home / ".dvc/config")
    _, settings = load_pipeline(home / "pipelines.yaml")
    for file, text in project_files({"tiny": settings}).items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text(text)
    project = Project(home)
    project.run("git", "init", "-q")
    (home / ".gitignore").write_text("/data\n")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Start")

    def told(*command: str) -> list[str]:
        """Lines that dvc prints; what it says of stages that were not run here left out."""
        lines = project.run("dvc", *command).splitlines()
        return [line for line in lines if line.startswith(("{", "Experiment"))]

    shown = json.loads(told("metrics", "show", "--json")[0])[""]["data"]
    summary = read_json(home / "data/tiny/evaluation/summary.json")
    assert shown["data/tiny/evaluation/summary.json"]["data"] == summary
    (line,) = told("exp", "show", "--csv")
    metrics = [column for column in line.split(",") if column.startswith(("bare.", "synthetic."))]
    assert sorted(metrics) == [
        f"{test_set}.{name}"
        for test_set in ("bare", "synthetic")
        for name in ("kava", "no-cot", "teacher-cot", "teacher-no-cot")
    ]
    plots = json.loads(told("plots", "show", "--json")[0])["data"]
    drawn = {title: plot[0]["content"]["data"]["values"] for title, plot in plots.items() if plot}
    for title, name in (
        ("exact match of the systems", "systems.json"),
        ("exact match by number of steps", "steps.json"),
    ):
        rows = [{k: v for k, v in row.items() if k != "rev"} for row in drawn[title]]
        assert rows == read_json(home / "data/tiny/evaluation/plots" / name)

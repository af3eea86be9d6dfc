"""Latents for a part of the trace: from the setting to a student that writes the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from kava_core.distill.batches import TargetsDataset, writes_rest
from kava_core.distill.match import Match
from kava_core.distill.terms import student_terms
from kava_core.evaluation.asking import ask
from kava_core.evaluation.perplexity import gold_nll
from kava_core.models.students import open_student
from kava_core.models.teacher_pass import TeacherPass
from kava_core.problems.folder import open_problems
from kava_core.problems.records import Problem
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.store import TargetsStore, TeacherStore
from tests.distill.toy import toy_objective
from tests.evaluation.talker import make_encoder, make_talker, problems
from tests.tiny import EOS, PROMPT, assert_near, pad, tiny_model, tiny_student, tiny_trace

SPLITS = Synthetic(steps=(2, 5)).splits(40, 8, 8, seed=0)
TOKENIZER = train_tokenizer((p.question + "".join(p.steps) for p in SPLITS.train), 320)
WHOLE = TraceEncoder(TOKENIZER)


@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_a_trace_is_cut_at_the_border_of_a_step(fraction: float) -> None:
    encoder = TraceEncoder(TOKENIZER, latent_fraction=fraction)
    for problem in SPLITS.train:
        trace, whole = encoder.encode(problem), WHOLE.encode(problem)
        tenths, steps = round(10 * fraction), len(problem.steps)
        cut = -(-tenths * steps // 10)
        prompt = len(WHOLE.answer_prompt_ids)
        assert TOKENIZER.decode(trace.cot_ids) == "".join(problem.steps[:cut])
        assert TOKENIZER.decode(trace.answer_prompt_ids[:-prompt]) == "".join(problem.steps[cut:])
        assert trace.answer_prompt_ids[-prompt:] == WHOLE.answer_prompt_ids
        assert (trace.question_ids, trace.answer_ids) == (whole.question_ids, whole.answer_ids)
        if fraction == 1:
            assert trace == whole


def test_a_single_step_is_never_cut() -> None:
    problem = Problem("p", "How many?", ("<<1+1=2>>",), "2", "hand", "")
    assert TraceEncoder(TOKENIZER, latent_fraction=0.2).encode(problem) == WHOLE.encode(problem)


def test_the_teacher_reads_the_same_sequence_and_ends_at_the_same_place() -> None:
    whole = tiny_trace("a", question=5, cot=9, answer=3)
    part = replace(
        whole,
        cot_ids=whole.cot_ids[:4],
        answer_prompt_ids=whole.cot_ids[4:] + whole.answer_prompt_ids,
    )
    teacher = TeacherPass(tiny_model("llama"))
    expected, found = teacher([whole]), teacher([part])
    assert torch.equal(found.endpoint, expected.endpoint)
    assert torch.equal(found.keys, expected.keys[:4])
    assert torch.equal(found.values, expected.values[:4])


@pytest.mark.parametrize("reasoning", ["jacobi", "sequential"])
def test_a_student_that_writes_the_rest_is_one_whose_prompt_is_the_rest(reasoning: str) -> None:
    """Reference: alone, the rest as a fixed prompt, which puts the endpoint at its end."""
    rests = [[9, 10, 11], [], [12]]
    answers = [[20, EOS], [21, 22, 23, EOS], [24, EOS]]
    questions = [[30, 31], [32, 33, 34, 35], [36]]
    rows = [[*rest, *PROMPT, *answer] for rest, answer in zip(rests, answers, strict=True)]
    lengths = torch.tensor([len(rest) + len(PROMPT) for rest in rests])
    student = tiny_student("llama", answer_prompt_ids=[], reasoning=reasoning)
    found = student(*pad(questions, "left"), *pad(rows), prompt_lengths=lengths)
    for i, (rest, answer) in enumerate(zip(rests, answers, strict=True)):
        alone = tiny_student("llama", answer_prompt_ids=[*rest, *PROMPT], reasoning=reasoning)
        expected = alone(*pad([questions[i]]), *pad([answer]))
        assert_near(found.endpoint[i : i + 1], expected.endpoint)
        span = slice(int(lengths[i]), int(lengths[i]) + len(answer))
        assert_near(found.logits[i : i + 1, span], expected.logits[:, :-1])
        for ours, theirs in zip(found.keys, expected.keys, strict=True):
            assert_near(ours[i : i + 1], theirs)


@torch.no_grad()
def test_the_gold_answer_is_behind_the_latents_and_what_was_written() -> None:
    encoder = make_encoder()
    student = make_talker(encoder)
    student.config.answer_prompt_ids = []
    todo = [replace(p, answer=str(i)) for i, p in enumerate(problems())]
    predictions = ask(student, encoder, todo, batch_size=5, max_new_tokens=6)
    found = gold_nll(student, encoder, todo, predictions, batch_size=5)
    for problem, prediction, row in zip(todo, predictions, found, strict=True):
        ids = torch.tensor(encoder.encode_questions([problem.question]))
        (answer,) = encoder.encode_answers([problem.answer])
        own = [token for token in prediction.written if token != encoder.eos]
        expected = []
        for i, token in enumerate(answer):
            read = torch.tensor([[*own, *encoder.answer_prompt_ids, *answer[:i]]])
            logits = student(ids, torch.ones_like(ids), read, torch.ones_like(read)).logits[0, -1]
            expected.append(-float(logits.double().log_softmax(-1)[token]))
        assert row == pytest.approx(expected, abs=1e-4)


TRAINING = {"batch_size": 8, "learning_rate": 1e-3, "threads": 1}
PIPELINE: dict[str, Any] = {
    "prepare": {
        "source": {"name": "synthetic", "steps": [2, 5]},
        "train": 24,
        "validation": 4,
        "test": 4,
    },
    "teacher": {
        "scratch": {
            "vocabulary": 300,
            "hidden_size": 16,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "intermediate_size": 16,
        },
        "training": {**TRAINING, "steps": 2},
        "validate_on": 2,
        "max_new_tokens": 4,
    },
    "generate": {"shard_size": 16, "batch_size": 8},
    "evict": {"budget": 4},
    "students": {
        "kava": {
            "reads": "kv_targets",
            "alpha_kv": 1.0,
            "alpha_codi": 1.0,
            "training": {**TRAINING, "steps": 3},
        },
        "no-cot": {"reads": "problems", "training": {**TRAINING, "steps": 3}},
    },
    "evaluate": {"max_new_tokens": 4, "similarity_records": 8, "threads": 1},
    "report": {"title": "A test"},
    "cadence": {"log_every": 2, "save_every": 4},
    "resources": {"workers": 0},
}


def stages(folder: Path, fraction: float | None, *names: str) -> Path:
    """Run stages one after the other; the pipeline's folder."""
    from stages.cli import kava

    generate = PIPELINE["generate"] | ({} if fraction is None else {"latent_fraction": fraction})
    folder.mkdir(exist_ok=True)
    file = folder / "pipelines.yaml"
    file.write_text(yaml.safe_dump({"pipelines": {"one": {**PIPELINE, "generate": generate}}}))
    options = ["--pipeline", "one", "--pipelines", str(file), "--data", str(folder / "data")]
    for name in names:
        result = CliRunner(catch_exceptions=False).invoke(kava, [*name.split(), *options])
        assert result.exit_code == 0, result.output
    return folder / "data/one"


def test_from_the_setting_to_answers(tmp_path: Path) -> None:
    data = stages(
        tmp_path, 0.5,
        "prepare", "teacher", "generate", "evict", "distill kava", "distill no-cot", "evaluate",
    )  # fmt: skip
    source = open_problems(data / "problems")
    student, tokenizer = open_student(data / "students/kava"), WHOLE.tokenizer
    encoder = TraceEncoder(tokenizer.from_pretrained(data / "teacher"), "equations", 0.5)
    expected = {trace.id: trace for trace in encoder.encode_all(source.load("train"))}
    store = TargetsStore.open(data / "kv_targets")
    assert writes_rest(store)
    assert student.config.answer_prompt_ids == []
    assert open_student(data / "students/no-cot").config.answer_prompt_ids == (
        encoder.answer_prompt_ids
    )
    batch = TargetsDataset(store, chains=False).__getitems__(list(range(24)))
    cut = 0
    for i, name in enumerate(batch["ids"]):
        trace: Record = expected[name]
        record = store.index.record(i)
        assert (record.cot_ids, record.n_steps) == (trace.cot_ids, trace.n_steps)
        row = batch["answer_ids"][i][batch["answer_mask"][i].bool()].tolist()
        assert row == trace.answer_prompt_ids + trace.answer_ids
        end = int(batch["prompt_lengths"][i])
        assert row[:end][-len(encoder.answer_prompt_ids) :] == encoder.answer_prompt_ids
        assert row[end:] == trace.answer_ids
        cut += len(trace.answer_prompt_ids) > len(encoder.answer_prompt_ids)
    assert cut > 12
    terms = student_terms(toy_objective(store), Match.of(store))(student, batch)
    assert all(bool(term.isfinite()) for term in terms.values())
    metrics = json.loads((data / "evaluation/metrics.json").read_text())
    assert metrics["synthetic"]["kava"]["n"] == 4


def test_the_whole_trace_is_what_there_was_without_the_setting(tmp_path: Path) -> None:
    names = ("prepare", "teacher", "generate", "evict")
    one, none = stages(tmp_path / "a", 1.0, *names), stages(tmp_path / "b", None, *names)
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert [file for file in files if (one / file).read_bytes() != (none / file).read_bytes()] == []
    store = TargetsStore.open(one / "kv_targets")
    assert not writes_rest(store)
    assert "latent_fraction" not in store.manifest.settings


def test_another_fraction_makes_another_store_of_the_same_problems(tmp_path: Path) -> None:
    names = ("prepare", "teacher", "generate")
    found = [stages(tmp_path / str(fraction), fraction, *names) for fraction in (0.5, 1.0)]
    problems = [open_problems(data / "problems").fingerprint("train") for data in found]
    stores = [TeacherStore.open(data / "teacher_kv").manifest.digest for data in found]
    assert problems[0] == problems[1]
    assert stores[0] != stores[1]

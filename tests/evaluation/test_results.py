"""Examinations in numbers and in files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kava_core.artefacts import write_json
from kava_core.evaluation.asking import Reply
from kava_core.evaluation.comparison import Comparison
from kava_core.evaluation.examination import Examination
from kava_core.evaluation.parts import Memory, Part
from kava_core.evaluation.perplexity import perplexity
from kava_core.evaluation.results import cost, costs_of, harness_scores, score, write_results
from kava_core.findings.evaluation import Prediction
from kava_core.findings.scores import GroupScore, wilson
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import examine, some, system
from tests.stages.project import digest

FILES = [
    "comparisons.json",
    "lm_eval.json",
    "metrics.json",
    "plots/steps.json",
    "plots/systems.json",
    "predictions.parquet",
    "similarity.json",
    "summary.json",
]


def answered(problem: Problem, correct: bool) -> Reply:
    return Reply(problem.id, (7, 2), problem.answer, problem.answer, correct, 3, 0.25)


def examined(encoder: TraceEncoder) -> Examination:
    marks = [i < 6 for i in range(12)]
    return Examination(
        [answered(p, mark) for p, mark in zip(some(encoder).problems, marks, strict=True)],
        [[0.5, 1.5]] * 11 + [[4.0]],
        3_500_000,
        {"processor": "one"},
    )


def test_a_score_counts_answers_passes_tokens_surprise_and_the_kinds_of_problem(
    encoder: TraceEncoder,
) -> None:
    examination = examined(encoder)
    found = score(examination, some(encoder))
    assert (found.exact_match, found.n, found.ci95) == (50, 12, wilson(6, 12))
    assert (found.forward_passes, found.tokens) == (3, 2)
    assert found.perplexity == pytest.approx(perplexity(examination.nll))
    assert {steps: part.n for steps, part in found.by_steps.items()} == {0: 4, 1: 4, 2: 4}
    assert found.by_operation == {
        sign: GroupScore(exact_match=50.0, n=4) for sign in ("none", "÷", "+", "−")
    }
    lengths = found.by_trace_length
    assert sum(part.n for part in lengths.values()) == 12 and lengths["none"].n == 4


def test_means_are_computed_by_hand(encoder: TraceEncoder) -> None:
    examination = examined(encoder)
    changed = [
        replace(reply, passes=i, written=(1,) * (1 + i), seconds=0.1 * i)
        for i, reply in enumerate(examination.replies)
    ]
    examination = replace(examination, replies=changed)
    found = score(examination, some(encoder))
    assert (found.forward_passes, found.tokens) == (5.5, 6.5)
    assert cost(examination).seconds_per_problem == pytest.approx(0.55)


def test_a_system_that_answers_one_thing_is_found_out(encoder: TraceEncoder) -> None:
    examination, plain = examined(encoder), some(encoder)
    golds = [str(i % 6) for i in range(12)]
    varied = [replace(p, answer=a) for p, a in zip(plain.problems, golds, strict=True)]
    problems = replace(plain, problems=varied)
    said = ["4"] * 10 + ["", "9"]
    replies = [replace(r, answer=a) for r, a in zip(examination.replies, said, strict=True)]
    stuck = score(replace(examination, replies=replies), problems).commonest_answer
    assert stuck is not None and stuck.collapsed
    assert (stuck.answer, stuck.share, stuck.gold) == ("4", 1000 / 12, 200 / 12)
    every = score(examination, plain).commonest_answer  # right, and all have the same gold answer
    assert every is not None and every.share == 100 and not every.collapsed
    silent = [replace(reply, answer="") for reply in replies]
    assert score(replace(examination, replies=silent), problems).commonest_answer is None


def test_the_same_answers_are_scored_by_the_rules_of_another_harness(
    encoder: TraceEncoder,
) -> None:
    toy = some(encoder)
    texts = [
        f"#### {p.answer}." if i < 3 else f"$ {p.answer}, so" for i, p in enumerate(toy.problems)
    ]
    examination = examined(encoder)
    replies = [replace(r, text=text) for r, text in zip(examination.replies, texts, strict=True)]
    found = {"toy": {"kava": replace(examination, replies=replies)}}
    assert harness_scores(found, [toy]) == {
        "toy": {"kava": {"strict-match": 25.0, "flexible-extract": 100.0}}
    }


def test_costs_are_apart(encoder: TraceEncoder) -> None:
    here = examined(encoder)
    there = replace(here, hardware={"processor": "two", "accelerator": "large"})
    found = costs_of({"toy": {"kava": here, "no-cot": there}, "other": {"kava": here}})
    assert found.hardware == {"processor": "one, two", "accelerator": "large"}
    assert found.systems["toy"]["kava"].seconds_per_problem == 0.25
    assert found.systems["toy"]["kava"].peak_memory_mb == 3.5


def test_what_was_kept_before_machines_were_written_down_is_kept(tmp_path: Path) -> None:
    part = Part("memory", "kava", tmp_path / "memory.json", "toy")
    write_json(part.file, {"peak_bytes": 5})
    assert part.is_finished and part.read(Memory).hardware == {}


def test_the_files_hold_every_system_on_every_set(
    encoder: TraceEncoder, talker: LatentReasoner, tmp_path: Path
) -> None:
    sets = [some(encoder), replace(some(encoder), name="other")]
    systems = {"teacher-cot": "with a chain", "kava": "latent", "no-cot": "at once"}
    examinations = {
        test_set.name: {
            name: examine(
                system(talker, encoder, kind), encoder, test_set, batch_size=5, max_new_tokens=6
            )
            for name, kind in systems.items()
        }
        for test_set in sets
    }
    (tmp_path / "one").mkdir()
    scores = write_results(tmp_path / "one", sets, Comparison(examinations), ["kava", "no-cot"])
    assert sorted(digest(tmp_path / "one")) == FILES
    read = {
        name: json.loads((tmp_path / "one" / name).read_text()) for name in FILES if "json" in name
    }
    assert {name: list(entries) for name, entries in read["metrics.json"].items()} == {
        name: list(systems) for name in ("toy", "other")
    }
    assert read["summary.json"] == {
        name: {s: pytest.approx(entry.exact_match, abs=0.01) for s, entry in entries.items()}
        for name, entries in scores.items()
    }
    for name in ("toy", "other"):
        compared = read["comparisons.json"][name]
        assert {s: sorted(others) for s, others in compared.items()} == {
            "kava": ["no-cot", "teacher-cot"],
            "no-cot": ["kava", "teacher-cot"],
        }
        gained = scores[name]["kava"].exact_match - scores[name]["no-cot"].exact_match
        assert compared["kava"]["no-cot"]["difference"] == pytest.approx(gained)
    assert len(read["plots/systems.json"]) == 6
    assert {row["steps"] for row in read["plots/steps.json"]} == {0, 1, 2}

    rows = pq.read_table(tmp_path / "one/predictions.parquet").to_pylist()
    assert len(rows) == 2 * 3 * 12
    row = rows[2]
    first, problem = examinations["toy"]["teacher-cot"].replies[2], sets[0].problems[2]
    assert list(row) == list(Prediction.model_fields)
    assert (row["question"], row["gold"]) == (problem.question, problem.answer)
    assert (row["n_steps"], row["topic"]) == (len(problem.steps), problem.topic)
    assert (row["text"], row["answer"], row["tokens"]) == (first.text, first.answer, first.tokens)
    assert row["operations"] == ["+", "−"] and row["trace_tokens"] == sets[0].trace_tokens[2]
    nll = examinations["toy"]["teacher-cot"].nll[2]
    assert row["answer_tokens"] == len(nll) and row["nll"] == pytest.approx(sum(nll) / len(nll))

    slower = {
        name: {
            s: replace(
                e, peak_bytes=1, replies=[replace(r, seconds=9 * r.seconds) for r in e.replies]
            )
            for s, e in found.items()
        }
        for name, found in examinations.items()
    }
    (tmp_path / "two").mkdir()
    write_results(tmp_path / "two", sets, Comparison(slower), ["kava", "no-cot"])
    assert digest(tmp_path / "one") == digest(tmp_path / "two")

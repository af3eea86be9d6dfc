"""What a system did with a test set, in numbers, in files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig

from kava_core.errors import KavaError
from kava_core.evaluation.accuracy import Prediction
from kava_core.evaluation.perplexity import perplexity
from kava_core.evaluation.results import Examined, ProblemSet, examine, score, write_results
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import problems, system
from tests.tiny import COMMON, tiny_model

FILES = [
    "accuracy.json",
    "accuracy_by_steps.json",
    "comparisons.json",
    "metrics.json",
    "predictions.parquet",
    "summary.json",
]


def some(encoder: TraceEncoder) -> ProblemSet:
    chains = [(), ("<<4/2=2>>",), ("<<9-4=5>>", "<<5+5=10>>")]
    return ProblemSet.of(
        "toy", [replace(p, steps=chains[i % 3]) for i, p in enumerate(problems())], encoder
    )


def answered(problem: Problem, correct: bool) -> Prediction:
    steps, gold = len(problem.steps), problem.answer
    return Prediction(problem.id, steps, "t", gold, (7, 2), gold, gold, correct, 3, 0.25)


def test_a_set_knows_what_its_traces_are_like(encoder: TraceEncoder) -> None:
    found = some(encoder)
    assert found.operations[:3] == [["none"], ["÷"], ["+", "−"]]
    assert found.trace_tokens[0] == 0
    assert found.trace_tokens[2] == len(encoder.encode(found.problems[2]).cot_ids)


def test_a_score_adds_surprise_memory_and_the_kinds_of_problem(encoder: TraceEncoder) -> None:
    test_set = some(encoder)
    marks = [i < 6 for i in range(12)]
    examined = Examined(
        [answered(p, mark) for p, mark in zip(test_set.problems, marks, strict=True)],
        [[0.5, 1.5]] * 11 + [[4.0]],
        3_500_000,
    )
    entry = score(examined, test_set)
    assert entry["exact_match"] == 50 and entry["n"] == 12
    assert entry["perplexity"] == pytest.approx(perplexity(examined.nll))
    assert entry["peak_memory_mb"] == 3.5
    assert {label: part["n"] for label, part in entry["by_steps"].items()} == {
        "0": 4,
        "1": 4,
        "2": 4,
    }
    assert entry["by_operation"] == {
        sign: {"exact_match": 50.0, "n": 4} for sign in ("none", "÷", "+", "−")
    }
    lengths = entry["by_trace_length"]
    assert sum(part["n"] for part in lengths.values()) == 12 and lengths["none"]["n"] == 4


def test_every_kind_of_system_is_examined(encoder: TraceEncoder, talker: LatentReasoner) -> None:
    test_set = some(encoder)
    advanced: list[int] = []
    peaks = {}
    for kind in ("latent", "at once", "with a chain"):
        asked = system(talker, encoder, kind)
        found = examine(
            asked, encoder, test_set, batch_size=5, max_new_tokens=6, advance=advanced.append
        )
        assert [p.id for p in found.predictions] == [p.id for p in test_set.problems]
        assert [len(row) for row in found.nll] == [len(encoder.encode_answers(["5"])[0])] * 12
        peaks[kind] = found.peak_bytes
    assert sum(advanced) == 36
    assert min(peaks.values()) > 0


def test_the_files_hold_every_system_on_every_set(
    encoder: TraceEncoder, talker: LatentReasoner, tmp_path: Path
) -> None:
    sets = [some(encoder), replace(some(encoder), name="other")]
    systems = {"teacher-cot": "with a chain", "kava": "latent", "no-cot": "at once"}
    examined = {
        test_set.name: {
            name: examine(
                system(talker, encoder, kind), encoder, test_set, batch_size=5, max_new_tokens=6
            )
            for name, kind in systems.items()
        }
        for test_set in sets
    }
    metrics = write_results(tmp_path, sets, examined, ["kava", "no-cot"])
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    read = {name: json.loads((tmp_path / name).read_text()) for name in FILES if "json" in name}
    assert read["metrics.json"] == metrics
    assert read["summary.json"] == {
        name: {s: pytest.approx(entry["exact_match"], abs=0.01) for s, entry in entries.items()}
        for name, entries in metrics.items()
    }
    for name in ("toy", "other"):
        compared = read["comparisons.json"][name]
        assert {s: sorted(others) for s, others in compared.items()} == {
            "kava": ["no-cot", "teacher-cot"],
            "no-cot": ["kava", "teacher-cot"],
        }
        gained = metrics[name]["kava"]["exact_match"] - metrics[name]["no-cot"]["exact_match"]
        assert compared["kava"]["no-cot"]["difference"] == pytest.approx(gained)
    assert len(read["accuracy.json"]) == 6
    assert {row["steps"] for row in read["accuracy_by_steps.json"]} == {0, 1, 2}

    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert len(rows) == 2 * 3 * 12
    row = rows[2]
    first = examined["toy"]["teacher-cot"].predictions[2]
    assert row["question"] == sets[0].problems[2].question
    assert (row["text"], row["answer"], row["tokens"]) == (first.text, first.answer, first.tokens)
    assert row["operations"] == ["+", "−"] and row["trace_tokens"] == sets[0].trace_tokens[2]
    nll = examined["toy"]["teacher-cot"].nll[2]
    assert row["answer_tokens"] == len(nll) and row["nll"] == pytest.approx(sum(nll) / len(nll))


def test_what_cannot_be_scored_is_refused_with_name_and_number(encoder: TraceEncoder) -> None:
    with pytest.raises(KavaError, match="test set svamp is empty"):
        ProblemSet.of("svamp", [], encoder)
    words = [replace(p, answer="a banana") for p in problems()]
    with pytest.raises(KavaError, match=r"test set svamp: expected .* none in 12 .*'a banana'"):
        ProblemSet.of("svamp", words, encoder)
    assert ProblemSet.of("svamp", [*words, problems()[0]], encoder).name == "svamp"


def test_a_problem_beyond_the_context_is_named(encoder: TraceEncoder) -> None:
    test_set = some(encoder)
    vocabulary = len(encoder.tokenizer)
    short = tiny_model(
        LlamaConfig(**{**COMMON, "vocab_size": vocabulary, "max_position_embeddings": 16})
    )
    asked = LatentReasoner.plain(short, answer_prompt_ids=[], eos_token_id=encoder.eos)
    with pytest.raises(KavaError, match=r"toy, problem p\d+ takes \d+ positions .* context is 16"):
        examine(asked, encoder, test_set, batch_size=5, max_new_tokens=6)


@pytest.mark.parametrize("kind", ["at once", "with a chain"])
def test_learned_positions_bound_what_may_be_written(encoder: TraceEncoder, kind: str) -> None:
    from transformers import GPT2Config

    model = tiny_model(
        GPT2Config(
            vocab_size=len(encoder.tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64
        )
    )
    prompt = encoder.answer_prompt_ids if kind == "at once" else []
    asked = LatentReasoner.plain(model, answer_prompt_ids=prompt, eos_token_id=encoder.eos)
    examine(asked, encoder, some(encoder), batch_size=5, max_new_tokens=5)
    with pytest.raises(KavaError, match=r"lower evaluate\.max_new_tokens"):
        examine(asked, encoder, some(encoder), batch_size=5, max_new_tokens=64)

"""Chains of thought that the teacher writes: which are kept, how many, and that they are the same
ones whoever writes them."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

from kava_core.artefacts import fresh_folder, write_json
from kava_core.distill.batches import ChainDataset
from kava_core.errors import KavaError
from kava_core.models.loading import save_model
from kava_core.problems import parquet
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.prompt import Prompt
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Generate, Resources, Traces
from kava_core.store import TeacherStore
from kava_core.targets import traces
from kava_core.targets.generate import build_teacher_kv
from kava_core.targets.reading import Reading
from kava_core.targets.traces import WriteJob, Written, build_traces
from tests.problems.test_folder import without_problems
from tests.stages.project import digest
from tests.tiny import COMMON, tiny_model

SPLITS = Synthetic(steps=(2, 2), max_operand=9).splits(12, 2, 1, seed=0, traces="equations")
KNOWN = 8  # of the problems the teacher has learnt by heart
MISTAKEN = replace(SPLITS.train[KNOWN], answer="7")  # and this one wrong
TOKENIZER = train_tokenizer((p.question + "".join(p.steps) for p in SPLITS.train), 300)
IN_PROCESS = Resources(workers=0)
DRAWN = Traces(samples=4, temperature=1.0, max_new_tokens=48, shard_size=5, batch_size=6)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """A tiny Llama that knows the chains of some problems, and writes nonsense to others."""
    config = LlamaConfig(**{**COMMON, "vocab_size": len(TOKENIZER), "hidden_size": 64})
    torch.manual_seed(0)
    model = tiny_model(config, torch.float32).train()
    records = TraceEncoder(TOKENIZER).encode_all([*SPLITS.train[:KNOWN], MISTAKEN])
    batch = ChainDataset(records).__getitems__(list(range(len(records))))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(
            batch["input_ids"],
            attention_mask=batch["mask"],
            labels=batch["input_ids"].masked_fill(batch["taught"] == 0, -100),
        ).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture
def inputs(tmp_path: Path, teacher: PreTrainedModel) -> Path:
    """A folder with problems/ and teacher/."""
    write_problems(tmp_path / "problems", SPLITS, "equations", {})
    save_model(tmp_path / "teacher", teacher, TOKENIZER)
    return tmp_path


def written(inputs: Path, settings: Traces, resources: Resources = IN_PROCESS) -> Written:
    output = inputs / "data/one/traces"
    return build_traces(inputs / "problems", inputs / "teacher", settings, output, resources)


def test_the_likeliest_chain_is_kept_where_its_answer_is_right(inputs: Path) -> None:
    found = written(inputs, Traces(max_new_tokens=48))
    kept = open_problems(found.folder).load("train")
    given = {problem.id: problem for problem in SPLITS.train}
    assert KNOWN - 1 <= len(kept) < len(SPLITS.train)
    for problem in kept:
        assert replace(problem, steps=given[problem.id].steps) == given[problem.id]
    known = {problem.id for problem in SPLITS.train[:KNOWN]}
    assert sum(p.steps == given[p.id].steps for p in kept if p.id in known) >= KNOWN - 1
    assert open_problems(found.folder).load("validation") == SPLITS.validation


def test_every_chain_is_counted(inputs: Path) -> None:
    found = written(inputs, DRAWN)
    metrics = json.loads((found.folder / "metrics.json").read_text())
    rows = pq.read_table(found.folder / "written.parquet").to_pylist()
    assert len(rows) == sum(metrics["chains"].values()) == 4 * len(SPLITS.train)
    for outcome, count in metrics["chains"].items():
        assert sum(row["outcome"] == outcome for row in rows) == count
    kept = open_problems(found.folder).load("train")
    assert metrics["train"]["problems"] == metrics["chains"]["kept"] == len(kept)
    without = {p.id for p in SPLITS.train} - {p.id.rpartition("~")[0] for p in kept}
    assert metrics["without"] == len(without) > 0
    assert f"{len(without)} of {len(SPLITS.train)} problems are left without one" in found.told
    assert metrics["chains"]["repeated"] > 0 and metrics["chains"]["wrong answer"] > 0


def test_a_chain_is_kept_once_and_with_the_answer_of_its_problem(inputs: Path) -> None:
    kept = open_problems(written(inputs, DRAWN).folder).load("train")
    answers = {problem.id: problem.answer for problem in SPLITS.train}
    chains = [(problem.id.rpartition("~")[0], problem.steps) for problem in kept]
    assert len(set(chains)) == len(chains)
    assert all(
        problem.answer == answers[name] for problem, (name, _) in zip(kept, chains, strict=True)
    )


def test_the_temperature_and_the_seed_are_heeded(inputs: Path) -> None:
    def texts(**changes: object) -> list[str]:
        settings = Traces.model_validate({**DRAWN.model_dump(), **changes})
        table = pq.read_table(written(inputs, settings).folder / "written.parquet")
        return [str(text) for text in table["text"].to_pylist()]

    first = texts()
    assert texts() == first
    assert texts(seed=1) != first
    assert len(set(first)) > len(set(texts(temperature=0.01))) == len(SPLITS.train)


@pytest.mark.usefixtures("two_cores")
def test_workers_and_a_kill_change_no_byte(inputs: Path) -> None:
    expected = digest(written(inputs, DRAWN).folder)
    shards = sorted((inputs / "data/.work").glob("traces-*/shards/*.json"))
    assert len(shards) == 3
    shards[1].unlink()
    times = [shards[i].stat().st_mtime_ns for i in (0, 2)]
    assert digest(written(inputs, DRAWN, Resources(workers=2)).folder) == expected
    assert [shards[i].stat().st_mtime_ns for i in (0, 2)] == times


@pytest.mark.parametrize("content", [b"", None, b"[]", b"{}", b"[[]]", b"[" * 5000])
def test_a_torn_shard_is_written_again(
    inputs: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = digest(written(inputs, DRAWN).folder)
    shards = sorted((inputs / "data/.work").glob("traces-*/shards/*.json"))
    whole = [shard.read_bytes() for shard in shards]
    shards[1].write_bytes(whole[1][: len(whole[1]) // 2] if content is None else content)
    times = [shards[i].stat().st_mtime_ns for i in (0, 2)]
    capsys.readouterr()
    assert digest(written(inputs, DRAWN).folder) == expected
    assert [shard.read_bytes() for shard in shards] == whole
    assert [shards[i].stat().st_mtime_ns for i in (0, 2)] == times
    said = " ".join(capsys.readouterr().err.split())
    assert f"{shards[1].name} is damaged, and is made again" in said
    assert "2 of 3 shards are finished already" in said


def test_a_worker_reads_no_more_problems_than_those_of_its_shards(inputs: Path) -> None:
    without_problems(inputs / "problems/train.parquet")
    problems, teacher = inputs / "problems", inputs / "teacher"
    for job in (WriteJob(problems, teacher, DRAWN, inputs), Reading(problems, teacher, Generate())):
        work = job.open()
        with pytest.raises(KavaError, match="is not a readable Parquet file"):
            work(0)


def test_the_place_of_questions_is_checked_without_weights(inputs: Path) -> None:
    config = GPT2Config(vocab_size=len(TOKENIZER), n_embd=8, n_layer=1, n_head=1, n_positions=64)
    save_model(inputs / "teacher", tiny_model(config), TOKENIZER)
    (inputs / "teacher/model.safetensors").unlink()
    with pytest.raises(KavaError, match=r"positions with 60 to write \(traces\.max_new_tokens\)"):
        written(inputs, Traces(max_new_tokens=60))


def test_caches_and_students_without_latents_are_of_the_same_chains(inputs: Path) -> None:
    folder = written(inputs, DRAWN).folder
    store = TeacherStore.open(
        build_teacher_kv(
            folder, inputs / "teacher", Generate(), inputs / "data/one/teacher_kv", IN_PROCESS
        ).folder
    )
    source = open_problems(folder)
    records = TraceEncoder(TOKENIZER).encode_all(source.load("train"))
    stored = [record for k in range(store.shards) for record in store.shard(k).records]
    assert [(r.id, r.cot_ids) for r in stored] == [(r.id, r.cot_ids) for r in records]
    assert store.manifest.fingerprints["problems"] == source.fingerprint("train")


def test_nothing_kept_is_an_error_that_says_what_became_of_all(inputs: Path) -> None:
    with pytest.raises(
        KavaError, match=r"0 of 12 chains are kept \(12 no end\); 12 of 12 problems"
    ):
        written(inputs, Traces(max_new_tokens=3))
    assert not (inputs / "data/one/traces").exists()


def test_a_teacher_of_another_prompt_is_refused(inputs: Path) -> None:
    (inputs / "teacher/teacher.json").write_text("{}")
    prompt = Prompt(question="Q: {question}\n")
    write_problems(inputs / "problems", SPLITS, "equations", {}, prompt=prompt)
    with pytest.raises(KavaError, match=r"was made with another `prepare\.prompt`"):
        written(inputs, Traces())


@pytest.mark.parametrize("wrong", [{"samples": 4}, {"seed": 1}])
def test_settings_that_mean_nothing_where_nothing_is_drawn(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="means nothing at `temperature: 0`"):
        Traces.model_validate(wrong)


def test_what_was_written_is_put_together_shard_by_shard(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10 kB of text to each chain, no more than a few shards are held at a time."""
    monkeypatch.setattr(traces, "_GROUP", 8)
    monkeypatch.setattr(parquet, "_GROUP", 8)
    few = replace(SPLITS, train=SPLITS.train[:1])
    many = replace(SPLITS, train=[replace(few.train[0], id=f"p-{i}") for i in range(1000)])
    peaks = []
    for name, splits in (("few", few), ("many", many)):
        problems = inputs / name
        write_problems(problems, splits, "equations", {})
        source = open_problems(problems)
        shards = fresh_folder(inputs / f"shards-{name}")
        for number in range(-(-len(splits.train) // 8)):
            of = splits.train[8 * number : 8 * number + 8]
            chain = {"text": "x" * 10_000, "outcome": "kept", "steps": ["y" * 10_000]}
            write_json(traces.shard_file(shards, number), [[chain] for _ in of])
        tracemalloc.start()
        found = traces._finish(
            fresh_folder(inputs / f"out-{name}"),
            shards,
            source,
            source.open("train"),
            Traces(shard_size=8),
            {},
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.outcomes["kept"] == found.problems == len(splits.train)
    assert peaks[1] < peaks[0] + 2_000_000  # of 20 MB

"""Traces in a mapped file are those of the encoder, and take no memory of the process."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kava_core.errors import KavaError
from kava_core.problems import encoded, traces
from kava_core.problems.encoded import EncodedTraces, write_traces
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder

PROBLEMS = Synthetic().splits(50, 0, 0, seed=0).train


@pytest.fixture(scope="module")
def writer() -> TraceEncoder:
    texts = [text for p in PROBLEMS for text in (p.question + "\n", *p.steps, "The answer is:")]
    return TraceEncoder(train_tokenizer(texts, 400))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (traces, encoded):
        monkeypatch.setattr(module, "PART", 8)


def test_a_mapped_trace_is_the_trace(writer: TraceEncoder, tmp_path: Path) -> None:
    expected = writer.encode_all(PROBLEMS)
    parts = list(writer.encode_parts(iter(PROBLEMS)))
    assert [len(part) for part in parts] == [8] * 6 + [2]
    mapped = write_traces(tmp_path / "traces.arrow", parts)
    for found in (mapped, EncodedTraces(tmp_path / "traces.arrow")):
        assert list(found) == expected and len(found) == 50
        assert found[3:20:4] == expected[3:20:4] and found[-1] == expected[-1]
        for name in ("question_ids", "cot_ids", "answer_prompt_ids", "results"):
            lengths = [len(getattr(record, name)) for record in expected]
            np.testing.assert_array_equal(found.counts(name), lengths)
    with pytest.raises(IndexError):
        mapped[50]
    assert len(write_traces(tmp_path / "none.arrow", [])) == 0


def test_a_process_that_is_handed_the_traces_maps_the_same_file(
    writer: TraceEncoder, tmp_path: Path
) -> None:
    mapped = write_traces(tmp_path / "traces.arrow", writer.encode_parts(PROBLEMS))
    handed = pickle.dumps(mapped)
    assert len(handed) < 1000 and list(pickle.loads(handed)) == list(mapped)


def test_all_that_is_wrong_is_named_however_many_parts_there_are(
    writer: TraceEncoder, tmp_path: Path
) -> None:
    wrong = [replace(p, answer=" ") if i in (3, 20, 49) else p for i, p in enumerate(PROBLEMS)]
    said = []
    for encode in (writer.encode_all, lambda p: list(writer.encode_parts(p))):
        with pytest.raises(KavaError) as error:
            encode(wrong)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert all(wrong[i].id in said[0] for i in (3, 20, 49)) and "2 of 50 others" in said[0]
    with pytest.raises(KavaError):
        write_traces(tmp_path / "traces.arrow", writer.encode_parts(wrong))
    assert list(tmp_path.iterdir()) == []

"""`generate.batch_size: auto`: found by memory, noted, and no byte depends on how it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig

from kava_core.errors import KavaError
from kava_core.models.loading import save_model
from kava_core.models.teacher_pass import TeacherCache, TeacherPass
from kava_core.problems.folder import write_problems
from kava_core.record import Record
from kava_core.settings import Evict, Generate, Resources
from kava_core.targets.build import Build
from kava_core.targets.fitting import longest
from kava_core.targets.generate import build_targets_alone, build_teacher_kv
from tests.stages.project import digest
from tests.targets.test_generate import SPLITS, TOKENIZER
from tests.tiny import COMMON, tiny_model

AUTO = Generate(batch_size="auto", shard_size=8)
IN_PROCESS = Resources(workers=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_problems(folder / "problems", SPLITS, "equations", {})
    model = tiny_model(LlamaConfig(**{**COMMON, "vocab_size": len(TOKENIZER)}), torch.float32)
    save_model(folder / "teacher", model, TOKENIZER)
    return folder


class Memory:
    """Room for `rows` traces at once. asked: how many were read each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        self.rows, self.asked = rows, list[int]()
        read = TeacherPass.__call__

        def limited(teacher: TeacherPass, traces: Sequence[Record]) -> TeacherCache:
            self.asked.append(len(traces))
            if len(traces) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return read(teacher, traces)

        monkeypatch.setattr(TeacherPass, "__call__", limited)


def generated(inputs: Path, home: Path, settings: Generate) -> Build:
    problems, teacher = inputs / "problems", inputs / "teacher"
    return build_teacher_kv(problems, teacher, settings, home / "data/one/teacher_kv", IN_PROCESS)


def test_the_largest_that_fits_is_taken_and_written_down(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch, 3)
    built = generated(inputs, tmp_path / "auto", AUTO)
    assert memory.asked[:3] == [8, 8, 8]  # 64, 32, 16 and 8 are more than a shard has
    assert built.manifest.settings["generate"]["batch_size"] == 2
    by_hand = generated(inputs, tmp_path / "hand", Generate(batch_size=2, shard_size=8))
    assert digest(built.folder) == digest(by_hand.folder)


def test_it_is_looked_for_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart beside something else, or with another number of workers, changes no byte."""
    with monkeypatch.context() as first:
        Memory(first, 2)
        whole = digest(generated(inputs, tmp_path, AUTO).folder)
    (work,) = (tmp_path / "data/.work").glob("teacher_kv-*")
    assert (work / "batch_size.json").read_text() == "2\n"
    for file in (work / "output").iterdir():
        file.unlink()
    memory = Memory(monkeypatch, 100)
    assert digest(generated(inputs, tmp_path, AUTO).folder) == whole
    assert max(memory.asked) == 2


def test_targets_alone_are_made_with_it_too(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, 4)
    found = []
    for size in ("auto", 4):
        settings = Generate.model_validate({"batch_size": size, "shard_size": 8})
        output = tmp_path / str(size) / "data/one/kv_targets"
        built = build_targets_alone(
            inputs / "problems", inputs / "teacher", settings, Evict(budget=3), output, IN_PROCESS
        )
        found.append(digest(built.folder))
    assert found[0] == found[1]


def test_where_nothing_fits_it_says_so(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, 0)
    with pytest.raises(KavaError, match="found no batch that fits the memory of a worker"):
        generated(inputs, tmp_path, AUTO)


def test_other_errors_are_no_lack_of_memory(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(TeacherPass, "__call__", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        generated(inputs, tmp_path, AUTO)


@pytest.mark.parametrize("part", ["question_ids", "cot_ids", "answer_prompt_ids", "answer_ids"])
def test_the_longest_come_first_whichever_part_is_long(part: str) -> None:
    """The answer prompt holds what the student writes of a trace, with `latent_fraction`."""
    short = Record("r", [1], [1], [1], [1], "toy", "", 1)
    traces = [replace(short, **{part: list(range(n))}) for n in (3, 9, 5, 9, 1)]
    assert longest([traces[:2], traces[2:]], 3) == [1, 3, 2]


def test_other_words_are_refused() -> None:
    with pytest.raises(ValidationError):
        Generate.model_validate({"batch_size": "large"})

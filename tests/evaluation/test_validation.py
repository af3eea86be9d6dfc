"""A teacher's validation: in parts, by whoever, and as if it had been asked at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.evaluation.asking import ask, exact_match
from kava_core.evaluation.validation import ValidateJob, validate
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import DTYPES, load_model, save_model
from kava_core.problems.folder import write_problems
from kava_core.problems.splits import ProblemSplits
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Resources, Teacher
from kava_core.settings.base import Dtype
from tests.evaluation.talker import make_encoder, make_talker, problems

IN_PROCESS = Resources(workers=0)
SETTINGS = Teacher(model="some", training=None, batch_size=3, max_new_tokens=6, validate_on=11)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that answers in random digits, and problems of which it is right on some."""
    folder = tmp_path_factory.mktemp("validation")
    encoder = make_encoder()
    model = make_talker(encoder).decoder
    save_model(folder / "teacher", model, encoder.tokenizer)
    replies = ask(at_once(model, encoder), encoder, problems(), batch_size=12, max_new_tokens=6)
    asked = [
        replace(problem, answer=reply.answer) if reply.answer and i % 3 else problem
        for i, (problem, reply) in enumerate(zip(problems(), replies, strict=True))
    ]
    write_problems(folder / "problems", ProblemSplits(*[asked] * 3), "equations", {})
    return folder


def at_once(model: PreTrainedModel, encoder: TraceEncoder) -> LatentReasoner:
    prompt = encoder.answer_prompt_ids
    return LatentReasoner.plain(model, answer_prompt_ids=prompt, eos_token_id=encoder.eos)


def job(home: Path, work: Path, settings: Teacher = SETTINGS) -> ValidateJob:
    return ValidateJob(home / "problems", home / "teacher", settings, work)


def files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_say_what_asking_all_at_once_says(home: Path, tmp_path: Path, dtype: Dtype) -> None:
    asked = job(home, tmp_path, SETTINGS.model_copy(update={"model_dtype": dtype}))
    found = validate(asked, IN_PROCESS)
    model = load_model(str(home / "teacher"), DTYPES[dtype])
    for how, prompt in (("cot", []), ("no_cot", asked.encoder.answer_prompt_ids)):
        system = LatentReasoner.plain(
            model, answer_prompt_ids=prompt, eos_token_id=asked.encoder.eos
        )
        replies = ask(system, asked.encoder, asked.asked, batch_size=3, max_new_tokens=6)
        assert found[f"exact_match_{how}"] == exact_match(replies)
    assert found["n"] == 11 and len(files(tmp_path)) == 2 * 4
    assert 0 < found["exact_match_no_cot"] < 100


def test_the_dtype_is_that_of_the_weights(home: Path, tmp_path: Path) -> None:
    asked = [job(home, tmp_path / d, SETTINGS.model_copy(update={"model_dtype": d}))
             for d in ("float32", "bfloat16")]  # fmt: skip
    for each in asked:
        validate(each, IN_PROCESS)
    assert [each.read(part) for each in asked[:1] for part in each.parts] != [
        each.read(part) for each in asked[1:] for part in each.parts
    ]
    assert "model_dtype" not in SETTINGS.model_dump()
    assert asked[1].settings.model_dump()["model_dtype"] == "bfloat16"


@pytest.mark.usefixtures("two_cores")
def test_nothing_depends_on_who_asks(home: Path, tmp_path: Path) -> None:
    found = [
        (validate(job(home, tmp_path / str(n)), Resources(workers=n)), files(tmp_path / str(n)))
        for n in (0, 1, 2)
    ]
    assert found[0] == found[1] == found[2]


def test_killed_and_run_again_it_asks_for_what_is_missing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = validate(job(home, tmp_path), IN_PROCESS)
    before = files(tmp_path)
    kept = job(home, tmp_path).file(2)
    written = kept.stat().st_mtime_ns
    job(home, tmp_path).file(0).unlink()
    job(home, tmp_path).file(1).write_text('{"answers": {')
    capsys.readouterr()
    assert validate(job(home, tmp_path), IN_PROCESS) == whole
    assert files(tmp_path) == before and kept.stat().st_mtime_ns == written
    said = capsys.readouterr().err
    assert "part-00001.json is damaged, and is made again" in said
    assert "6 of 8 parts of its validation are there" in said


def test_parts_are_of_one_teacher(home: Path, tmp_path: Path) -> None:
    other = make_talker(make_encoder()).decoder
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    save_model(tmp_path / "teacher", other, make_encoder().tokenizer)
    names = {
        ValidateJob.of(home / "problems", folder / "teacher", SETTINGS).work.name
        for folder in (home, tmp_path)
    }
    assert len(names) == 2


def test_without_problems_it_says_so(home: Path, tmp_path: Path) -> None:
    everything = problems()
    splits = ProblemSplits(everything, [], everything)
    write_problems(tmp_path / "problems", splits, "equations", {})
    empty = ValidateJob(tmp_path / "problems", home / "teacher", SETTINGS, tmp_path)
    with pytest.raises(KavaError, match="no validation problems"):
        validate(empty, IN_PROCESS)

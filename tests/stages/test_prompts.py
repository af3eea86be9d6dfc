"""A chat model is taken as it is: one prompt from the settings to what a student is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from transformers import LlamaConfig

from kava_core.artefacts import read_json
from kava_core.errors import KavaError
from kava_core.evaluation.questions import Respondents
from kava_core.models.loading import load_tokenizer, save_model
from kava_core.models.students import open_student
from kava_core.problems.folder import open_problems
from kava_core.store import TargetsStore
from stages.cli import kava
from tests.problems.chats import CHATML, chat_tokenizer
from tests.tiny import COMMON, tiny_model

TRAINING = {"steps": 2, "batch_size": 8, "threads": 1}
PROMPT: dict[str, Any] = {
    "question": "{question} Think.",
    "chat": True,
    "answer": "Answer:",
    "stop": "<|im_end|>",
    "examples": [{"question": "1 and 1 ?", "steps": ["<<1+1=2>>"], "answer": "2"}],
}
KEPT = {"prompt": PROMPT}


def settings(model: Path, prompt: dict[str, Any]) -> dict[str, Any]:
    return {
        "prepare": {
            "source": "synthetic",
            "prompt": prompt,
            "train": 16,
            "validation": 2,
            "test": 2,
        },
        "teacher": {"model": str(model), "training": None, "max_new_tokens": 4},
        "generate": {"shard_size": 16, "batch_size": 8},
        "evict": {"budget": 2},
        "fidelity": {"limit": 2, "policies": ["random"], "budgets": [2], "max_new_tokens": 2},
        "students": {
            "kava": {"reads": "kv_targets", "alpha_kv": 1.0, "training": TRAINING},
            "no-cot": {"reads": "problems", "training": TRAINING},
        },
        "evaluate": {"max_new_tokens": 4, "similarity_records": 8, "threads": 1},
        "report": {"title": "A chat"},
        "resources": {"workers": 0},
    }


def run(folder: Path, *names: str, prompt: dict[str, Any] = PROMPT) -> Path:
    """Run stages one after the other; the pipeline's folder."""
    file = folder / "pipelines.yaml"
    file.write_text(yaml.safe_dump({"pipelines": {"one": settings(folder / "chat", prompt)}}))
    options = ["--pipeline", "one", "--pipelines", str(file), "--data", str(folder / "data")]
    for name in names:
        CliRunner(catch_exceptions=False).invoke(
            kava, [*name.split(), *options], standalone_mode=False
        )
    return folder / "data/one"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose teacher is a chat model that was not trained, with all its stages done."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(eos="<|eos|>")
    config = LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)})
    save_model(folder / "chat", tiny_model(config), tokenizer)
    run(
        folder,
        "prepare", "teacher", "generate", "evict", "fidelity", "distill kava", "distill no-cot",
        "evaluate",
    )  # fmt: skip
    return folder


def test_every_artefact_keeps_the_prompt(home: Path) -> None:
    data = home / "data/one"
    store = TargetsStore.open(data / "kv_targets").manifest
    for about in (
        read_json(data / "problems/problems.json"),
        read_json(data / "test_sets/test_sets.json"),
        read_json(data / "teacher/teacher.json"),
        read_json(data / "students/kava/student.json"),
        read_json(data / "students/no-cot/student.json"),
        store.settings,
    ):
        assert {"prompt": about["prompt"]} == KEPT
    taught = read_json(data / "students/kava/student.json")["fingerprints"]
    assert taught["chat_template"] == store.fingerprints["chat_template"]


def test_all_are_asked_in_the_same_way(home: Path) -> None:
    data = home / "data/one"
    problem = open_problems(data / "problems").load("train")[0]
    turns = [
        {"role": "user", "content": "1 and 1 ? Think."},
        {"role": "assistant", "content": "<<1+1=2>>Answer: 2"},
        {"role": "user", "content": f"{problem.question} Think."},
    ]
    tokenizer = chat_tokenizer()
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    record = TargetsStore.open(data / "kv_targets").index.record(0)
    assert (record.id, record.question_ids) == (problem.id, expected)
    assert record.answer_ids[-1] == stop
    for name in ("kava", "no-cot"):
        student = open_student(data / "students" / name)
        assert student.config.eos_token_id == stop
        assert student.config.answer_prompt_ids == record.answer_prompt_ids
        assert tokenizer.decode(record.answer_prompt_ids) == "Answer:"
        asked = Respondents.of(data / "students" / name, steps=False, teacher=data / "teacher")
        assert asked.encoder.encode_questions([problem.question]) == [expected]
        assert (asked.encoder.eos, asked.encoder.prompt.answer) == (stop, "Answer:")
    said = CliRunner(catch_exceptions=False).invoke(
        kava, ["ask", str(data / "students/kava"), problem.question, "--json"]
    )
    assert json.loads(said.stdout)["question"] == problem.question


def test_another_prompt_is_refused_until_what_learnt_it_is_made_again(home: Path) -> None:
    data = home / "data/one"
    with pytest.raises(KavaError, match="was made with another") as error:
        run(home, "prepare", "generate", prompt={**PROMPT, "answer": "####"})
    said = 'expected {"answer": "####"}, found {"answer": "Answer:"}. Run `kava teacher` again.'
    assert f"{data / 'teacher'} was made with another `prepare.prompt`: {said}" in str(error.value)
    for stage in ("evaluate", "fidelity", "distill no-cot"):
        with pytest.raises(KavaError, match=r"another `prepare\.prompt`"):
            run(home, stage, prompt={**PROMPT, "answer": "####"})
    run(home, "prepare")


def test_another_chat_template_is_refused(home: Path) -> None:
    teacher = home / "data/one/teacher"
    tokenizer = load_tokenizer(str(teacher))
    tokenizer.chat_template = CHATML + " "
    kept = (teacher / "chat_template.jinja").read_bytes()
    tokenizer.save_pretrained(teacher)
    with pytest.raises(KavaError, match="were written by another chat template"):
        run(home, "distill kava")
    with pytest.raises(KavaError, match="student kava learnt from another chat template"):
        run(home, "evaluate")
    (teacher / "chat_template.jinja").write_bytes(kept)
    run(home, "evaluate")

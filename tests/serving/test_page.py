"""docs/serving.md says what there is, and its example runs."""

from __future__ import annotations

import re

import pytest

from kava_core.serving.bodies import Chat, Completion
from stages.serve import TOKEN, serve
from tests.serving.conftest import NAME, QUESTIONS, Running
from tests.stages.project import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
# Accepted at the value that asks for nothing.
NEUTRAL = {"frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "tools"} | {
    *("response_format", "best_of", "echo", "suffix", "top_logprobs", "store", "metadata")
}


def test_it_names_every_option_and_every_field() -> None:
    for option in serve.params:
        if option.opts[0].startswith("--"):
            assert f"{option.opts[0]}" in PAGE
    assert TOKEN in PAGE
    fields = {*Chat.model_fields, *Completion.model_fields} - NEUTRAL - {"model"}
    for field in fields:
        assert field in PAGE, field


def test_its_example_runs(student: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```py\n(.+?)^```", PAGE, re.M | re.S)
    example = example.replace("http://127.0.0.1:8000", student.url)
    example = example.replace('model="kava"', f'model="{NAME}"')
    example = re.sub(r"counter at [^\"]*", QUESTIONS[0], example)
    exec(example, {})
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[\d ]+", said[0])
    shown = re.search(r'^\{"completion_tokens".*$', PAGE, re.M)
    assert shown is not None
    assert re.sub(r"\d+", "", said[1]) == re.sub(r"\d+", "", shown[0])

"""A log is never silent: where there is no terminal, a line now and then says how far work is."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kava_core import console
from kava_core.console import (
    complain,
    configure,
    progress,
    readable_size,
    readable_time,
    reporting,
    say,
    warn,
)
from kava_core.errors import KavaError
from stages.cli import main, quiet

ROOT = Path(__file__).parents[1]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Where words go: no terminal, and silence is short."""
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=file, highlight=False))
    monkeypatch.setattr(console, "SILENCE", 0.05)
    yield file
    configure()


def wait(log: io.StringIO, pattern: str) -> str:
    """The first line that matches."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in log.getvalue().splitlines():
            if re.search(pattern, line):
                return line
        time.sleep(0.01)
    raise AssertionError(f"no line like {pattern} in:\n{log.getvalue()}")


def test_a_line_says_what_is_done_of_how_much_how_fast_and_what_is_left(log: io.StringIO) -> None:
    with reporting("smoke", "evaluate"), progress() as display:
        task = display.add_task("kava", total=64, note="svamp")
        wait(log, r"^smoke, evaluate: kava 0 of 64, since \d+ s, svamp$")
        display.advance(task, 16)
        wait(log, r"^smoke, evaluate: kava 16 of 64, [\d.]+/(s|min), \d+ s left, svamp$")
        display.advance(task, 48)
        wait(log, r"^smoke, evaluate: at work for \d+ s$")  # between tasks


def test_work_without_a_known_end_has_a_rate(log: io.StringIO) -> None:
    with reporting("smoke", "generate"), progress() as display:
        display.advance(display.add_task("verify", total=None, note=""), 3)
        wait(log, r"^smoke, generate: verify 3, [\d.]+/(s|min)$")


def test_the_lines_end_with_the_work(log: io.StringIO) -> None:
    with reporting("smoke", "report"):
        wait(log, "at work for")
    length = len(log.getvalue())
    time.sleep(0.2)
    assert len(log.getvalue()) == length


def test_a_terminal_has_bars_and_no_lines(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(file=log, highlight=False, force_terminal=True)
    monkeypatch.setattr(console, "console", terminal)
    with reporting("smoke", "report"), progress() as display:
        display.add_task("kava", total=2, note="")
        time.sleep(0.2)
        say("something")
    assert "smoke, report" not in log.getvalue() and "something" in log.getvalue()


def test_a_log_is_never_silent_for_a_minute() -> None:
    assert console.SILENCE < 60


def entries(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_json_has_a_line_for_everything_with_pipeline_and_stage(log: io.StringIO) -> None:
    configure("json")
    say("before")
    with reporting("smoke", "evaluate"), progress() as display:
        task = display.add_task("kava", total=64, note="svamp")
        display.advance(task, 16)
        wait(log, '"task": "kava"')
        say("two\nlines, [brackets] and ü")
        warn("careful")
    complain("error: it ends")
    found = entries(log)
    at_work = {"pipeline": "smoke", "stage": "evaluate"}
    (first, *_, last) = found
    assert first["message"] == "before" and "stage" not in first
    assert last["level"] == "error" and last["message"] == "error: it ends"
    said = {entry["message"]: entry for entry in found}
    assert said["two\nlines, [brackets] and ü"].items() >= {"level": "info", **at_work}.items()
    assert said["careful"].items() >= {"level": "warning", **at_work}.items()
    how_far = next(entry for entry in found if entry["level"] == "progress" and "task" in entry)
    assert how_far.items() >= {"task": "kava", "done": 16, "total": 64, "note": "svamp"}.items()
    assert how_far["per_second"] > 0 and how_far["seconds_left"] >= 0
    assert how_far["message"].startswith("smoke, evaluate: kava 16 of 64, ")
    assert all(re.match(r"20\d\d-\d\d-\d\dT.*\+00:00$", entry["time"]) for entry in found)


def test_json_on_a_terminal_has_no_bars(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "console", Console(file=log, force_terminal=True))
    configure("json")
    with reporting("smoke", "report"), progress() as display:
        display.add_task("kava", total=2, note="")
        wait(log, '"task": "kava"')
    assert entries(log)


def test_quiet_leaves_warnings_and_errors(log: io.StringIO) -> None:
    configure(amount="quiet")
    with reporting("smoke", "report"), progress() as display:
        display.add_task("kava", total=2, note="")
        say("something")
        warn("careful")
        time.sleep(0.2)
    complain("error: it ends")
    assert log.getvalue() == "careful\nerror: it ends\n"


def test_verbose_speaks_more_often_and_shows_where_an_error_was_made(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SILENCE", 100.0)
    monkeypatch.setattr(console, "TALK", 0.05)
    configure(amount="verbose")
    with reporting("smoke", "report"):
        wait(log, "at work for")
    try:
        raise KavaError("it ends")
    except KavaError as error:
        complain("error: it ends", error)
    assert "Traceback (most recent call last)" in log.getvalue()
    assert log.getvalue().endswith("error: it ends\n")


def test_what_is_said_is_not_read_as_markup(log: io.StringIO) -> None:
    say("a list [a, b], [/nothing] and :smile:")
    assert log.getvalue() == "a list [a, b], [/nothing] and :smile:\n"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_an_error_of_a_command_is_a_line_of_json(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--log-format", "json"] if how == "option" else []
    if how == "environment":
        monkeypatch.setenv("KAVA_LOG_FORMAT", "json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kava", *options, "prepare"])
    with pytest.raises(SystemExit, match="1"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"].startswith("error: pipelines.yaml")
    configure()


def test_quiet_and_verbose_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kava", "-q", "-v", "prepare"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "exclude each other" in capsys.readouterr().err


def test_no_bars_of_libraries_unless_asked_for(tmp_path: Path) -> None:
    """Of a model that is written and read again; transformers is there before, and after."""
    script = (
        "import sys\n"
        "from stages.cli import kava\n"
        "{before}\n"
        "kava.main([*sys.argv[2:], 'sync', '--help'], standalone_mode=False)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, "
        "num_hidden_layers=1, num_attention_heads=1)\n"
        "LlamaForCausalLM(config).save_pretrained(sys.argv[1])\n"
        "LlamaForCausalLM.from_pretrained(sys.argv[1])\n"
    )

    ours = ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in ours}

    def said(before: str, *options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script.format(before=before), str(tmp_path), *options],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stderr

    for before in ("", "import transformers.utils.logging"):
        assert "Loading weights" not in said(before) and "shards" not in said(before)
    assert "Loading weights" in said("", "--verbose")


def test_the_bars_of_libraries_end_where_they_are_loaded_already() -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    quiet()
    assert not logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (7100, "118 min"), (12000, "3 h 20 min"),
     (183_000, "2 d 2 h")],
)  # fmt: skip
def test_times_are_readable(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1500, "1.5 kB"), (2e9, "2.0 GB"), (3e13, "30.0 TB")]
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert readable_size(size) == text

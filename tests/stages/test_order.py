"""Commands run out of order name the one that is to be run first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kava_core.errors import KavaError
from kava_core.settings import Pipeline
from stages.cli import Kava
from stages.graph import dvc_file
from tests.stages.project import ROOT

SMOKE = yaml.safe_load((ROOT / "pipelines.yaml").read_text(encoding="utf-8"))["pipelines"]["smoke"]
ASKS_TEST = {"fidelity": {**SMOKE["fidelity"], "split": "test"}}
GENERATE = SMOKE["generate"]
# As they stand, with chains of the teacher's, without caches, and where records may be lacking.
PIPELINES: dict[str, dict[str, Any]] = {
    "smoke": {},
    "written": {"traces": {}, **ASKS_TEST},
    "targets": {"generate": {**GENERATE, "keep": "targets"}},
    "lacking": {"generate": {**GENERATE, "on_error": "quarantine"}},
    "validated": {"evaluate": {**SMOKE["evaluate"], "split": "validation"}},
}
# DVC waits for what other students of the pipeline read; a report shows what there is of the rest.
UNREAD = {
    ("distill kava", "traces"),
    ("distill kava", "teacher_kv"),
    ("distill no-cot", "kv_targets"),
    *(("report", each) for each in ("teacher_kv", "fidelity", "traces", "eviction.json", "curves")),
}
STUDENTS = {name: SMOKE["students"][name] for name in ("kava", "no-cot")}


def settings_of(name: str) -> dict[str, Any]:
    return {**SMOKE, **PIPELINES[name], "students": STUDENTS}


def stages_of(name: str) -> dict[str, tuple[list[str], list[str]]]:
    """Command → what it reads and what it makes in the pipeline's folder, as DVC is told."""
    found = {}
    for stage in dvc_file(name, Pipeline.model_validate(settings_of(name)))["stages"].values():
        plain = stage.get("do", stage)
        for student in STUDENTS if "do" in stage else [""]:

            def read(paths: list[Any], student: str = student) -> list[str]:
                texts = [next(iter(path)) if isinstance(path, dict) else path for path in paths]
                reads = STUDENTS.get(student, {}).get("reads", "")
                filled = [
                    text.replace("${key}", student).replace("${item.reads}", reads)
                    for text in texts
                ]
                return [text.removeprefix(f"data/{name}/") for text in filled]

            command = plain["cmd"].replace("${key}", student)
            found[command] = (read(plain.get("deps", [])), read(plain["outs"]))
    return found


def cases() -> list[tuple[str, str, str, str]]:
    """Pipeline, command, what is missing, and the command that makes it."""
    found = []
    for name in PIPELINES:
        stages = stages_of(name)
        makers = {out: command for command, (_, outs) in stages.items() for out in outs}
        unasked = ("evaluate", "test_sets" if name == "validated" else "problems")
        for command, (reads, _) in stages.items():
            short = command.removeprefix("kava ").removesuffix(f" --pipeline {name}")
            for dep in reads:
                folder = dep.partition("/")[0] if dep.endswith(".json") else dep
                alone = "traces" in reads and (short, folder) == ("distill no-cot", "problems")
                if (short, folder) not in {*UNREAD, unasked} and not alone:
                    found += [
                        (name, command, out, maker)
                        for out, maker in makers.items()
                        if out == folder or out.startswith(f"{folder}/")
                    ]
        found += [(name, f"kava show {name}", out, makers[out]) for out in ("report", "costs")]
    return found


@pytest.mark.parametrize(("name", "command", "missing", "maker"), cases())
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, name: str, command: str, missing: str, maker: str
) -> None:
    file = tmp_path / "pipelines.yaml"
    file.write_text(yaml.safe_dump({"pipelines": {name: settings_of(name)}}), encoding="utf-8")
    for _, outs in stages_of(name).values():
        for out in outs:
            if out != missing:
                (tmp_path / "data" / name / out).mkdir(parents=True, exist_ok=True)
    if command.startswith("kava show") and missing == "costs":
        table = tmp_path / "data" / name / "report" / "table.txt"
        table.write_text("a table", encoding="utf-8")
    arguments = [*command.split()[1:], "--pipelines", str(file), "--data", str(tmp_path / "data")]
    with pytest.raises(KavaError) as refused:
        CliRunner(catch_exceptions=False).invoke(Kava(), arguments)
    path = tmp_path / "data" / name / missing
    assert str(refused.value) == f"{path} is missing. Run `{maker}` first."


def test_every_stage_that_reads_is_among_them() -> None:
    named = {command.split()[1] for _, command, _, _ in cases()}
    assert named == {"teacher", "traces", "generate", "evict", "fidelity", "distill", "evaluate",
                     "report", "show"}  # fmt: skip


def test_show_takes_a_pipeline_as_plan_does(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.yaml"
    plain = {"pipeline": "smoke", "pipelines": {n: settings_of(n) for n in ("smoke", "targets")}}
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    for name in plain["pipelines"]:
        for folder in ("report", "costs"):
            (tmp_path / name / folder).mkdir(parents=True)
            (tmp_path / name / folder / "table.txt").write_text(f"{folder} of {name}")
    options = ["--pipelines", str(file), "--data", str(tmp_path)]
    for named, shown in (([], "smoke"), (["targets"], "targets")):
        done = CliRunner(catch_exceptions=False).invoke(Kava(), ["show", *named, *options])
        assert done.output.startswith(f"report of {shown}\ncosts of {shown}\nReport: ")

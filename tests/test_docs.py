"""The pages: the site builds, numbers stand in one place, and what is shown is right."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import click
import pytest

from kava_core import POLICIES
from kava_core.planning.calibrate import Rates
from kava_core.planning.forecast import forecast
from kava_core.problems.prompt import Example, Prompt
from kava_core.problems.sources import SOURCES
from kava_core.settings import Imported, Pipeline, load_pipeline
from kava_core.settings.base import Section
from stages.cli import COMMANDS, kava
from stages.plan import duration

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(name: str) -> ModuleType:
    """A program of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    return load("picture")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built by the command of `make docs` into another folder."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout, done.stdout
    return folder


def test_the_site_has_every_page_and_the_face(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    assert "make smoke" in (site / "index.html").read_text(encoding="utf-8")
    reference = (site / "api.html").read_text(encoding="utf-8")
    for name in (
        "models.latent.LatentReasoner.generate",
        "store.TargetsStore.open",
        "store.TargetsStore.batch",
        "store.TeacherStore.shard",
        "eviction.evict",
        "settings.Evict.budget_shape",
    ):
        assert f'id="kava_core.{name}"' in reference


def sections(base: type = Section) -> set[type]:
    """Those that settings are read into, as they stand in their modules."""
    found = {each for kind in base.__subclasses__() for each in (kind, *sections(kind))}
    return {
        each
        for each in found
        if each.__module__.startswith("kava_core.settings.")
        and getattr(sys.modules[each.__module__], each.__name__, None) is each
    }


def test_the_reference_has_every_section_and_every_kind_with_settings() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = [pkgutil.resolve_name(name) for name in re.findall(r"^::: (\S+)$", page, re.M)]
    kinds = [kind for kind in (*POLICIES.values(), *SOURCES.values()) if fields(kind)]
    for each in (*sections(), Prompt, Example, *kinds):
        assert each in named, f"docs/api.md: add `::: {each.__module__}.{each.__qualname__}`"


def test_the_page_of_settings_has_every_setting_and_says_what_it_does() -> None:
    written = load("settings")
    assert written.undocumented() == [], "say what they do, `name: text`, in their docstring"
    page = written.PAGE.read_text(encoding="utf-8")
    assert written.page(page) == page, "run `python docs/settings.py`"
    paths = set(re.findall(r"^\| `(\S+?)` \|", page, re.M))
    fields = {name for each in sections() for name in each.model_fields}
    own = {*Pipeline.model_fields, *Imported.model_fields}
    assert fields - own <= {path.rpartition(".")[2] for path in paths}
    assert own <= set(re.findall(r"^## ([a-z]+)", page, re.M))
    assert "| `on_bad_record` | `fail` or `drop` | `fail` | what is malformed" in page
    assert "| `limit` | integer > 0 or null | `200` |" in page


def test_a_setting_without_a_word_is_found() -> None:
    class Mine(Section):
        """Ours.

        said: what it does. one or other: both alike.
        """

        said: int
        one: int | None = None
        other: int | None = None
        forgotten: int = 3

    rows = {row.path: row for row in load("settings")._rows(Mine, set())}
    assert {path: row.text for path, row in rows.items()} == {
        "said": "what it does.",
        "one": "both alike.",
        "other": "both alike.",
        "forgotten": "",
    }
    assert (rows["said"].default, rows["one"].default) == (None, "`null`")
    assert rows["one"].type == "integer or null"


def test_the_sizes_on_paper_are_those_of_the_plan(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    command = re.search(r"^kava plan (\S+) --flops (\S+) --gbps (\S+)$", page, re.M)
    assert command
    recipe, flops, gbps = command.groups()
    _, settings = load_pipeline(ROOT / "stages" / "recipes" / f"{recipe}.yaml", recipe)
    rates = Rates(float(flops), 1e9 * float(gbps))
    found = forecast(recipe, settings, tmp_path, lambda _: rates)
    row = re.compile(r"^\| ([a-z-]+(?: [a-z-]+)?) \| \S+ \| ([\d.]+ (?:min|h)) \|", re.M)
    shown = dict(row.findall(page))
    assert len(shown) > 4
    planned = {stage.stage: duration(stage.seconds or 0) for stage in found.stages}
    assert shown == {name: planned[name] for name in shown}


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'(?:\ssrc|<link[^>]*(?:stylesheet|icon)[^>]*href)="?https?://', text)
        assert "fonts.g" not in text


def test_the_picture_is_of_the_results(picture: ModuleType) -> None:
    for path, content in picture.files().items():
        assert path.read_text(encoding="utf-8") == content, "run `python docs/picture.py`"


def test_the_picture_shows_every_system(picture: ModuleType) -> None:
    systems = picture.read_systems(RESULTS)
    assert len(systems) == 10
    drawn = picture.draw(systems, 0)
    for system in systems:
        assert f"{system.name}: {system.accuracy:.1f}" in drawn
        assert system.low <= system.accuracy <= system.high


def test_the_readme_has_the_numbers_of_the_results(picture: ModuleType) -> None:
    shown = re.findall(r"^\| .+? \| ([\d.]+) % \| ([\d.]+) \|$", README, re.M)
    assert [(float(accuracy), float(passes)) for accuracy, passes in shown] == [
        (system.accuracy, system.passes) for system in picture.read_systems(RESULTS)
    ]


def test_measurements_stand_with_the_results_alone() -> None:
    row = re.compile(r"^\|(?=(?:[^|\n]*\|)*?(?: [\d.,]+×? \|){3}).*$", re.M)
    assert row.search(RESULTS)
    for page in PAGES:
        if page.name != "results.md":
            assert not row.findall(page.read_text(encoding="utf-8")), page.name


def test_the_readme_names_every_policy() -> None:
    (line,) = re.findall(r"^\| `evict.policy` \|.*$", README, re.M)
    for name in POLICIES:
        assert f"`{name}`" in line


def solve(question: str) -> int:
    """The answer to a generated chain."""
    value = int(question.split()[2])
    for word, operand in re.findall(r"(plus|times) (\d)", question):
        value = (value + int(operand) if word == "plus" else value * int(operand)) % 10
    return value


def test_every_question_shown_is_answered_and_rightly() -> None:
    shown = [
        (page.name, question, answer)
        for page in PAGES
        for question, answer in re.findall(
            r'^\$ kava ask \S+ "(.+)"\n(.+)$', page.read_text(encoding="utf-8"), re.M
        )
    ]
    served = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    asked = re.findall(r'"content": "(.+?)".+?^```text\n +(\d+)$', served, re.M | re.S)
    shown += [("serving.md", *found) for found in asked]
    students = (ROOT / "docs" / "students.md").read_text(encoding="utf-8")
    printed = re.findall(
        r"^asked = \[\"(.+?)\\n\"\]$.+?^```text\n\[' (\d+)'\]$", students, re.M | re.S
    )
    shown += [("students.md", *found) for found in printed]
    named = {"README.md", "evaluation.md", "serving.md", "students.md"}
    assert named <= {name for name, _, _ in shown}
    for name, question, answer in shown:
        assert int(answer) == solve(question), (name, question)


def test_no_question_is_shown_without_its_answer() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        questions = re.findall(r'"[^"\n]*counter at [^"\n]*"', text)
        asked = re.findall(r'^\$ kava ask \S+ "|"content": "counter at |^asked = \["', text, re.M)
        assert len(questions) == len(asked), page


def named_commands(page: str) -> list[tuple[str, str]]:
    """Every `kava COMMAND …` of a page, in blocks and in the text: the command and what follows."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)
    lines = [line for kind, block in blocks if kind in ("", "bash") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", page)
    found = [
        re.match(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*kava ([a-z][a-z-]*)(.*)$", line.partition("#")[0])
        for line in lines
    ]
    return [(match[1], match[2]) for match in found if match]


def test_every_command_shown_is_there_with_its_options() -> None:
    context = click.Context(kava)
    seen = set()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for name, rest in named_commands(page.read_text(encoding="utf-8")):
            command, words = kava.get_command(context, name), rest.split()
            assert command is not None, (page.name, name)
            while isinstance(command, click.Group) and words:
                inner = command.get_command(context, words.pop(0))
                assert inner is not None, (page.name, name, rest)
                command = inner
            known = {option for each in command.params for option in each.opts} | {"--help"}
            named = set(re.findall(r"(?<!\S)--[a-z-]+", rest))
            assert named <= known, (page.name, name, named - known)
            seen.add(name)
    assert seen >= set(COMMANDS) - {"show"}, set(COMMANDS) - seen


def test_a_shell_can_complete_the_command() -> None:
    asked = {"COMP_WORDS": "kava ev", "COMP_CWORD": "1", "_KAVA_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [Path(sys.executable).with_name("kava")],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plain,evict", "plain,evaluate"]


def test_links_to_the_repository_lead_somewhere() -> None:
    for page in [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]:
        for target in re.findall(r"\]\(([^):#\s]+)[)#]", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)

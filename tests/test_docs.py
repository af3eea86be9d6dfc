"""The pages: the site builds, numbers stand in one place, and what is shown is right."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import click
import pytest
import yaml
from click.testing import CliRunner
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser

from kava_core import POLICIES
from kava_core.planning.calibrate import Rates
from kava_core.planning.forecast import forecast
from kava_core.problems.prompt import Example, Prompt
from kava_core.problems.sources import SOURCES
from kava_core.settings import Imported, Pipeline, load_pipeline
from kava_core.settings.base import Section
from stages.cli import COMMANDS, Kava, kava
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


PROGRAMS = ("kava", "make", "python", "dvc")
OPERATORS = re.compile(r"[();<>|&]+")


@dataclass(frozen=True)
class Command:
    """One that a page shows; whole: in a block, to be typed as it stands, not named in the text."""

    page: str
    words: tuple[str, ...]
    whole: bool


def commands(page: Path) -> list[Command]:
    """Every command of our programs on a page, without comments, variables and other programs."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    lines = [
        (line, True)
        for kind, block in blocks
        if kind in ("", "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [(line, False) for line in re.findall(r"`([^`\n]+)`", text)]
    begins = re.compile(rf"^\s*(?:\$ )?((?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)})(?: .*)?)$")
    found = []
    for line, whole in lines:
        if shown := begins.match(line):
            lexer = shlex.shlex(shown[1], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            for operator, words in itertools.groupby(lexer, lambda w: bool(OPERATORS.fullmatch(w))):
                named = itertools.dropwhile(lambda w: re.match("[A-Z_]+=", w), words)
                each = tuple(word for word in named if word not in ("…", "..."))
                if not operator and len(each) > 1 and each[0] in PROGRAMS:
                    found.append(Command(page.name, each, whole))
    return found


SHOWN = [
    command
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "examples/kava-extras/README.md"]
    for command in commands(page)
]


def shown(program: str) -> list[Command]:
    return [command for command in SHOWN if command.words[0] == program]


def parse(command: click.Command, words: list[str], whole: bool) -> str | None:
    """The name of the subcommand, if there is one; click's UsageError where it would be refused.

    Nothing is run. One that is not `whole` may lack what it needs.
    """
    context = click.Context(command)
    if isinstance(command, click.Group):
        _, rest, _ = command.make_parser(context).parse_args(list(words))
        if not rest:
            return None
        name, inner, rest = command.resolve_command(context, rest)
        assert inner is not None
        parse(inner, rest, whole)
        return name
    try:
        command.make_context(command.name, list(words))
    except click.MissingParameter:
        if whole:
            raise
    except click.exceptions.Exit as end:
        assert end.exit_code == 0
    return None


def test_every_command_shown_is_read_by_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = set()
    for command in shown("kava"):
        words = ["evict" if word == "STAGE" else word for word in command.words[1:]]
        try:
            seen.add(parse(kava, words, command.whole))
        except click.UsageError as error:
            pytest.fail(f"{command}: {error.format_message()}")
    assert seen >= set(COMMANDS) - {"show"}, set(COMMANDS) - seen


def test_a_command_that_would_be_refused_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    lines = ["kava distill", "$ A=1 kava plan --flops many", "kava clean x y | cat", "kava storm x"]
    lines += ["kava init a && kava init a b  # no b", "kava store export A", "kava ask A --nothing"]
    for line in lines:
        page.write_text(f"```bash\n{line}\n```\n", encoding="utf-8")
        with pytest.raises(click.UsageError):
            for command in commands(page):
                parse(kava, list(command.words[1:]), command.whole)
    page.write_text("`kava distill`, `kava ask --nothing`", encoding="utf-8")
    named, wrong = commands(page)
    parse(kava, list(named.words[1:]), named.whole)
    with pytest.raises(click.NoSuchOption):
        parse(kava, list(wrong.words[1:]), wrong.whole)


def test_every_target_of_make_that_is_shown_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    assert shown("make")
    for command in shown("make"):
        for word in command.words[1:]:
            variable, given, _ = word.partition("=")
            assert f"$({variable})" in makefile if given else word in targets, command


def test_every_program_shown_is_there_and_reads_its_options() -> None:
    seen = 0
    for command in shown("python"):
        if not command.words[1:] or command.words[1].startswith("-"):
            continue
        file, *words = command.words[1:]
        assert (ROOT / file).is_file(), command
        if not file.startswith("benchmarks/"):
            continue
        seen += 1
        if words:  # those without options are only looked up
            main = runpy.run_path(str(ROOT / file)).get("main")
            assert isinstance(main, click.Command), f"{command}: which options it has is not known"
            try:
                parse(main, words, command.whole)
            except click.UsageError as error:
                pytest.fail(f"{command}: {error.format_message()}")
    assert seen > 8


def test_every_command_of_dvc_that_is_shown_is_one() -> None:
    parser = get_main_parser()
    recipes = {path.stem for path in (ROOT / "stages/recipes").glob("*.yaml")}
    for command in shown("dvc"):
        words = list(command.words[1:])
        try:
            found = parser.parse_args(words)
        except (DvcParserError, SystemExit):
            assert not command.whole, command
            with pytest.raises(SystemExit) as end:  # a group, named without one of its commands
                parser.parse_args([*words, "--help"])
            assert end.value.code == 0, command
            continue
        for target in found.targets if words[0] == "repro" else ():
            path, _, stage = target.replace("/NAME/", "/smoke/").partition(":")
            if Path(path).name != "dvc.yaml":
                path, stage = "dvc.yaml", path
            if Path(path).parent.name in recipes:  # `kava recipe` takes it over, and `sync` writes
                path = "pipelines/quickstart/dvc.yaml"
            stages = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["stages"]
            assert not stage or stage.partition("@")[0] in stages, command


def test_what_takes_a_moment_is_run_as_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project of one's own, the recipes that are shown, `sync`, and every command's help."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        done = CliRunner(catch_exceptions=False).invoke(Kava(), words)
        assert done.exit_code == 0, (words, done.output)

    run("init", "my-project")
    monkeypatch.chdir(tmp_path / "my-project")
    names = {c.words[2] for c in shown("kava") if c.words[1] == "recipe" and len(c.words) > 2}
    names -= {"NAME"}
    assert len(names) > 3
    for name in sorted(names):
        run("recipe", name)
    run("sync")
    for name in COMMANDS:
        run(name, "--help")


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

"""Policies and sources of other packages: found by name, refused by one sentence, never guessed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from kava_core import registry
from kava_core.errors import KavaError
from kava_core.eviction import evict
from kava_core.eviction.check import check_policy
from kava_core.eviction.policies import REGISTRY
from kava_core.problems.load import Reading
from kava_core.problems.prepare import FurtherSet, Sizes, prepare_problems
from kava_core.problems.readers import Location
from kava_core.problems.records import TraceForm
from kava_core.problems.sources import REGISTRY as SOURCES
from kava_core.problems.sources.synthetic import Synthetic
from kava_core.settings import Evict, load_pipeline
from stages.graph import VERSIONS_FILE, check_tracked, dvc_file, project_files
from tests.eviction import naive
from tests.settings.test_pipeline import changed, load

Install = Callable[..., Path]
POLICY = """
from dataclasses import dataclass
from kava_core.eviction import Policy

@dataclass(frozen=True)
class Last(Policy):
    name = "last"
    step: int = 1
    weights: tuple[float, ...] = (1.0,)

    def score(self, batch):
        return (batch.token_indices.float() * self.step)[:, None, None].expand(batch.shape)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lays a package out as pip would, in a folder on the path of this test alone."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)

    def lay_out(
        code: str,
        *,
        package: str = "Last.Token",
        version: str = "1.2",
        points: str = "last = {module}:Last",
        group: str = "kava.policies",
    ) -> Path:
        module = package.replace(".", "_").lower()
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
        about = folder / f"{module}-{version}.dist-info"
        for old in folder.glob(f"{module}-*.dist-info"):
            old.rename(about)
        about.mkdir(exist_ok=True)
        about.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8"
        )
        about.joinpath("entry_points.txt").write_text(
            f"[{group}]\n{points.format(module=module)}\n", encoding="utf-8"
        )
        registry._points.cache_clear()
        return folder / f"{module}.py"

    yield lay_out
    registry._points.cache_clear()
    for name in set(sys.modules) - before:
        if name.endswith(("_token", "_other")):
            del sys.modules[name]


def wrong(tmp_path: Path, policy: Any) -> str:
    """What is said of a policy in a pipeline's settings."""
    with pytest.raises(KavaError) as error:
        load(tmp_path, changed("evict.policy", policy))
    (line,) = str(error.value).splitlines()[1:]
    return line.strip().removeprefix("pipelines.small.evict.policy")


def test_a_policy_of_another_package_is_named_with_its_settings(
    install: Install, tmp_path: Path
) -> None:
    install(POLICY)
    bare = load(tmp_path, changed("evict.policy", "last")).evict
    assert bare.policy.label == "last"
    given = {"name": "last", "step": 3, "weights": [0.5, 2.0]}
    read = load(tmp_path, changed("evict.policy", given)).evict
    assert read.policy.label == "last step=3 weights=(0.5, 2.0)"
    written = read.model_dump(mode="json")["policy"]
    assert written == {**given, "packages": {"last-token": "1.2"}}
    assert Evict.model_validate({"budget": 4, "policy": written}) == read
    assert Evict(budget=4, policy=read.policy) == read
    assert "last" in wrong(tmp_path, "first")


def test_its_settings_are_checked_as_ours_are(install: Install, tmp_path: Path) -> None:
    install(POLICY)
    assert wrong(tmp_path, {"name": "last", "steps": 3}) == ".steps: no such setting"
    assert wrong(tmp_path, {"name": "last", "step": "many"}).startswith(".step: Input should be")
    assert wrong(tmp_path, {"name": "last", "weights": [True]}).startswith(".weights.0: ")
    assert wrong(tmp_path, {"name": "rkv", "packages": {"a": "1"}}) == ".packages: no such setting"


def test_another_version_than_was_written_down_is_noticed(install: Install, tmp_path: Path) -> None:
    install(POLICY)
    read = load(tmp_path, changed("evict.policy", "last")).evict
    written = read.model_dump(mode="json")["policy"]
    install(POLICY, version="1.3")
    assert (
        "policy last is here of last-token 1.3, not of last-token 1.2, as is wanted. Install "
        "that, or run the stage again with what is installed."
    ) in wrong(tmp_path, written)
    again = Evict.model_validate({"budget": 4, "policy": "last"})
    assert again.model_dump(mode="json")["policy"]["packages"] == {"last-token": "1.3"}


def test_dvc_tracks_the_version_of_the_package(install: Install, tmp_path: Path) -> None:
    install(POLICY)
    settings = load(tmp_path, changed("evict.policy", "last"))
    stages = dvc_file("small", settings)["stages"]
    versions = VERSIONS_FILE.as_posix()
    assert stages["evict"]["params"][1] == {versions: ["evict", "packages.last-token"]}
    assert stages["generate"]["params"][1] == {versions: ["generate"]}
    files = project_files({"small": settings})
    assert yaml.safe_load(files[VERSIONS_FILE])["packages"] == {"last-token": "1.2"}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    check_tracked(tmp_path, "small", settings, "evict")
    install(POLICY, version="2.0")
    with pytest.raises(KavaError, match=r"expected last-token 2\.0\. Run `kava sync`"):
        check_tracked(tmp_path, "small", settings, "evict")
    check_tracked(tmp_path, "small", settings, "generate")
    ours = load(tmp_path, changed("evict.policy", "rkv"))
    assert "packages" not in project_files({"small": ours})[VERSIONS_FILE]


def test_nothing_is_imported_before_it_is_named(install: Install, tmp_path: Path) -> None:
    install("raise SystemExit('imported')")
    assert "last" in REGISTRY.names()
    assert load(tmp_path, changed("evict.policy", "rkv")).evict.policy.name == "rkv"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere", "cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("Last = 1 / 0", "cannot be imported (ZeroDivisionError"),
        ("raise SystemExit(0)", "of Last.Token 1.2 cannot be imported (SystemExit: 0)"),
        ("", "cannot be imported (AttributeError"),
        ("Last = 3", "expected a frozen dataclass that extends kava_core.eviction.policies.base.P"),
        (POLICY.replace("frozen=True", "frozen=False"), "expected a frozen dataclass"),
        (POLICY.replace('"last"', '"first"'), "expected a class with `name = 'last'`"),
        (POLICY.replace('name = "last"', 'name: str = "last"'), "expected no field called name"),
        (POLICY.replace("def score", "def scores"), "it has no score. Mend that package."),
        (POLICY.replace("step: int", "step: complex"), "a setting of type complex cannot be read"),
        (POLICY.replace("step: int", "step: 'Whole'"), "its fields' types cannot be read"),
        (POLICY + "    depends_on = ('not-here',)", "needs the package not-here"),
        (POLICY.replace("step: int", "step: 'print.Whole'"), "failed to take its settings (Attrib"),
        (
            POLICY + "    def __post_init__(self): self.step / 0",
            "of Last.Token 1.2 failed to take its settings (ZeroDivisionError: division by zero)",
        ),
    ],
)
def test_a_package_that_is_wrong_is_one_sentence(
    install: Install, tmp_path: Path, code: str, said: str
) -> None:
    install(code)
    line = wrong(tmp_path, "last")
    assert line.startswith(": policy last") and said in line, line


SCORE = (
    "        return (batch.token_indices.float() * self.step)[:, None, None].expand(batch.shape)"
)
KEEPABLE = "\n    def keepable(self, batch):\n        return "


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            POLICY.replace(SCORE, "        return {}[self.step]"),
            "failed to score (KeyError: 1). Mend",
        ),
        (POLICY.replace(SCORE, "        raise SystemExit"), "failed to score (SystemExit: )"),
        (POLICY.replace(SCORE, "        pass"), "found <class 'NoneType'>. Mend the policy."),
        (POLICY + KEEPABLE + "batch.nothing", "failed to say what may be kept (AttributeError: "),
    ],
)
def test_a_policy_that_fails_is_named_with_its_package(
    install: Install, code: str, said: str
) -> None:
    install(code)
    policy = REGISTRY.find("last")()
    for evicted in (
        lambda: evict(naive.make_batch([4]), policy, [2, 2, 2]),
        lambda: check_policy(policy),
    ):
        with pytest.raises(KavaError) as error:
            evicted()
        assert str(error.value).startswith("policy last of Last.Token 1.2"), error.value
        assert said in str(error.value), error.value
        assert ("failed" in said) == isinstance(error.value.__cause__, Exception | SystemExit)


def test_a_lack_of_memory_and_a_fault_of_ours_are_nobody_elses(install: Install) -> None:
    install(POLICY.replace(SCORE, "        raise MemoryError"))
    with pytest.raises(MemoryError):
        evict(naive.make_batch([4]), REGISTRY.find("last")(), [2, 2, 2])
    with pytest.raises(ZeroDivisionError), REGISTRY.guarded(REGISTRY.find("rkv"), "to score"):
        1 / 0  # noqa: B018


def test_names_that_collide_are_refused_where_they_are_used(
    install: Install, tmp_path: Path
) -> None:
    install(POLICY, points="rkv = {module}:Last\nlast = {module}:Last")
    assert "KaVa's own, and Last.Token 1.2 offers another" in wrong(tmp_path, "rkv")
    install(POLICY, package="Any.Other", version="3")
    said = wrong(tmp_path, "last")
    assert "offered by more than one package: Any.Other 3 and Last.Token 1.2" in said
    assert load(tmp_path, changed("evict.policy", "random")).evict.policy.name == "random"


def test_a_class_that_no_name_stands_for_is_no_setting(install: Install) -> None:
    install(POLICY)
    found = REGISTRY.find("last")
    stranger = type("Last", (found,), {})
    with pytest.raises(ValidationError, match="should be one of"):
        Evict(budget=4, policy=stranger())


GENERATED = """
from dataclasses import dataclass
from kava_core.problems.sources import GeneratedSource

@dataclass(frozen=True)
class Last(GeneratedSource):
    name = "last"
    forms = ("equations",)

    def splits(self, train, validation, test, *, seed, traces="equations"):
        raise NotImplementedError
"""


def test_a_source_without_its_forms_is_one_sentence(install: Install, tmp_path: Path) -> None:
    install(
        GENERATED.replace("    forms = ('equations',)\n".replace("'", '"'), ""),
        group="kava.sources",
    )
    with pytest.raises(KavaError, match=r"source last of Last\.Token 1\.2: it has no forms\. Mend"):
        load(tmp_path, changed("prepare.source", "last"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "raise NotImplementedError('soon')",
            "failed to draw problems (NotImplementedError: soon)",
        ),
        ("return None", "expected ProblemSplits from `splits`, found None"),
    ],
)
def test_a_source_that_draws_nothing_is_named(install: Install, body: str, said: str) -> None:
    install(GENERATED.replace("raise NotImplementedError", body), group="kava.sources")
    source = SOURCES.find("last")()
    further = {"more": FurtherSet(Synthetic(), size=2), "own": FurtherSet(source, size=2)}
    for each, test_sets in ((source, {}), (Synthetic(), further)):
        with pytest.raises(KavaError) as error:
            prepare_problems(each, None, Reading("equations"), Sizes(4, 2, 2), test_sets=test_sets)
        assert str(error.value).startswith("source last of Last.Token 1.2"), error.value
        assert said in str(error.value), error.value


ROWS = """
from dataclasses import dataclass
from kava_core.problems.sources import RowSource
from kava_core.problems.sources.base import Draft

@dataclass(frozen=True)
class Last(RowSource):
    name = "last"
    forms = ("equations",)

    def read(self, row, traces):
        return Draft(row.fields["q"], ("<<1+1=2>>",), "2", "sums")
"""


def rows_in(folder: Path) -> Path:
    """Four rows, the third of which has no text."""
    path = folder / "rows.jsonl"
    path.write_text('{"q": "one"}\n{"q": "two"}\n{"q": 7}\n{"q": "four"}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            ROWS.replace('"q"', '"?"'),
            "source last of Last.Token 1.2 failed to read rows.jsonl:1 (KeyE",
        ),
        (
            ROWS.replace("return", "nothing ="),
            "source last of Last.Token 1.2: expected a Draft of rows.jsonl:1, found None. Mend",
        ),
        (
            ROWS,
            "rows.jsonl:3: expected a text as `question` of source last of Last.Token 1.2, found 7",
        ),
        (
            ROWS.replace('("<<1+1=2>>",)', '"<<1+1=2>>"'),
            "expected a tuple of texts as `steps` of so",
        ),
        (ROWS.replace('"2"', "2"), "expected a text as `answer` of source last of Last.Token 1.2"),
    ],
)
@pytest.mark.parametrize("traces", ["equations", "results"])
def test_a_source_that_reads_wrongly_is_named_with_the_row(
    install: Install, tmp_path: Path, traces: TraceForm, code: str, said: str
) -> None:
    install(code, group="kava.sources")
    rows = rows_in(tmp_path)
    source = SOURCES.find("last")()
    with pytest.raises(KavaError) as error:
        prepare_problems(source, Location(str(rows)), Reading(traces), Sizes(None, 1, 1))
    assert said in str(error.value).replace(f"{tmp_path}/", ""), error.value


def test_a_row_of_which_a_source_makes_no_text_can_be_left_out(
    install: Install, tmp_path: Path
) -> None:
    install(ROWS, group="kava.sources")
    rows = rows_in(tmp_path)
    reading = Reading("equations", on_bad_record="drop")
    source = SOURCES.find("last")()
    splits = prepare_problems(source, Location(str(rows)), reading, Sizes(None, 1, 1))
    reason = "bad: expected a text as `question` of source last of Last.Token 1.2"
    assert splits.dropped["train"] == {reason: 1}


def test_a_source_that_generates_is_a_test_set_of_some_size(
    install: Install, tmp_path: Path
) -> None:
    install(GENERATED, group="kava.sources")
    assert load(tmp_path, changed("prepare.source", "last")).prepare.source.name == "last"
    with pytest.raises(KavaError, match=r"source last needs the number `size`"):
        load(tmp_path, changed("prepare.test_sets", {"more": {"source": "last", "path": "x"}}))
    more = load(tmp_path, changed("prepare.test_sets", {"more": {"source": "last", "size": 3}}))
    assert more.prepare.test_sets["more"].size == 3
    settings = load_pipeline(Path(__file__).parents[1] / "pipelines.yaml", "smoke")[1]
    assert settings.prepare.source.name == "synthetic"

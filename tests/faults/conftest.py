from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.stage import SETTINGS, Stage
from tests.golden.inputs import NAME, make_inputs, with_settings
from tests.reporting.pipeline import make_pipeline

RESULTS, MOMENTS = "--faults-results", "--faults-moments"
FEW = 3  # moments, unless the option says how many


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        RESULTS,
        type=Path,
        help="Append what each test saw, a JSON line each, for docs/reliability.md; a test that "
        "has its line is not run again.",
    )
    parser.addoption(
        MOMENTS,
        type=int,
        default=FEW,
        help="At how many random moments each stage is killed (test_kills, slow).",
    )


def _results(config: pytest.Config) -> Path | None:
    path: Path | None = config.getoption(RESULTS, default=None)
    return path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a run before has seen, so that many short runs make one long one."""
    path = _results(config)
    if path is None or not path.is_file():
        return
    seen = {json.loads(line)["test"] for line in path.read_text(encoding="utf-8").splitlines()}
    again = [item for item in items if item.nodeid in seen]
    if again:
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item.nodeid not in seen]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing being left to see is no error."""
    if _results(session.config) is not None and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


NOTES = pytest.StashKey[list[dict[str, str]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write down what a test saw once it has passed: all of it or nothing."""
    report = yield
    path = _results(item.config)
    if path is not None and call.when == "call" and report.passed:
        entry = {"test": item.nodeid, "notes": item.stash.get(NOTES, [])}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    return report


Tell = Callable[[str, str, str], None]
Measured = Callable[[str, str, str], None]


def _noter(request: pytest.FixtureRequest, *names: str) -> Callable[[str, str, str], None]:
    def note(*values: str) -> None:
        notes = request.node.stash.setdefault(NOTES, [])
        notes.append(dict(zip(names, values, strict=True)))

    return note


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Note a fault, how it was injected and how it ended; call it once the outcome is asserted."""
    return _noter(request, "fault", "how", "outcome")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Note what was measured, what it came to, and what is promised, each in words."""
    return _noter(request, "what", "figure", "promised")


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Homes with the inputs of every stage: `report` has some of its own. Not to be changed."""
    home = make_inputs(tmp_path_factory.mktemp("faults"))
    report = tmp_path_factory.mktemp("report") / "home"
    shutil.copytree(home, report)
    shutil.rmtree(report / "data")
    make_pipeline(report / "data", name=NAME)
    return {False: home, True: report}


def _copied(homes: dict[bool, Path], name: str, home: Path) -> Path:
    shutil.copytree(homes[name == "report"], home)
    if name in SETTINGS:
        section, settings = SETTINGS[name]
        with_settings(home, section, **settings)
    return home


@pytest.fixture
def make_stage(_homes: dict[bool, Path], tmp_path: Path) -> Callable[[str], Stage]:
    """A stage by its name, in a home that a test may change."""

    def make(name: str) -> Stage:
        return Stage(_copied(_homes, name, tmp_path / f"home-{name}"), name)

    return make


@dataclass(frozen=True)
class Whole:
    """A stage before and after a run that nothing disturbed.

    start: its home before. expected: its artefacts after (`Stage.digests`). seconds: of the run.
    """

    start: Path
    expected: list[dict[str, str]]
    seconds: float

    def again(self, place: Path, name: str) -> Stage:
        """The stage as it was before the run, in a home at `place`."""
        shutil.copytree(self.start, place)
        return Stage(place, name)


@pytest.fixture(scope="session")
def whole(
    _homes: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    """An undisturbed run of a stage by its name; training saves its state every other step."""
    made: dict[str, Whole] = {}

    def of(name: str) -> Whole:
        if name not in made:
            start = _copied(_homes, name, tmp_path_factory.mktemp(f"whole-{name}") / "start")
            with_settings(start, "cadence", save_every=2)
            stage = Stage(start.with_name("done"), name)
            shutil.copytree(start, stage.home)
            code, seconds = stage.run()
            assert code == 0, stage.said
            made[name] = Whole(start, stage.digests(), seconds)
        return made[name]

    return of


def processes_in(home: Path) -> list[str]:
    """The commands of all processes whose working directory is below `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(home):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.stage import Stage
from tests.golden.inputs import NAME, make_inputs
from tests.reporting.pipeline import make_pipeline


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults-results",
        type=Path,
        help="Append what each fault came to, a JSON line each, for docs/reliability.md.",
    )


Tell = Callable[[str, str, str], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Note a fault, how it was injected and how it ended; call it once the outcome is asserted."""
    path: Path | None = request.config.getoption("--faults-results", default=None)

    def note(fault: str, how: str, outcome: str) -> None:
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"fault": fault, "how": how, "outcome": outcome}) + "\n")

    return note


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Homes with the inputs of every stage: `report` has some of its own. Not to be changed."""
    home = make_inputs(tmp_path_factory.mktemp("faults"))
    report = tmp_path_factory.mktemp("report") / "home"
    shutil.copytree(home, report)
    shutil.rmtree(report / "data")
    make_pipeline(report / "data", name=NAME)
    return {False: home, True: report}


@pytest.fixture
def make_stage(_homes: dict[bool, Path], tmp_path: Path) -> Callable[[str], Stage]:
    """A stage by its name, in a home that a test may change."""

    def make(name: str) -> Stage:
        home = tmp_path / f"home-{name}"
        shutil.copytree(_homes[name == "report"], home)
        return Stage(home, name)

    return make

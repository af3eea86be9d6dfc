"""What tests of several rooms stand on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Torch reads it when it is imported. Stages that ask for two threads must not spin while one waits
# for the other: beside other processes on two cores that made them fourteen times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Ray makes its workers nice: beside other tests they would get next to nothing.
os.environ.setdefault("RAY_worker_niceness", "0")

from kava_core.console import configure

if TYPE_CHECKING:
    from kava_core.models.latent import LatentReasoner
    from kava_core.problems.traces import TraceEncoder


# Files of minutes begin first, so that no process is left alone with one of them at the end.
LONG = (
    "stages/test_dvc.py",
    "studies/",
    "cluster/",
    "stages/test_tracked.py",
    "stages/",
    "sharing/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def turn(item: pytest.Item) -> int:
        file = item.path.relative_to(here).as_posix()
        return next((i for i, name in enumerate(LONG) if file.startswith(name)), len(LONG))

    items.sort(key=turn)


@pytest.fixture(autouse=True)
def _words_as_usual() -> Iterator[None]:
    """What a test chose of how a process speaks is not chosen for the next one."""
    yield
    configure()


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    """A Ray of two cores, shared by the tests since starting it takes seconds."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def encoder() -> TraceEncoder:
    """Of the problems of `tests/evaluation/talker.py`."""
    from tests.evaluation.talker import make_encoder

    return make_encoder()


@pytest.fixture(scope="module")
def talker(encoder: TraceEncoder) -> LatentReasoner:
    """The tiny system of `tests/evaluation/talker.py`."""
    from tests.evaluation.talker import make_talker

    return make_talker(encoder)

"""What the tests of `fit` share: a store, and a run on it that nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distill.toy import Toy, files, toy_traces, write_store


@pytest.fixture(autouse=True, scope="module")  # before what a module shares is made
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 records: 6 batches of 4, so 3 steps of 2 batches an epoch, and 2 records left over."""
    folder = tmp_path_factory.mktemp("fit") / "store"
    write_store(folder, toy_traces(26))
    return folder


@pytest.fixture(scope="module")
def whole(
    store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Weights and curves of a run of four epochs that nothing disturbed."""
    run = Toy(store, tmp_path_factory.mktemp("whole"))
    return run.run(), files(run.folder / "curves")

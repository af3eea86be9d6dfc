"""What is asked of the Hub, and what becomes of its answers; only the network is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from kava_core.errors import KavaError
from kava_core.problems import hub
from kava_core.problems.readers import Location, read_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub with one dataset of two splits; what it was asked for."""
    seen: dict[str, Any] = {"commits": {None: COMMIT, "v2": "2" * 40}}

    def info(*_: Any, revision: str | None, **__: Any) -> SimpleNamespace:
        if revision not in seen["commits"]:
            raise ConnectionError("no such revision, or no network")
        return SimpleNamespace(sha=seen["commits"][revision])

    def load(name: str, config: str | None, **options: Any) -> dict[str, IterableDataset]:
        seen.update(name=name, config=config, **options)
        rows = Dataset.from_list([{"question": "a"}, {"question": "b"}]).to_iterable_dataset()
        return {"train": rows, "dev": rows}

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr(hub, "load_dataset", load)
    return seen


def test_a_dataset_is_read_at_the_commit_that_is_recorded(asked: dict[str, Any]) -> None:
    found = read_source(Location("owner/name"), "main")
    assert (asked["name"], asked["config"], asked["streaming"]) == ("owner/name", "main", True)
    assert asked["revision"] == COMMIT
    assert found["validation"].origin() == {"dataset": "owner/name", "commit": COMMIT}
    rows = list(found["train"].rows)
    assert [row.fields for row in rows] == [{"question": "a"}, {"question": "b"}]
    assert rows[1].place == "owner/name [train] row 1"


def test_a_revision_is_resolved_to_its_commit(asked: dict[str, Any]) -> None:
    found = read_source(Location("owner/name", "socratic", "v2"), "main")
    assert (asked["config"], asked["revision"]) == ("socratic", "2" * 40)
    assert found["train"].origin()["commit"] == "2" * 40


def test_without_a_hub_to_ask_the_revision_is_read_as_it_is_called(asked: dict[str, Any]) -> None:
    found = read_source(Location("owner/name", revision="cached"))
    assert asked["revision"] == "cached"
    assert found["train"].origin() == {"dataset": "owner/name", "commit": None}


@pytest.mark.usefixtures("asked")
def test_what_cannot_be_had_is_named_with_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "load_dataset", fail)
    words = r"'owner/name' is no local path.* at revision 2222.*`hf download owner/name --repo-type"
    with pytest.raises(KavaError, match=words):
        read_source(Location("owner/name", revision="v2"))


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RevisionNotFoundError, "owner/name on the Hub has no revision 'v9'. Correct `revision`"),
        (RepositoryNotFoundError, "no dataset on the Hub that may be read from here. Correct"),
    ],
)
def test_what_the_hub_says_it_has_not_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, error: type[RepositoryNotFoundError], words: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(KavaError, match=words):
        read_source(Location("owner/name", revision="v9"))

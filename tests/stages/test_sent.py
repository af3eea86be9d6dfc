"""A pipeline whose stores are made in a bucket, as DVC sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.project import Project, small
from tests.store.conftest import s3, service  # noqa: F401  (fixtures)


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_dvc_has_the_address_of_what_lies_in_a_bucket(tmp_path: Path) -> None:
    project = Project.clone(tmp_path / "clone")
    sent = dict.fromkeys(("caches_to", "targets_to"), "s3://bucket/team")
    small(project, resources={"workers": 0, **sent})
    project.change("pipeline", "small")
    assert {"generate", "evict", "distill@kava", "evaluate", "report"} <= project.repro()
    made = project.path / "data/small"
    for artefact in ("teacher_kv", "kv_targets"):
        assert [path.name for path in (made / artefact).iterdir()] == ["remote.json"]
    assert project.repro() == set()
    first = (made / "kv_targets/remote.json").read_text()
    project.change("pipelines.small.evict.budget", 3)
    assert project.repro() == {"evict", "distill@kava", "evaluate", "report"}
    assert (made / "kv_targets/remote.json").read_text() != first
    project.change("pipelines.small.evict.budget", 4)
    assert project.repro() == set()  # the address comes back, and what lies there never went
    assert (made / "kv_targets/remote.json").read_text() == first
    project.kava("store", "verify", "--full", str(made / "kv_targets"))

"""The pipeline as its users run it: real DVC, real Ray, the smoke settings."""

from __future__ import annotations

import json
import time

import pytest

from tests.stages.project import Project

STUDENTS = {"kava", "endpoint", "answer-only", "no-cot", "no-cot-equal-time"}


def test_metrics_have_the_documented_form(finished: Project) -> None:
    metrics = json.loads((finished.path / "data/smoke/evaluation/metrics.json").read_text())
    (systems,) = metrics.values()
    assert set(systems) == {"teacher-cot", "teacher-no-cot", *STUDENTS}
    for entry in systems.values():
        low, high = entry["ci95"]
        assert 0 <= low <= entry["exact_match"] <= high <= 100
        assert entry["n"] == 64 == sum(part["n"] for part in entry["by_steps"].values())
        assert entry["forward_passes"] >= 1 and entry["tokens"] >= 1
    # T + 1 passes to the first answer token; the teacher writes its chain one token at a time.
    assert systems["kava"]["forward_passes"] == pytest.approx(systems["kava"]["tokens"] + 2)
    assert systems["no-cot"]["forward_passes"] == pytest.approx(systems["no-cot"]["tokens"])


def test_what_is_measured_is_kept_apart(finished: Project) -> None:
    measured = json.loads((finished.path / "data/smoke/measured/evaluation.json").read_text())
    (systems,) = measured["systems"].values()
    assert set(systems) == {"teacher-cot", "teacher-no-cot", *STUDENTS}
    for cost in systems.values():
        assert cost["seconds_per_problem"] > 0 and cost["peak_memory_mb"] > 0


def test_eviction_says_how_much_it_dropped(finished: Project) -> None:
    metrics = json.loads((finished.path / "data/smoke/eviction.json").read_text())
    assert metrics["engaged_percent"] == 100  # every trace is longer than 4 tokens
    manifest = json.loads((finished.path / "data/smoke/kv_targets/manifest.json").read_text())
    kept = 100 * 4 * manifest["records"] / manifest["trace_tokens"]
    assert metrics["kept_percent"] == pytest.approx(kept)
    assert 0 < metrics["agreement_percent"] <= 100
    assert 0 < metrics["result_percent"] < 100  # the generator says which tokens are results
    assert all(0 < share < 1 for share in metrics["identity_explained"].values())


def test_dvc_shows_metrics_and_plots(copy: Project) -> None:
    said = copy.run("dvc", "metrics", "show", "--json")
    shown = json.loads(said[said.index("{") :])  # behind a remark on pipelines that never ran
    assert "data/smoke/evaluation/summary.json" in json.dumps(shown)
    copy.run("dvc", "plots", "show", "--out", "plots")
    assert (copy.path / "plots" / "index.html").is_file()


def test_second_repro_does_nothing_in_seconds(copy: Project) -> None:
    began = time.monotonic()
    assert copy.repro() == set()
    assert time.monotonic() - began < 30

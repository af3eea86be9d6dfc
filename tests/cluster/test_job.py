"""`ray job submit -- kava …`, as docs/running.md has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.cluster.nodes import AUTH, running_nodes, settle
from tests.faults.stage import Stage
from tests.stages.project import SCRIPTS


@pytest.mark.slow
def test_a_stage_runs_as_a_job_of_the_cluster(make_stage: Callable[[str], Stage]) -> None:
    """The job's own environment is the submitter's, also where ours would be another."""
    stage = settle(make_stage("generate"), workers=0)
    assert stage.run()[0] == 0
    expected = stage.digests()
    for output in stage.outputs:
        output.rename(output.with_name("before"))
    settle(stage, workers=1)
    with running_nodes("one", include_dashboard=True, dashboard_port=0) as nodes:
        submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
        submit += ["--address", f"http://{nodes.cluster.head_node.webui_url}"]
        submit += ["--runtime-env-json", json.dumps({"env_vars": {"OMP_NUM_THREADS": "2"}})]
        command = f"cd {stage.home} && {SCRIPTS / 'kava'} --log-format json generate"
        done = subprocess.run(
            [*submit, "--", "sh", "-c", f"'{command}'"],
            env={**os.environ, AUTH: os.environ.get(AUTH, "disabled")},
            capture_output=True,
            text=True,
            check=False,
        )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "workers, examples: 0 on" in said, said
    assert "Traceback" not in said, said
    assert stage.digests() == expected

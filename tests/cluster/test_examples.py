"""The examples of docs/running.md can be read by what reads them."""

from __future__ import annotations

import re
import subprocess

import yaml

from tests.stages.project import ROOT


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_slurms_is_a_script() -> None:
    (script,) = blocks("bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert script.startswith("#!/bin/bash\n#SBATCH ")


def test_kuberays_is_a_job_whose_pods_see_one_folder() -> None:
    (job,) = [found for found in map(yaml.safe_load, blocks("yaml")) if "kind" in found]
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert (job["kind"], len(pods)) == ("RayJob", 2)
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for pod in pods:
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert mount["mountPath"] in job["spec"]["entrypoint"]
        assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]

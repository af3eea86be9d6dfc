"""A store is read where it lies on the Hub, without a download of all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.sharing.conftest import Team
from tests.sharing.fake_hub import FakeHub
from tests.stages.project import ROOT

STORE = "hf://datasets/somebody/something/store"
TOKEN = f"hf_{'x' * 34}"
# Its first argument is the store, its second the same one on this disk.
READ = """
import sys
import torch
from click.testing import CliRunner
from kava_core.store import TargetsStore
from stages.store import store_group
for command in (["inspect"], ["verify"], ["verify", "--full"]):
    told = CliRunner().invoke(store_group, [*command, sys.argv[1]])
    print(told.output)
    assert told.exit_code == 0
far, near = (TargetsStore.open(path).batch([20, 3, 11]) for path in sys.argv[1:])
assert torch.equal(far.keys.codes, near.keys.codes)
assert torch.equal(far.endpoint.codes, near.endpoint.codes)
"""


def test_a_store_on_the_hub_is_read_in_place(made: Team, hub: FakeHub, tmp_path: Path) -> None:
    folder = made.data("kv_targets")
    hub.files = {f"store/{file.name}": file.read_bytes() for file in folder.iterdir()}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", READ, STORE, str(folder)],
        cwd=ROOT,
        env={**environment, "KAVA_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{STORE} is whole: every checksum" in done.stdout and TOKEN not in done.stdout
    assert hub.tokens == {f"Bearer {TOKEN}"}
    shards = {path for path in hub.paths if "/resolve/main/store/shard-" in path}
    assert len(shards) == len(list(folder.glob("shard-*")))

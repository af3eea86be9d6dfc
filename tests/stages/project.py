"""A copy of the project in a folder of its own, driven as a person would: by its commands."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent


class Project:
    """A clone at `path` whose active pipeline is `smoke`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.org",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.org",
        }

    @classmethod
    def clone(cls, path: Path) -> Project:
        """Copy what git tracks (and what it would, were it added) and commit it anew."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file() and Path(name).name != "dvc.lock":
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, path / name)
        project = cls(path)
        project.change("pipeline", "smoke")
        for command in (["git", "init", "-q"], ["git", "add", "-A"]):
            project.run(*command)
        project.run("git", "commit", "-q", "-m", "Start")
        return project

    def run(self, *command: str, expect: int = 0) -> str:
        """Run a command here; returns stdout and stderr together."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == expect, f"{command} gave {done.returncode}:\n{done.stdout}"
        return done.stdout

    def kava(self, *arguments: str, expect: int = 0) -> str:
        return self.run(sys.executable, "-m", "stages", *arguments, expect=expect)

    def repro(self) -> set[str]:
        """`dvc repro`; the stages DVC says it ran (not those it restored or skipped)."""
        return ran(self.run("dvc", "repro"))

    def change(self, key: str, value: Any) -> None:
        """Set a dotted key of pipelines.yaml."""
        file = self.path / "pipelines.yaml"
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        section = settings
        *path, last = key.split(".")
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def drop(self, key: str) -> None:
        """Remove a dotted key of pipelines.yaml."""
        file = self.path / "pipelines.yaml"
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        section = settings
        *path, last = key.split(".")
        for name in path:
            section = section[name]
        del section[last]
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def change_line(self, before: str, after: str) -> None:
        """Change one line of pipelines.yaml and leave the rest to the letter."""
        file = self.path / "pipelines.yaml"
        text = file.read_text(encoding="utf-8")
        assert text.count(before) == 1
        file.write_text(text.replace(before, after), encoding="utf-8")

    def kill_when(self, ready: Callable[[], bool], *arguments: str) -> None:
        """Start `kava …` and SIGKILL it and all its children once `ready()`; it must still run."""
        process = subprocess.Popen(
            [sys.executable, "-m", "stages", *arguments],
            cwd=self.path,
            env=self.environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, "the stage ended before it could be killed"
            assert time.monotonic() < deadline, "the stage did not get there in time"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ran(said: str) -> set[str]:
    """The stages that DVC says it ran, without the file they stand in; not the final `show`."""
    found = re.findall(r"Running stage '(?:pipelines/[^/]+/dvc\.yaml:)?([^']+)'", said)
    return set(found) - {"show"}


SMALL = ("kava", "no-cot")
TINY = {"steps": 4, "batch_size": 16}


def small(copy: Project, name: str = "small", **sections: object) -> None:
    """A second pipeline, with two students, in seconds."""
    settings = yaml.safe_load((copy.path / "pipelines.yaml").read_text())["pipelines"]["smoke"]
    settings |= {"students": {k: v for k, v in settings["students"].items() if k in SMALL}}
    for student in settings["students"].values():
        student["training"] = dict(TINY)  # its own: YAML would keep them one
    settings["teacher"]["training"] = dict(TINY)
    settings["prepare"] |= {"train": 64, "validation": 8, "test": 8}
    settings["generate"] = {"shard_size": 32, "batch_size": 16}
    settings["evaluate"] |= {"interpret_records": 0, "similarity_records": 8}
    settings |= {"resources": {"workers": 0}, **sections}
    del settings["fidelity"]
    copy.change(f"pipelines.{name}", settings)
    copy.kava("sync")


def end_session(pid: int) -> None:
    """Kill what is left of a process that was started as a session of its own, and of what it has
    started: nothing is to work on beside the tests that follow."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def digest(folder: Path) -> dict[str, str]:
    """File name → hash of its content, for everything in `folder`, or for that file itself."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted([folder, *folder.rglob("*")])
        if file.is_file()
    }

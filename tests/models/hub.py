"""A cache of the Hub as `huggingface_hub` lays one out, on a machine without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import json, sys
from kava_core.errors import KavaError
from kava_core.models.loading import commit_of, load_model, load_tokenizer, model_fingerprint
found = []
for asked in sys.argv[1:]:
    name, revision = (asked.split("@") + [None])[:2]
    try:
        model = load_model(name, revision=revision)
        found.append({
            "commit": commit_of(name, revision),
            "weight": float(next(model.parameters()).flatten()[0]),
            "fingerprint": model_fingerprint(name, revision),
            "tokens": len(load_tokenizer(name, revision)),
        })
    except KavaError as error:
        found.append({"error": str(error)})
print(json.dumps(found))
"""


def repository_in(home: Path, name: str) -> Path:
    """Where the cache keeps team/`name`."""
    return home / "hub" / f"models--team--{name}"


def asked(hub: Path, *names: str) -> list[dict[str, Any]]:
    """What a machine without a network loads for each name or name@revision."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env={**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found

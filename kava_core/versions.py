"""What each stage computes from the same inputs, as a number.

A stage's number is raised when the stage computes something else from the same inputs and settings:
another loss, another tokenizer, another order, another default. It is what DVC tracks of the code
(`pipelines/versions.yaml`, written by `kava sync`), and what keys unfinished work: a comment, a
rename or a new report reruns nothing that costs, and a new loss cannot be forgotten, since
tests/golden fails when a stage's artefact changes and its number does not.
"""

from __future__ import annotations

VERSIONS = {
    "prepare": 2,
    "teacher": 2,
    "traces": 1,
    "generate": 1,
    "evict": 3,
    "fidelity": 2,
    "distill": 4,
    "evaluate": 4,
    "report": 2,
}

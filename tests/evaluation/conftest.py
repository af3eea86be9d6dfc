"""The tiny system of `tests/evaluation/talker.py`, made once for a file of tests."""

from __future__ import annotations

import pytest

from kava_core.models.latent import LatentReasoner
from kava_core.problems.traces import TraceEncoder
from tests.evaluation.talker import make_encoder, make_talker


@pytest.fixture(scope="module")
def encoder() -> TraceEncoder:
    return make_encoder()


@pytest.fixture(scope="module")
def talker(encoder: TraceEncoder) -> LatentReasoner:
    return make_talker(encoder)

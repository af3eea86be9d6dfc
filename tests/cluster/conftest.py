from __future__ import annotations

from tests.faults.conftest import _homes, make_stage

__all__ = ["_homes", "make_stage"]

"""Tensor memory is counted exactly: by hand, and against torch's own profiler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kava_core.memory import peak_tensor_bytes
from kava_core.models.latent import LatentReasoner
from tests.tiny import PROMPT, tiny_model, tiny_student

CPU = torch.device("cpu")


def profiled(work: Callable[[], object]) -> int:
    """The peak of what torch's allocator gave out, from the profiler's record of every call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_what_is_held_at_once_is_counted_and_what_was_there_is_not() -> None:
    before = torch.ones(1000)

    def work() -> torch.Tensor:
        view = before.view(10, 100)  # no memory of its own
        first = view + 1  # 4,000 bytes
        first += 1
        del first
        second = torch.zeros(500)  # 2,000
        third = view.t() * 2  # 4,000 beside them
        return second.sum() + third.sum()

    assert 6000 <= peak_tensor_bytes(work, CPU) <= 6100


@pytest.mark.parametrize("rows", [2, 16])
def test_answering_is_counted_as_the_allocator_counts_it(rows: int) -> None:
    ids = torch.randint(8, 60, (rows, 12), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    systems: dict[str, LatentReasoner] = {
        "latent": tiny_student("llama"),
        "chain": LatentReasoner.plain(model, answer_prompt_ids=[], eos_token_id=99),
        "at once": LatentReasoner.plain(model, answer_prompt_ids=PROMPT, eos_token_id=99),
    }
    found = {}
    for name, system in systems.items():

        def work(system: LatentReasoner = system, name: str = name) -> object:
            return system.generate(ids, max_new_tokens=40 if name == "chain" else 3)

        found[name] = peak_tensor_bytes(work, CPU)
        assert found[name] == peak_tensor_bytes(work, CPU)
        assert found[name] == pytest.approx(profiled(work), rel=0.02)
    assert found["latent"] > found["at once"] < found["chain"]

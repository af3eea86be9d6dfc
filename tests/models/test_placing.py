"""A teacher that does not fit one GPU, over several: the same numbers, on pretended devices."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from kava_core.errors import KavaError
from kava_core.eviction.policies.rkv import RKV
from kava_core.fidelity import examiner
from kava_core.fidelity.examiner import Examiner, Layers
from kava_core.memory import PeakMemory
from kava_core.models.batching import pad
from kava_core.models.latent import LatentReasoner
from kava_core.models.placing import SHARE, placed
from kava_core.models.teacher_pass import TeacherPass, over
from kava_core.store import Codec
from tests.devices import PretendedDevices
from tests.distill.toy import toy_traces
from tests.targets.caches import with_steps
from tests.tiny import tiny_model

TRACES = with_steps(toy_traces(7))
FAMILIES = ["llama", "gpt2", "gemma3", "qwen3"]


def halves(model: torch.nn.Module) -> list[int]:
    """Room on two GPUs for the model, and not on one."""
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return [int(0.85 * size / SHARE)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_over_traces_is_the_same(family: str) -> None:
    alone = over(TeacherPass(tiny_model(family, torch.float32)), TRACES, 3)
    with PretendedDevices() as devices:
        model = tiny_model(family, torch.float32)
        spread = placed(model, halves(model))
        assert {str(p.device) for p in spread.parameters()} == {"cuda:0", "cuda:1"}
        found = over(TeacherPass(spread), TRACES, 3)
    for name in ("keys", "values", "importance", "endpoint"):
        assert torch.equal(getattr(found, name), getattr(alone, name)), name
    assert {"cuda:0", "cuda:1"} <= set(map(str, devices.seen))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_from_compressed_caches_are_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = PeakMemory(torch.device("cpu"))  # pretended GPUs count nothing
    monkeypatch.setattr(examiner, "PeakMemory", lambda _: here)
    layers = Layers.of("all", "none", 2, "head", 3)

    def answered(asked: Examiner) -> list[object]:
        batch = asked.read(TRACES[:3])
        full = asked.examine(batch, lambda: asked.full(batch))
        kept = asked.compress(batch, RKV(), [2, 2, 2], Codec.from_bits(keys=8, values=8))
        cut = asked.examine(batch, lambda: asked.restore(batch, kept), full)
        return [full.written, full.nll, cut.written, cut.nll, cut.kl]

    alone = answered(Examiner(tiny_model(family, torch.float32), layers, eos=1, max_new_tokens=5))
    with PretendedDevices():
        model = tiny_model(family, torch.float32)
        spread = placed(model, halves(model))
        assert answered(Examiner(spread, layers, eos=1, max_new_tokens=5)) == alone


@pytest.mark.parametrize("prompt", [[], [7, 8]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_that_is_asked_writes_the_same(family: str, prompt: list[int]) -> None:
    """As validation and evaluate ask it: with a written chain, and for the answer at once."""
    ids, mask = pad([trace.question_ids for trace in TRACES[:3]], "left")

    def written(model: PreTrainedModel) -> list[list[int]]:
        system = LatentReasoner.plain(model, answer_prompt_ids=prompt, eos_token_id=1)
        asked = ids.to(system.device), mask.to(system.device)
        found: list[list[int]] = system.generate(*asked, max_new_tokens=6).tolist()
        return found

    alone = written(tiny_model(family, torch.float32))
    with PretendedDevices():
        model = tiny_model(family, torch.float32)
        assert written(placed(model, halves(model))) == alone


def test_what_fits_one_gpu_is_not_spread() -> None:
    model = placed(tiny_model("llama", torch.float32), [1 << 30, 1 << 30])
    assert not hasattr(model, "hf_device_map")


def test_too_small_is_said_with_both_sizes() -> None:
    with pytest.raises(KavaError, match=r"found 2 with 0\.0 GB\. Give a worker more of them"):
        placed(tiny_model("llama", torch.float32), [1000, 1000])


def test_pretended_devices_do_not_mix() -> None:
    with PretendedDevices(), pytest.raises(RuntimeError, match="expected tensors of one device"):
        _ = torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")

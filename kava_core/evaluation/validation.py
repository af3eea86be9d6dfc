"""How well a teacher answers, with a written chain of thought and without."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedModel

from kava_core.console import progress
from kava_core.evaluation.asking import ask, exact_match
from kava_core.models.latent import LatentReasoner
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder


def validate(
    teacher: PreTrainedModel,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """{"n": N, "exact_match_cot", "exact_match_no_cot": in per cent}."""
    found: dict[str, float] = {"n": len(problems)}
    with progress() as display:
        for name, prompt in (("cot", []), ("no_cot", encoder.answer_prompt_ids)):
            task = display.add_task(f"teacher, {name}", total=len(problems), note="")
            replies = ask(
                LatentReasoner.plain(teacher, answer_prompt_ids=prompt, eos_token_id=encoder.eos),
                encoder,
                problems,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                advance=partial(display.advance, task),
            )
            found[f"exact_match_{name}"] = exact_match(replies)
    return found

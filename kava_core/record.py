"""The record: one problem in token ids, as it is taught, stored and asked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Record:
    """Q, C (N_C ids), the answer prompt, and A (N_A ids, the last is the end of sequence).

    The teacher's sequence is question_ids + cot_ids + answer_prompt_ids + answer_ids, so that the
    chain of thought starts at len(question_ids); the *endpoint* is the last token of the answer
    prompt, which follows the steps that latents do not stand for, if there are any. n_steps: the
    number of steps of the problem; answer: its text, "" in a store, which keeps the ids only.

    step_ends: where each step of C ends, as places in cot_ids after its last token, so that the
    last is N_C; results: the places in cot_ids of the tokens that state a step's result. Empty
    where they are not known.
    """

    id: str
    question_ids: list[int]
    cot_ids: list[int]
    answer_prompt_ids: list[int]
    answer_ids: list[int]
    source: str
    topic: str
    n_steps: int
    answer: str = ""
    step_ends: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)

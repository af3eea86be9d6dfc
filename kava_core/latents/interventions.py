"""Whether the latents carry the answer: problems asked again with latents changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random

import torch
from torch import Tensor

from kava_core.answers import same_answer
from kava_core.errors import KavaError
from kava_core.findings.differences import paired_bootstrap
from kava_core.findings.latents import (
    AloneScores,
    Changed,
    Donated,
    Following,
    InterventionScores,
    TogetherScores,
)
from kava_core.findings.scores import wilson
from kava_core.latents.student import latents_fed
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.problems.judge import Verdict, judge
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder

# change(problems [B], i, z [B, n, E]) gives what is fed in place of latents i … i + n − 1.
Change = Callable[[Tensor, int, Tensor], Tensor]


def interventions(
    student: LatentReasoner,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> InterventionScores:
    """Answers with changed latents, as `InterventionScores` says.

    A changed student may write as many tokens as the longest answer that the unchanged one ended
    within max_new_tokens: what runs on after that costs time and is no answer. What the unchanged
    one did not end is held against the others as far as that.
    """
    exam = _Exam(student, encoder, problems, batch_size, max_new_tokens)
    m = student.config.latents
    latents = student.bot.new_zeros(len(problems), m, len(student.bot))  # [N, M, E]

    def keep(chosen: Tensor, first: int, z: Tensor) -> Tensor:
        latents[chosen, first : first + z.shape[1]] = z
        return z

    written = exam.write(keep)
    whole = exam.judge(written)
    exam.max_new_tokens = exam.longest or max_new_tokens
    untouched = exam.judge([row[: exam.max_new_tokens] for row in written])

    def instead(others: Tensor, slots: Sequence[int]) -> list[Verdict]:
        """Answers with others [N, M, E] in these slots."""
        return exam.judge(exam.write(partial(_put, others, slots)))

    def changed(others: Tensor, slots: Sequence[int]) -> Changed:
        return _held_against(untouched, instead(others, slots))

    donors = donors_of([len(p.steps) for p in problems])
    golds = [p.answer for p in problems]

    def donated(donors: Sequence[int], slots: Sequence[int]) -> Donated:
        verdicts = instead(latents[list(donors)], slots)
        follows = _following([golds[i] for i in donors], golds, untouched, verdicts)
        return Donated(**dict(_held_against(untouched, verdicts)), follows=follows)

    zero = torch.zeros_like(latents)
    mean = latents.mean(0, keepdim=True).expand_as(latents)
    every, each = range(m), [[slot] for slot in range(m)]
    shuffled = [_others(m, p.id) for p in problems]
    return InterventionScores(
        n=len(problems),
        none=_percent(whole),
        ci95=wilson(sum(v.correct for v in whole), len(whole)),
        together=TogetherScores(
            removed=changed(zero, every),
            mean=changed(mean, every),
            shuffled=changed(_gathered(latents, shuffled), every) if m > 1 else None,
            donor=donated(donors, every) if donors else None,
        ),
        alone=AloneScores(
            removed=[changed(zero, slots) for slots in each],
            mean=[changed(mean, slots) for slots in each],
            donor=[donated(donors, slots) for slots in each] if donors else None,
        ),
        iterations=[
            _held_against(untouched, verdicts) for verdicts in _after_each_iteration(student, exam)
        ],
    )


def donors_of(steps: Sequence[int]) -> list[int]:
    """Whose latents each problem is given, by index: the next problem with as many steps.

    steps: of each problem. The last with as many takes the first's. One that is alone with its
    number of steps joins those with the next higher number, or the next lower one where none is
    higher. Every problem gives once, never to itself. [] for a single problem, which has no other.
    """
    groups: list[list[int]] = []
    for number in sorted(set(steps)):
        alike = [i for i, n in enumerate(steps) if n == number]
        if groups and len(groups[-1]) == 1:
            groups[-1] += alike
        else:
            groups.append(alike)
    if len(groups[-1]) == 1:
        last = groups.pop()
        if not groups:
            return []
        groups[-1] += last
    donors = [0] * len(steps)
    for group in groups:
        for i, donor in zip(group, [*group[1:], group[0]], strict=True):
            donors[i] = donor
    return donors


def _others(count: int, seed: str) -> list[int]:
    """0 … count − 1 in an order that leaves none in its place, one cycle (Sattolo 1986)."""
    order, random = list(range(count)), Random(seed)
    for i in range(count - 1, 0, -1):
        j = random.randrange(i)
        order[i], order[j] = order[j], order[i]
    return order


def _gathered(latents: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """latents [N, M, E] of each problem in its own order of slots."""
    index = torch.tensor(orders, device=latents.device)[..., None].expand_as(latents)
    return latents.gather(1, index)


def _put(others: Tensor, slots: Sequence[int], chosen: Tensor, first: int, z: Tensor) -> Tensor:
    """A `Change`: others [N, M, E] in these slots."""
    for slot in slots:
        if first <= slot < first + z.shape[1]:
            z[:, slot - first] = others[chosen, slot]
    return z


def _unchanged(_: Tensor, __: int, z: Tensor) -> Tensor:
    return z


def _after_each_iteration(student: LatentReasoner, exam: _Exam) -> Iterator[list[Verdict]]:
    """Answers that read the latents of iteration 0, 1, … T − 1."""
    if student.config.reasoning == "sequential":
        return
    for iteration in range(student.config.iterations):
        with _iterating(student, iteration):
            written = exam.write(_unchanged)
        yield exam.judge(written)


@contextmanager
def _iterating(student: LatentReasoner, iterations: int) -> Iterator[None]:
    """Inside this context the student stops after so many iterations."""
    own = student.config.iterations
    student.config.iterations = iterations
    try:
        yield
    finally:
        student.config.iterations = own


class _Exam:
    """Problems, encoded and batched once, that are asked again and again."""

    def __init__(
        self,
        student: LatentReasoner,
        encoder: TraceEncoder,
        problems: Sequence[Problem],
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        if not problems:
            raise KavaError("there are no problems to ask with changed latents.")
        self.student, self.encoder, self.problems = student, encoder, problems
        self.max_new_tokens = max_new_tokens
        questions = encoder.encode_questions([p.question for p in problems])
        self.batches = [
            (chosen, *pad([questions[i] for i in chosen], "left"))
            for chosen in by_length([len(q) for q in questions], batch_size)
        ]
        self.verdicts: dict[tuple[int, str], Verdict] = {}
        self.longest = 0  # tokens of the longest answer that ended, its end included

    def write(self, change: Change) -> list[list[int]]:
        """The tokens of each answer, without its end."""
        written: list[list[int]] = [[] for _ in self.problems]
        for chosen, ids, mask in self.batches:
            device = self.student.device
            who = torch.tensor(chosen, device=device)
            with latents_fed(self.student, ids.shape[1], partial(change, who)):
                result = self.student.generate(
                    ids.to(device),
                    mask.to(device),
                    max_new_tokens=self.max_new_tokens,
                    return_dict_in_generate=True,
                )
            for i, row in zip(chosen, result.tokens.tolist(), strict=True):
                written[i] = self._ended(row)
        return written

    def judge(self, written: Sequence[list[int]]) -> list[Verdict]:
        """What is read from each answer, and whether it is right."""
        prompted = bool(self.student.config.answer_prompt_ids)
        found = []
        for i, row in enumerate(written):
            text = str(self.encoder.tokenizer.decode(row, skip_special_tokens=True))
            if (i, text) not in self.verdicts:
                verdict = judge(
                    text,
                    self.problems[i].answer,
                    prompted=prompted,
                    answer_prompt=self.encoder.prompt.answer,
                )
                self.verdicts[i, text] = verdict
            found.append(self.verdicts[i, text])
        return found

    def _ended(self, row: list[int]) -> list[int]:
        if self.encoder.eos not in row:
            return row
        end = row.index(self.encoder.eos)
        self.longest = max(self.longest, end + 1)
        return row[:end]


def _percent(verdicts: Sequence[Verdict]) -> float:
    return 100 * sum(v.correct for v in verdicts) / len(verdicts)


def _held_against(untouched: Sequence[Verdict], verdicts: Sequence[Verdict]) -> Changed:
    marks = [v.correct for v in verdicts]
    others = [not _same(a.answer, b.answer) for a, b in zip(untouched, verdicts, strict=True)]
    return Changed(
        exact_match=_percent(verdicts),
        ci95=wilson(sum(marks), len(marks)),
        difference=paired_bootstrap(marks, [v.correct for v in untouched]),
        changed=100 * sum(others) / len(others),
    )


def _same(one: str, other: str) -> bool:
    """Whether two answers are alike; "", from which none could be read, is like itself only."""
    return one == other or (bool(one) and bool(other) and same_answer(one, other))


def _following(
    theirs: Sequence[str],
    own: Sequence[str],
    untouched: Sequence[Verdict],
    verdicts: Sequence[Verdict],
) -> Following | None:
    """theirs, own: the donors' gold answers and the problems'."""
    counted = [i for i, (a, b) in enumerate(zip(theirs, own, strict=True)) if not _same(a, b)]
    if not counted:
        return None

    def followers(given: Sequence[Verdict]) -> int:
        return sum(_same(given[i].answer, theirs[i]) for i in counted)

    n, following = len(counted), followers(verdicts)
    return Following(
        share=100 * following / n,
        ci95=wilson(following, n),
        n=n,
        untouched=100 * followers(untouched) / n,
    )

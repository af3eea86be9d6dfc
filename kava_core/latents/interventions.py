"""What the answer needs of each latent: problems asked again with one latent changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kava_core.errors import KavaError
from kava_core.findings.latents import InterventionScores
from kava_core.latents.student import latents_fed
from kava_core.models.batching import by_length, pad
from kava_core.models.latent import LatentReasoner
from kava_core.problems.judge import judge
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder


def interventions(
    student: LatentReasoner,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> InterventionScores:
    """Exact match with one latent changed, as `InterventionScores` says.

    A changed student may write as many tokens as the longest answer that the unchanged one ended
    within max_new_tokens: what runs on after that costs time and is no answer.
    """
    exam = _Exam(student, encoder, problems, batch_size, max_new_tokens)
    latents = student.bot.new_zeros(len(problems), student.config.latents, len(student.bot))

    def keep(chosen: Tensor, first: int, z: Tensor) -> Tensor:
        latents[chosen, first : first + z.shape[1]] = z
        return z

    def instead(slot: int, others: Tensor) -> float:
        """Exact match with others [N, E] in this slot."""

        def put(chosen: Tensor, first: int, z: Tensor) -> Tensor:
            if first <= slot < first + z.shape[1]:
                z[:, slot - first] = others[chosen]
            return z

        return exam.exact_match(put)

    none = exam.exact_match(keep)
    exam.max_new_tokens = exam.longest or max_new_tokens

    def each(others: Tensor) -> list[float]:
        """By slot; others: [N, M, E]."""
        return [instead(slot, others[:, slot]) for slot in range(others.shape[1])]

    return InterventionScores(
        n=len(problems),
        none=none,
        zero=each(torch.zeros_like(latents)),
        mean=each(latents.mean(0, keepdim=True).expand_as(latents)),
        shuffle=each(latents.roll(-1, 0)),
    )


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
        self.right: dict[tuple[int, str], bool] = {}
        self.longest = 0  # tokens of the longest answer that ended, its end included

    def exact_match(self, change: Callable[[Tensor, int, Tensor], Tensor]) -> float:
        """In per cent; change(problems [B], i, z) is `latents_fed`'s for a batch of problems."""
        correct = 0
        for chosen, ids, mask in self.batches:
            device = self.student.device
            who = torch.tensor(chosen, device=device)
            with latents_fed(self.student, ids.shape[1], partial(change, who)):
                result = self.student.generate(
                    ids.to(device), mask.to(device), max_new_tokens=self.max_new_tokens
                )
            correct += sum(
                self._correct(i, row) for i, row in zip(chosen, result.tokens.tolist(), strict=True)
            )
        return 100 * correct / len(self.problems)

    def _correct(self, i: int, row: list[int]) -> bool:
        eos = self.encoder.eos
        end = len(row)
        if eos in row:
            end = row.index(eos)
            self.longest = max(self.longest, end + 1)
        text = str(self.encoder.tokenizer.decode(row[:end], skip_special_tokens=True))
        if (i, text) not in self.right:
            prompted = bool(self.student.config.answer_prompt_ids)
            self.right[i, text] = judge(text, self.problems[i].answer, prompted=prompted).correct
        return self.right[i, text]

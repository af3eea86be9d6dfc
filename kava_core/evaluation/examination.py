"""One system on one test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kava_core.answers import has_value
from kava_core.errors import KavaError
from kava_core.evaluation.asking import Reply, ask
from kava_core.evaluation.breakdown import operations
from kava_core.evaluation.perplexity import Forced
from kava_core.memory import peak_tensor_bytes
from kava_core.models.batching import by_length, pad
from kava_core.models.context import check_context, context_of
from kava_core.models.latent import LatentReasoner
from kava_core.models.thinking import positions_to_think
from kava_core.problems.records import Problem
from kava_core.problems.traces import TraceEncoder


@dataclass(frozen=True)
class ProblemSet:
    """Problems with what their gold traces are like, in the same order.

    operations: per problem, which of + − × ÷ its steps write; trace_tokens: N_C, 0 without steps.
    """

    name: str
    problems: list[Problem]
    operations: list[list[str]]
    trace_tokens: list[int]

    @classmethod
    def of(cls, name: str, problems: Sequence[Problem], encoder: TraceEncoder) -> ProblemSet:
        """KavaError if there is nothing to ask, or no answer that could be compared."""
        if not problems:
            raise KavaError(f"test set {name} is empty: expected problems. Ask `prepare` for some.")
        if not any(has_value(problem.answer) for problem in problems):
            raise KavaError(
                f"test set {name}: expected numbers or mathematical expressions as answers, found "
                f"none in {len(problems)} problems (the first, {problems[0].id}, has "
                f"{problems[0].answer!r:.60}). Correct what `prepare` reads as the answer."
            )
        chains = encoder.encode_chains([problem.steps for problem in problems])
        return cls(
            name,
            list(problems),
            [operations(problem.steps) for problem in problems],
            [len(chain) for chain in chains],
        )

    def batches(self, encoder: TraceEncoder, batch_size: int) -> list[list[int]]:
        """Indices of problems that are asked together: of similar length, the shortest first."""
        questions = encoder.encode_questions([problem.question for problem in self.problems])
        return by_length([len(question) for question in questions], batch_size)


@dataclass(frozen=True)
class Examination:
    """What a system did with a test set.

    nll: −log p of each token of each gold answer, nats; peak_bytes: of tensors beyond the weights,
    while it answered the batch with the longest questions; hardware: where, in words.
    """

    replies: list[Reply]
    nll: list[list[float]]
    peak_bytes: int
    hardware: Mapping[str, str]


class Examiner:
    """One system before one test set, batch by batch; KavaError if a problem does not fit its
    context."""

    def __init__(
        self,
        system: LatentReasoner,
        encoder: TraceEncoder,
        test_set: ProblemSet,
        *,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        _check_context(system, encoder, test_set, max_new_tokens)
        self.system = system
        self.encoder = encoder
        self.test_set = test_set
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.batches = test_set.batches(encoder, batch_size)

    def peak_bytes(self) -> int:
        """Bytes that answering the batch with the longest questions takes."""
        problems = self.test_set.problems
        questions = sorted(self.encoder.encode_questions([p.question for p in problems]), key=len)
        ids, mask = (x.to(self.system.device) for x in pad(questions[-self.batch_size :], "left"))
        return peak_tensor_bytes(
            partial(self.system.generate, ids, mask, max_new_tokens=self.max_new_tokens),
            self.system.device,
        )

    def warm_up(self) -> None:
        """Write a token: the first run of a model is slow to start, and is not to be timed."""
        first = self.encoder.encode_questions([self.test_set.problems[0].question])
        ids, mask = (x.to(self.system.device) for x in pad(first, "left"))
        self.system.generate(ids, mask, max_new_tokens=1)

    def ask(self, number: int) -> list[Reply]:
        """The replies to batch `number`, in the order of its indices."""
        return ask(
            self.system,
            self.encoder,
            [self.test_set.problems[i] for i in self.batches[number]],
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )

    def forced(self, replies: Sequence[Reply]) -> Forced:
        """What it is to be teacher-forced on, behind its replies to all problems."""
        return Forced.of(self.system, self.encoder, self.test_set.problems, replies)


def _check_context(
    system: LatentReasoner, encoder: TraceEncoder, test_set: ProblemSet, max_new_tokens: int
) -> None:
    """Question, latents and gold answer fit; where positions are learned, all that may be written.

    A model that rotates its keys can write on past its context.
    """
    if context_of(system.decoder.config) is None:
        return
    around = positions_to_think(system.config) + len(encoder.answer_prompt_ids)
    learned = not system.rotary().inv_freq.shape[1]
    questions = encoder.encode_questions([p.question for p in test_set.problems])
    answers = encoder.encode_answers([p.answer for p in test_set.problems])
    for problem, question, answer in zip(test_set.problems, questions, answers, strict=True):
        written = len(answer)
        if learned:
            chain = max_new_tokens if not system.config.answer_prompt_ids else 0
            written = max(max_new_tokens, chain + len(answer))
        check_context(
            system.decoder.config,
            len(question) + around + written,
            what=f"test set {test_set.name}, problem {problem.id}",
            including="latents and answer",
            remedy="Drop long problems in `prepare`"
            + (", or lower evaluate.max_new_tokens." if learned else "."),
        )

"""One system on one test set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kava_core.answers import has_value
from kava_core.errors import KavaError
from kava_core.evaluation.asking import Reply, ask
from kava_core.evaluation.breakdown import operations
from kava_core.evaluation.perplexity import gold_nll
from kava_core.memory import peak_tensor_bytes
from kava_core.models.batching import pad
from kava_core.models.context import check_context, context_of
from kava_core.models.latent import LatentReasoner
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


@dataclass(frozen=True)
class Examination:
    """What a system did with a test set.

    nll: −log p of each token of each gold answer, nats; peak_bytes: of tensors beyond the weights,
    while it answered the batch with the longest questions.
    """

    replies: list[Reply]
    nll: list[list[float]]
    peak_bytes: int


def examine(
    system: LatentReasoner,
    encoder: TraceEncoder,
    test_set: ProblemSet,
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Examination:
    """Ask `system` every problem; KavaError if one does not fit its context."""
    problems = test_set.problems
    _check_context(system, encoder, test_set, max_new_tokens)
    questions = sorted(encoder.encode_questions([p.question for p in problems]), key=len)
    ids, mask = (x.to(system.device) for x in pad(questions[-batch_size:], "left"))
    # Before the clock is looked at: the first run of a model is slow to start.
    peak = peak_tensor_bytes(
        partial(system.generate, ids, mask, max_new_tokens=max_new_tokens), system.device
    )
    replies = ask(
        system,
        encoder,
        problems,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        advance=advance,
    )
    nll = gold_nll(system, encoder, problems, replies, batch_size=batch_size)
    return Examination(replies, nll, peak)


def _check_context(
    system: LatentReasoner, encoder: TraceEncoder, test_set: ProblemSet, max_new_tokens: int
) -> None:
    """Question, latents and gold answer fit; where positions are learned, all that may be written.

    A model that rotates its keys can write on past its context.
    """
    if context_of(system.decoder.config) is None:
        return
    latents = system.config.latents
    around = (latents + 2 if latents else 0) + len(encoder.answer_prompt_ids)
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

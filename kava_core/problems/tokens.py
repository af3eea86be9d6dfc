"""What a known tokenizer says of problems: how long they are, and whether it can write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kava_core.problems.records import Problem
from kava_core.problems.rows import BadRow
from kava_core.problems.traces import TraceEncoder

_AT_ONCE = 1024  # problems


@dataclass(frozen=True)
class TokenRules:
    """Limits in the tokens of `encoder`; None is no limit.

    N_Q, with the token that begins a sequence if there is one, and N_C, of the whole chain.
    """

    encoder: TraceEncoder
    max_question_tokens: int | None = None
    max_trace_tokens: int | None = None

    def broken(
        self, problems: Sequence[Problem], places: Sequence[str], taught: bool
    ) -> Iterator[str | BadRow | None]:
        """What is wrong with each problem: a limit in words, a fault, or nothing (None).

        places: where each stands. As limits in characters, those of traces are for what is taught.
        """
        for start in range(0, len(problems), _AT_ONCE):
            some = problems[start : start + _AT_ONCE]
            for place, (question, trace, fault) in zip(
                places[start : start + _AT_ONCE], self.encoder.measure(some), strict=True
            ):
                if fault is not None:
                    yield BadRow(
                        place,
                        "a text that the tokenizer can write",
                        f"one that {fault}",
                        "Mend the text, or use another tokenizer.",
                    )
                elif self.max_question_tokens is not None and question > self.max_question_tokens:
                    yield f"question longer than {self.max_question_tokens} tokens"
                elif taught and self.max_trace_tokens is not None and trace > self.max_trace_tokens:
                    yield f"trace longer than {self.max_trace_tokens} tokens"
                else:
                    yield None

    def lengths(self, problems: Sequence[Problem]) -> tuple[list[int], list[int]]:
        """N_Q and N_C of each problem."""
        questions = self.encoder.encode_questions([problem.question for problem in problems])
        chains = self.encoder.encode_chains([problem.steps for problem in problems])
        return [len(ids) for ids in questions], [len(ids) for ids in chains]

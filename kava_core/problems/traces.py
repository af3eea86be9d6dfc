"""Problem → Record: token ids with exact spans.

Each piece (question, chain of thought, answer prompt, answer) is tokenised on its own and the ids
are concatenated, so that no token reaches across a border whatever the tokenizer merges. The
teacher's sequence is `question_ids + cot_ids + answer_prompt_ids + answer_ids`; its CoT span
starts at `len(question_ids)`, and the *endpoint* is the last token of the answer prompt.

Where latents stand for a part of the trace only, the steps behind that part, which the student
writes, are the beginning of `answer_prompt_ids`: sequence and endpoint stay what they are.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import get_args

from transformers import PreTrainedTokenizerBase

from kava_core.errors import KavaError
from kava_core.problems.records import Problem, TraceForm
from kava_core.record import Record

ANSWER_PROMPT = "The answer is:"
# Where a step states its result: behind the last "=", or it is nothing else.
_STATED: dict[TraceForm, re.Pattern[str]] = {
    "equations": re.compile(r"=\s*([^=<>]+?)\s*(?:>>)?\s*$"),
    "results": re.compile(r"^\s*(.*?)\s*$"),
    "checked": re.compile(r"=\s*([^=]+?)\s*$"),
}


class TraceEncoder:
    """Turns problems into traces with one tokenizer.

    Equations are joined without anything between them, sentences end in a line end each, a blank
    stands before each result, checked or not (`traces`). The first `latent_fraction` of a problem's
    steps, rounded up, are C. `bos` stands first in the question if the tokenizer has one and would
    put it there itself. KavaError if the tokenizer has no end-of-sequence token, or cannot write
    the answer prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        traces: TraceForm = "equations",
        latent_fraction: float = 1.0,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise KavaError(
                "Expected a tokenizer with an end-of-sequence token, found none: answers could "
                "not end. Set the tokenizer's `eos_token`."
            )
        if traces not in get_args(TraceForm):
            forms = ", ".join(get_args(TraceForm))
            raise KavaError(f"Expected `traces` to be one of {forms}, found {traces!r}.")
        self.tokenizer = tokenizer
        self.traces = traces
        self.latent_fraction = latent_fraction
        self.eos: int = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("1")["input_ids"][:1] == [bos]
        self.first: list[int] = [bos] if adds_bos else []
        self._special = frozenset(tokenizer.all_special_ids)
        self.answer_prompt_ids: list[int] = self._ids([ANSWER_PROMPT])[0]
        if not self.answer_prompt_ids or self._special.intersection(self.answer_prompt_ids):
            raise KavaError(
                f"The tokenizer cannot write {ANSWER_PROMPT!r} in ordinary tokens. Use another."
            )

    def question_text(self, question: str) -> str:
        """The question as it is tokenised."""
        return question + "\n"

    def cot_text(self, steps: Sequence[str]) -> str:
        """The chain of thought as it is tokenised."""
        return "".join(self._step_texts(steps))

    def _step_texts(self, steps: Sequence[str]) -> list[str]:
        """Each step as it stands in the chain."""
        before = " " if self.traces in ("results", "checked") else ""
        after = "\n" if self.traces == "sentences" else ""
        return [f"{before}{step}{after}" for step in steps]

    def encode(self, problem: Problem) -> Record:
        """The trace of one problem; KavaError as `encode_all`."""
        return self.encode_all([problem])[0]

    def encode_all(self, problems: Sequence[Problem]) -> list[Record]:
        """The traces of many problems, in their order, tokenised in one call per kind of piece.

        KavaError, naming the problem, if its trace or answer is empty, if its text holds one of
        the tokenizer's special tokens, or if decoding the ids does not give the text back (white
        space aside): such a tokenizer would teach something else than the problem.
        """
        if not problems:
            return []
        for problem in problems:
            if not self.cot_text(problem.steps).strip():
                raise KavaError(f"Problem {problem.id} has an empty trace. Remove it or mend it.")
            if not problem.answer.strip():
                raise KavaError(f"Problem {problem.id} has an empty answer. Remove it or mend it.")
        questions = self._ids([self.question_text(problem.question) for problem in problems])
        cuts = [self._latent_steps(problem) for problem in problems]
        latent = [problem.steps[:cut] for problem, cut in zip(problems, cuts, strict=True)]
        rest = [problem.steps[cut:] for problem, cut in zip(problems, cuts, strict=True)]
        cots = self.encode_chains(latent)
        places = self._places(latent)
        prompts = [ids + self.answer_prompt_ids for ids in self.encode_chains(rest)]
        answers = self.encode_answers([problem.answer for problem in problems])
        written = [
            q + c + p + a[:-1] for q, c, p, a in zip(questions, cots, prompts, answers, strict=True)
        ]
        self._check(problems, written)
        return [
            Record(
                id=problem.id,
                question_ids=self.first + question,
                cot_ids=cot,
                answer_prompt_ids=prompt,
                answer_ids=answer,
                source=problem.source,
                topic=problem.topic,
                n_steps=len(problem.steps),
                answer=problem.answer,
                step_ends=ends,
                results=results,
            )
            for problem, question, cot, prompt, answer, (ends, results) in zip(
                problems, questions, cots, prompts, answers, places, strict=True
            )
        ]

    def encode_questions(self, questions: Sequence[str]) -> list[list[int]]:
        """The question ids of bare questions, as `encode` makes them."""
        if not questions:
            return []
        texts = [self.question_text(question) for question in questions]
        return [self.first + ids for ids in self._ids(texts)]

    def encode_chains(self, chains: Sequence[Sequence[str]]) -> list[list[int]]:
        """The ids of chains of steps, as `encode` makes them; none of a chain without steps."""
        return self._ids([self.cot_text(steps) for steps in chains]) if chains else []

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """The ids of bare answers, as `encode` makes them: the last is eos."""
        return (
            [[*ids, self.eos] for ids in self._ids([" " + a for a in answers])] if answers else []
        )

    def _latent_steps(self, problem: Problem) -> int:
        # Rounded first, or 0.6 of 5 steps would be 4 on some fractions' last bit.
        return math.ceil(round(self.latent_fraction * len(problem.steps), 9))

    def _places(self, chains: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int]]]:
        """Where steps end in the ids of chains, and which tokens state their results (`Record`).

        A token that reaches over the end of a step belongs to that step. Both are empty where the
        tokenizer does not say which characters a token stands for.
        """
        if not self.tokenizer.is_fast or not chains:
            return [([], []) for _ in chains]
        spans = self.tokenizer(
            [self.cot_text(steps) for steps in chains],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )["offset_mapping"]
        return [self._places_of(steps, of) for steps, of in zip(chains, spans, strict=True)]

    def _places_of(
        self, steps: Sequence[str], spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        """spans: of the chain's characters, of each token."""
        starts = [start for start, _ in spans]
        ends: list[int] = []
        results: set[int] = set()
        begin = 0
        for text in self._step_texts(steps):
            end = bisect_left(starts, begin + len(text))  # the tokens that begin before the end
            if end > (ends[-1] if ends else 0):
                ends.append(end)
            stated = _STATED[self.traces].search(text) if self.traces in _STATED else None
            if stated:
                first, last = begin + stated.start(1), begin + stated.end(1)
                results |= {i for i, (a, b) in enumerate(spans) if a < last and b > first}
            begin += len(text)
        return ends, sorted(results)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a long trace is checked against the model's length, not here
        )["input_ids"]
        return ids

    def _check(self, problems: Sequence[Problem], written: list[list[int]]) -> None:
        texts = self.tokenizer.batch_decode(
            written, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        for problem, ids, text in zip(problems, written, texts, strict=True):
            special = self._special.intersection(ids)
            if special:
                names = self.tokenizer.convert_ids_to_tokens(sorted(special))
                raise KavaError(
                    f"Problem {problem.id} turns into the tokenizer's special tokens {names}. "
                    "Remove them from its text, or use a tokenizer that knows its characters."
                )
            expected = (
                self.question_text(problem.question)
                + self.cot_text(problem.steps)
                + ANSWER_PROMPT
                + problem.answer
            )
            if "".join(text.split()) != "".join(expected.split()):
                raise KavaError(
                    f"Problem {problem.id} does not survive the tokenizer: expected "
                    f"{expected!r}, decoding gives {text!r}. Use another tokenizer."
                )

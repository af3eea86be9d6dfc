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
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, cast, get_args

from transformers import PreTrainedTokenizerBase

from kava_core.artefacts import fingerprint
from kava_core.errors import KavaError
from kava_core.problems.prompt import PLAIN, Prompt
from kava_core.problems.records import Problem, TraceForm
from kava_core.record import Record

PART = 1_024  # problems that are encoded together where there are many
_CALL = 128  # of them, that a tokenizer is given at once: of a token it keeps a hundred bytes
_NAMED = 20  # problems in a message
_PROBE = "How many?"
# Before a chat template that writes today's date, so that it writes the same one every day: that
# which Llama-3.2's falls back on.
CLOCK = "strftime_now"
STOPPED = f"{{% macro {CLOCK}(format) %}}26 Jul 2024{{% endmacro +%}}"
# Where a step states its result: behind the last "=", or it is nothing else.
_STATED: dict[TraceForm, re.Pattern[str]] = {
    "equations": re.compile(r"=\s*([^=<>]+?)\s*(?:>>)?\s*$"),
    "results": re.compile(r"^\s*(.*?)\s*$"),
    "checked": re.compile(r"=\s*([^=]+?)\s*$"),
}


class Measured(NamedTuple):
    """N_Q (with bos, if there is one, and all that the prompt puts around the question) and N_C of
    the whole chain; fault: why the tokenizer cannot write the problem, in words, None if it can."""

    question_tokens: int
    trace_tokens: int
    fault: str | None


def chat_fingerprint(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """`chat_template` → a hash of the tokenizer's, by which a chat is the same one; else nothing.

    The tokenizer's own fingerprint says nothing of it.
    """
    template = tokenizer.chat_template if prompt.chat else None
    return {"chat_template": fingerprint(template)} if template else {}


class TraceEncoder:
    """Turns problems into traces with one tokenizer.

    Equations are joined without anything between them, sentences end in a line end each, a blank
    stands before each result, checked or not (`traces`). The first `latent_fraction` of a problem's
    steps, rounded up, are C. `bos` stands first in the question if the tokenizer has one and would
    put it there itself; in a chat the template says what does. KavaError if the tokenizer has no
    end-of-sequence token, cannot write the answer prompt, has no one token that is the stop, or no
    chat template that writes a question where the prompt is a chat.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        traces: TraceForm = "equations",
        latent_fraction: float = 1.0,
        prompt: Prompt = PLAIN,
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
        self.prompt = prompt
        self.eos: int = tokenizer.eos_token_id if prompt.stop is None else self._stop(prompt.stop)
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("1")["input_ids"][:1] == [bos]
        self.first: list[int] = [bos] if adds_bos and not prompt.chat else []
        # Not all that a chat template writes has a name among the tokenizer's special tokens.
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(tokenizer.all_special_ids) | {
            token for token, about in added.items() if about.special
        }
        self.answer_prompt_ids: list[int] = self._ids([prompt.answer])[0]
        if not self.answer_prompt_ids or self._ending.intersection(self.answer_prompt_ids):
            raise KavaError(
                f"The tokenizer cannot write {prompt.answer!r} in ordinary tokens. Use another."
            )
        if prompt.chat:
            self._check_chat()
        elif prompt.examples:
            self.first = self.first + self._shots()

    def question_texts(self, questions: Sequence[str]) -> list[str]:
        """Questions as they are tokenised, with what the prompt puts around them."""
        if self.prompt.chat and questions:
            return self._chats(questions)
        return [self.prompt.asked(question) for question in questions]

    def turns(self, question: str) -> list[dict[str, str]]:
        """The chat that asks a question: the turns of the examples, and its own."""
        before = [
            {"role": role, "content": content}
            for e in self.prompt.examples
            for role, content in (
                ("user", self.prompt.asked(e.question)),
                ("assistant", f"{self.cot_text(e.steps)}{self.prompt.answer} {e.answer}"),
            )
        ]
        return [*before, {"role": "user", "content": self.prompt.asked(question)}]

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
        """The traces of many problems, in their order.

        KavaError, naming all such problems, if a trace or an answer is empty, if a text holds one
        of the tokenizer's special tokens, or if decoding the ids does not give the text back (white
        space aside): such a tokenizer would teach something else than the problem.
        """
        records, wrong = self._encoded(problems)
        _refuse(wrong, len(problems))
        return records

    def encode_parts(self, problems: Iterable[Problem]) -> Iterator[list[Record]]:
        """As `encode_all`, PART problems at a time, so that memory does not grow with their number.

        Parts behind one that holds a faulty problem are not given, but looked through: the
        KavaError at the end names all.
        """
        wrong: list[tuple[str, str]] = []
        count = 0
        rest = iter(problems)
        while part := list(islice(rest, PART)):
            records, faulty = self._encoded(part)
            wrong += faulty
            count += len(part)
            if not wrong:
                yield records
        _refuse(wrong, count)

    def _encoded(self, problems: Sequence[Problem]) -> tuple[list[Record], list[tuple[str, str]]]:
        """The traces, and the id of each problem with a fault, with the fault."""
        records: list[Record] = []
        wrong: list[tuple[str, str]] = []
        for first in range(0, len(problems), _CALL):
            found, faulty = self._encoded_at_once(problems[first : first + _CALL])
            records += found
            wrong += faulty
        return records, wrong

    def _encoded_at_once(
        self, problems: Sequence[Problem]
    ) -> tuple[list[Record], list[tuple[str, str]]]:
        texts = self.question_texts([problem.question for problem in problems])
        questions = self._ids(texts)
        cuts = [self._latent_steps(problem) for problem in problems]
        latent = [problem.steps[:cut] for problem, cut in zip(problems, cuts, strict=True)]
        rest = [problem.steps[cut:] for problem, cut in zip(problems, cuts, strict=True)]
        cots = self.encode_chains(latent)
        places = self._places(latent)
        prompts = [ids + self.answer_prompt_ids for ids in self.encode_chains(rest)]
        answers = self.encode_answers([problem.answer for problem in problems])
        written = [c + p + a[:-1] for c, p, a in zip(cots, prompts, answers, strict=True)]
        lost = self._lost(problems, texts, questions, written)
        wrong = [
            (problem.id, fault)
            for problem, other in zip(problems, lost, strict=True)
            if (fault := self._empty(problem) or other)
        ]
        records = [
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
        return records, wrong

    def measure(self, problems: Sequence[Problem]) -> list[Measured]:
        """How many tokens each problem has, and whether this tokenizer can write it at all."""
        if not problems:
            return []
        texts = self.question_texts([problem.question for problem in problems])
        questions = self._ids(texts)
        chains = self.encode_chains([problem.steps for problem in problems])
        answers = self.encode_answers([problem.answer for problem in problems])
        written = [
            c + self.answer_prompt_ids + a[:-1] for c, a in zip(chains, answers, strict=True)
        ]
        faults = self._lost(problems, texts, questions, written)
        return [
            Measured(len(self.first) + len(q), len(c), fault)
            for q, c, fault in zip(questions, chains, faults, strict=True)
        ]

    def encode_questions(self, questions: Sequence[str]) -> list[list[int]]:
        """The question ids of bare questions, as `encode` makes them."""
        if not questions:
            return []
        return [self.first + ids for ids in self._ids(self.question_texts(questions))]

    def encode_chains(self, chains: Sequence[Sequence[str]]) -> list[list[int]]:
        """The ids of chains of steps, as `encode` makes them; none of a chain without steps."""
        return self._ids([self.cot_text(steps) for steps in chains]) if chains else []

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """The ids of bare answers, as `encode` makes them: the last is `eos`, or the stop."""
        return (
            [[*ids, self.eos] for ids in self._ids([" " + a for a in answers])] if answers else []
        )

    @property
    def _ending(self) -> frozenset[int]:
        """Tokens that nothing written may hold."""
        return self._special | {self.eos}

    def _stop(self, text: str) -> int:
        """The token that is the text."""
        ids = self._ids([text])[0]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise KavaError(
                f"prepare.prompt.stop: expected one token of the tokenizer, found {text!r}, which "
                f"is {len(ids)} ({', '.join(map(repr, pieces))}). Name a token that ends an answer."
            )
        return ids[0]

    def _shots(self) -> list[int]:
        """The ids of the examples, each piece as it is in a problem."""
        examples = [
            Problem(f"prepare.prompt.examples.{i}", e.question, e.steps, e.answer, "", "")
            for i, e in enumerate(self.prompt.examples)
        ]
        apart = [self.eos] if self.prompt.stop is not None else self._ids(["\n\n"])[0]
        return [
            token
            for shot in self.encode_all(examples)
            for token in shot.question_ids[len(self.first) :]
            + shot.cot_ids
            + shot.answer_prompt_ids
            + shot.answer_ids[:-1]
            + apart
        ]

    def _check_chat(self) -> None:
        if not self.tokenizer.chat_template:
            raise KavaError(
                "prepare.prompt.chat: expected a tokenizer with a chat template, found none in "
                f"{self.tokenizer.name_or_path!r}. Name a chat model (often called Instruct), or "
                "leave `chat` out."
            )
        (asked,) = self.question_texts([_PROBE])
        if self.prompt.asked(_PROBE).strip() not in asked:
            raise KavaError(
                "prepare.prompt.chat: expected a chat template that writes the user's turn, and "
                f"the tokenizer's makes {asked!r} of {self.prompt.asked(_PROBE)!r}. Leave `chat` "
                "out, or use another tokenizer."
            )

    def _chats(self, questions: Sequence[str]) -> list[str]:
        """Chats that end where the model's turn begins."""
        try:
            template = self.tokenizer.get_chat_template()
            texts = self.tokenizer.apply_chat_template(
                [self.turns(question) for question in questions],
                chat_template=STOPPED + template if CLOCK in template else template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program of its own
            raise KavaError(
                f"prepare.prompt.chat: the tokenizer's chat template cannot be used ({error}). "
                "Leave `chat` out, or use another tokenizer."
            ) from None
        return cast(list[str], texts)

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

    def _empty(self, problem: Problem) -> str | None:
        if not self.cot_text(problem.steps).strip():
            return "has an empty trace"
        return None if problem.answer.strip() else "has an empty answer"

    def _lost(
        self,
        problems: Sequence[Problem],
        texts: Sequence[str],
        questions: list[list[int]],
        written: list[list[int]],
    ) -> list[str | None]:
        """What the ids of each problem are, if they are not its text.

        texts, questions: as they are asked, and their ids; written: the ids of all that follows.
        """
        decoded = self.tokenizer.batch_decode(
            [question + rest for question, rest in zip(questions, written, strict=True)],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        own = questions
        if self.prompt.chat:  # special tokens are the template's, and none of the user's turn
            own = self._ids([self.prompt.asked(problem.question) for problem in problems])
        found: list[str | None] = []
        for problem, asked, question, rest, text in zip(
            problems, texts, own, written, decoded, strict=True
        ):
            special = self._special.intersection(question + rest)
            expected = asked + self.cot_text(problem.steps) + self.prompt.answer + problem.answer
            if special:
                names = self.tokenizer.convert_ids_to_tokens(sorted(special))
                found.append(f"turns into the tokenizer's special tokens {names}")
            elif self.eos in rest:
                found.append(
                    f"holds {self.prompt.stop!r} before its answer ends (`prepare.prompt.stop`)"
                )
            elif (given := "".join(text.split())) != (wanted := "".join(expected.split())):
                found.append(
                    f"does not survive the tokenizer: {_around(wanted, given)} becomes "
                    f"{_around(given, wanted)}"
                )
            else:
                found.append(None)
        return found


def _around(text: str, other: str) -> str:
    """The part of a text where it begins to differ from another, quoted."""
    differ = (i for i, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    same = next(differ, min(len(text), len(other)))
    return repr(text[max(0, same - 20) : same + 20])


def _refuse(wrong: Sequence[tuple[str, str]], of: int) -> None:
    """KavaError that names every problem with a fault, if there is one.

    wrong: ids and faults; of: how many problems there are.
    """
    if not wrong:
        return
    first, others = wrong[0], [name for name, _ in wrong[1:]]
    named = ", ".join(others[:_NAMED]) + (" …" if len(others) > _NAMED else "")
    raise KavaError(
        f"Problem {first[0]} {first[1]}"
        + (f"; {len(others)} of {of} others cannot be used either ({named})" * bool(others))
        + ". Mend or remove what is wrong; where `prepare.tokenizer` is the teacher's model, "
        "`prepare.on_bad_record: drop` leaves it out."
    )

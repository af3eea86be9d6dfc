"""How many problems there are, and how long: read where they are, drawn, or assumed and said."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kava_core.errors import KavaError
from kava_core.models.inspection import look_at
from kava_core.models.loading import load_tokenizer
from kava_core.planning.published import Digits, Published, published, published_model
from kava_core.problems.folder import open_problems
from kava_core.problems.prompt import ANSWER_PROMPT, Prompt
from kava_core.problems.records import Problem, TraceForm
from kava_core.problems.sources import GeneratedSource
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Pipeline

SAMPLE = 2048  # problems that lengths are taken from
_PROMPT_TOKENS = 4  # "The answer is:" in the published tokenizers
_CHAT_TOKENS = 30  # around a question and an answer, in published chat templates
_LEVELS = [(i + 0.5) / 99 for i in range(99)]


@dataclass(frozen=True)
class Lengths:
    """Tokens of the training problems.

    problems: how many there are; test: how many are asked. question, trace, prompt, answer: [n] of
    a sample; prompt: of the answer prompt, with the steps that latents do not stand for.
    vocabulary: of the tokenizer, where there is one. origin: where all this is from, in words.
    """

    problems: int
    test: int
    question: np.ndarray
    trace: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray
    vocabulary: int | None
    origin: str

    @property
    def whole(self) -> np.ndarray:
        """Q, C, the answer prompt and A together."""
        return self.question + self.trace + self.prompt + self.answer

    def trace_tokens(self) -> int:
        """ΣN_C over all training problems."""
        return round(float(self.trace.mean()) * self.problems)


def longest(lengths: np.ndarray, batch: int) -> float:
    """What a batch of random records is padded to: the expected longest of `batch`."""
    return float(np.quantile(lengths, batch / (batch + 1)))


def lengths_of(settings: Pipeline, folder: Path) -> Lengths:
    """Those of a pipeline whose artefacts are, or will be, in `folder`.

    KavaError if the problems are not there yet and nothing is published of their source.
    """
    tokenizer = _tokenizer(settings, folder)
    if (folder / "problems" / "problems.json").is_file():
        source = open_problems(folder / "problems")
        train = source.open("train")
        sample = train[:: max(1, len(train) // SAMPLE)]
        return _counted(
            settings, sample, source.traces, tokenizer, len(train), f"{folder / 'problems'}"
        )
    generated = settings.prepare.source
    if isinstance(generated, GeneratedSource):
        train_size = settings.prepare.train or SAMPLE
        drawn = generated.splits(
            min(train_size, SAMPLE),
            settings.prepare.validation,
            settings.prepare.test or 1,
            seed=settings.prepare.seed,
            traces=settings.prepare.traces,
        )
        origin = f"{len(drawn.train)} problems drawn from {generated.name}"
        return _counted(
            settings, drawn.train, settings.prepare.traces, tokenizer, train_size, origin
        )
    return _assumed(settings, published())


def _counted(
    settings: Pipeline,
    sample: Sequence[Problem],
    traces: TraceForm,
    tokenizer: PreTrainedTokenizerBase | None,
    problems: int,
    origin: str,
) -> Lengths:
    """Of problems that are at hand, by the tokenizer or by the pieces that it would cut."""
    fraction, prompt = settings.generate.latent_fraction, settings.prepare.prompt
    test = _asked(settings)
    if tokenizer is None and settings.teacher.model == "scratch":
        texts = [
            text
            for p in sample
            for text in (
                prompt.asked(p.question),
                "\n".join(p.steps),
                f"{prompt.answer} {p.answer}",
            )
        ]
        tokenizer = train_tokenizer(texts, settings.teacher.scratch.vocabulary)
    if tokenizer is not None:
        records = TraceEncoder(tokenizer, traces, fraction, prompt).encode_all(sample)
        return Lengths(
            problems,
            test,
            question=np.array([len(record.question_ids) for record in records]),
            trace=np.array([len(record.cot_ids) for record in records]),
            prompt=np.array([len(record.answer_prompt_ids) for record in records]),
            answer=np.array([len(record.answer_ids) for record in records]),
            vocabulary=len(tokenizer),
            origin=origin,
        )
    pieces = _pieces(settings.teacher.model)
    chains = np.array([pieces("".join(p.steps)) for p in sample])
    around, before = _prompted(prompt, pieces)
    return Lengths(
        problems,
        test,
        np.array([pieces(p.question) + 1 + around for p in sample]),
        np.maximum(1, chains * fraction).round(),
        before + (chains * (1 - fraction)).round(),
        np.array([pieces(p.answer) + 2 for p in sample]),
        vocabulary=None,
        origin=f"{origin}, tokens assumed: no tokenizer of {settings.teacher.model} is here",
    )


def _assumed(settings: Pipeline, known: Published) -> Lengths:
    """Of problems that are not at hand: what is published of their source."""
    name, traces = settings.prepare.source.name, settings.prepare.traces
    data = known.data.get(name)
    table = known.lengths[data.lengths][_digits(settings.teacher.model)] if data else {}
    problems = settings.prepare.train or (data.train if data else None)
    if problems is None or traces not in table:
        raise KavaError(
            f"nothing is published of how many problems {name} has, or how long their {traces} "
            "are. Run `kava prepare` first: it needs no model."
        )
    fraction = settings.generate.latent_fraction
    around, before = _prompted(settings.prepare.prompt, _pieces(settings.teacher.model))
    chain = _spread(*table[traces])
    return Lengths(
        problems,
        _asked(settings),
        _spread(*table["question"]) + around,
        np.maximum(1, chain * fraction).round(),
        before + (chain * (1 - fraction)).round(),
        _spread(*table["answer"]),
        vocabulary=None,
        origin=f"assumed: what is published of {name} (run `kava prepare` to count them)",
    )


def _prompted(prompt: Prompt, pieces: Callable[[str], int]) -> tuple[int, int]:
    """Tokens around a question beside its line end, and those of the answer prompt."""
    around = 0 if prompt.question is None else pieces(prompt.asked(""))
    around += _CHAT_TOKENS * prompt.chat * (1 + len(prompt.examples))
    for e in prompt.examples:
        around += pieces(f"{prompt.asked(e.question)}{''.join(e.steps)}{prompt.answer} {e.answer}")
    known = prompt.answer == ANSWER_PROMPT
    return around, _PROMPT_TOKENS if known else pieces(prompt.answer)


def _asked(settings: Pipeline) -> int:
    """Problems of all test sets, where it is known or set; each is cut to evaluate.limit."""
    data, limit = published().data, settings.evaluate.limit

    def of(source: str, given: int | None) -> int:
        size = given or (data[source].test if source in data else None) or 0
        return min(size, limit) if limit else size

    own = of(settings.prepare.source.name, settings.prepare.test)
    return own + sum(
        of(each.source.name, each.size) for each in settings.prepare.test_sets.values()
    )


def _spread(mean: float, high: float) -> np.ndarray:
    """[99] lengths around a mean whose 99th percentile is `high`: a normal, cut off at 1."""
    normal = NormalDist(mean, (high - mean) / NormalDist().inv_cdf(0.99))
    return np.maximum(1, np.array([normal.inv_cdf(level) for level in _LEVELS])).round()


def _tokenizer(settings: Pipeline, folder: Path) -> PreTrainedTokenizerBase | None:
    """The teacher's, if it is on this machine."""
    if (folder / "teacher" / "tokenizer.json").is_file():
        return load_tokenizer(str(folder / "teacher"))
    model = settings.teacher.model
    if model == "scratch":
        return None
    if Path(model).is_dir():
        return load_tokenizer(model)
    look_at("tokenizer", model, settings.teacher.revision)
    try:
        return AutoTokenizer.from_pretrained(
            model,
            revision=settings.teacher.revision,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError):
        return None


def _digits(model: str) -> Digits:
    known = published_model(model)
    return known.tokenizer.named if known else "one"


def _pieces(model: str) -> Callable[[str], int]:
    """How many pieces the model's tokenizer cuts a text into before it merges anything."""
    digits = r"\d{1,3}" if _digits(model) == "three" else r"\d"
    pattern = re.compile(rf"'\w\w?|[^\r\n\w]?[^\W\d_]+|{digits}| ?[^\s\w]+[\r\n]*|\s+")
    return lambda text: len(pattern.findall(text))

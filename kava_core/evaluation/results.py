"""One system on one test set, and the files that all of them together make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kava_core.answers import has_value
from kava_core.artefacts import write_json
from kava_core.errors import KavaError
from kava_core.evaluation.accuracy import Prediction, ask, summarise
from kava_core.evaluation.breakdown import accuracy_by, length_bin, operations
from kava_core.evaluation.comparisons import compare
from kava_core.evaluation.memory import peak_tensor_bytes
from kava_core.evaluation.perplexity import gold_nll, perplexity
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
class Examined:
    """What a system did with a test set.

    nll: −log p of each token of each gold answer, nats; peak_bytes: of tensors beyond the weights,
    while it answered the batch with the longest questions.
    """

    predictions: list[Prediction]
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
) -> Examined:
    """Ask `system` every problem; KavaError if one does not fit its context."""
    problems = test_set.problems
    _check_context(system, encoder, test_set, max_new_tokens)
    questions = sorted(encoder.encode_questions([p.question for p in problems]), key=len)
    ids, mask = (x.to(system.device) for x in pad(questions[-batch_size:], "left"))
    # Before the clock is looked at: the first run of a model is slow to start.
    peak = peak_tensor_bytes(
        partial(system.generate, ids, mask, max_new_tokens=max_new_tokens), system.device
    )
    predictions = ask(
        system,
        encoder.tokenizer,
        encoder,
        problems,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        advance=advance,
    )
    nll = gold_nll(system, encoder, problems, predictions, batch_size=batch_size)
    return Examined(predictions, nll, peak)


def score(examined: Examined, test_set: ProblemSet) -> dict[str, Any]:
    """The entry of metrics.json: `summarise`, and

    perplexity of the gold answers, peak_memory_mb (10⁶ bytes, for a batch), by_operation and
    by_trace_length as by_steps: {label: {exact_match, n}}. A problem with several operations counts
    under each of them.
    """
    marks = [prediction.correct for prediction in examined.predictions]
    return {
        **summarise(examined.predictions),
        "perplexity": perplexity(examined.nll),
        "peak_memory_mb": examined.peak_bytes / 1e6,
        "by_operation": accuracy_by(test_set.operations, marks),
        "by_trace_length": accuracy_by([[length_bin(n)] for n in test_set.trace_tokens], marks),
    }


def write_results(
    folder: Path,
    test_sets: Sequence[ProblemSet],
    examined: Mapping[str, Mapping[str, Examined]],
    students: Sequence[str],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Write the artefact's files; returns what is in metrics.json.

    examined: test set → system → what it did. summary.json is for `dvc metrics`, accuracy.json and
    accuracy_by_steps.json for `dvc plots`. Equal answers give equal bytes but for measured seconds,
    which stand in metrics.json and predictions.parquet, and on a GPU for peak memory.
    """
    metrics = {
        test_set.name: {name: score(e, test_set) for name, e in examined[test_set.name].items()}
        for test_set in test_sets
    }
    write_json(folder / "metrics.json", metrics)
    write_json(
        folder / "summary.json",
        {
            test_set: {name: round(entry["exact_match"], 2) for name, entry in entries.items()}
            for test_set, entries in metrics.items()
        },
    )
    write_json(
        folder / "comparisons.json",
        {
            test_set: compare(
                {name: [p.correct for p in e.predictions] for name, e in systems.items()}, students
            )
            for test_set, systems in examined.items()
        },
    )
    entries = [
        ({"test_set": test_set, "system": name}, entry)
        for test_set, systems in metrics.items()
        for name, entry in systems.items()
    ]
    write_json(
        folder / "accuracy.json",
        [
            {
                **names,
                "exact_match": entry["exact_match"],
                "low": entry["ci95"][0],
                "high": entry["ci95"][1],
            }
            for names, entry in entries
        ],
    )
    write_json(
        folder / "accuracy_by_steps.json",
        [
            {**names, "steps": int(steps), **part}
            for names, entry in entries
            for steps, part in entry["by_steps"].items()
        ],
    )
    _write_predictions(folder / "predictions.parquet", test_sets, examined)
    return metrics


def _write_predictions(
    path: Path,
    test_sets: Sequence[ProblemSet],
    examined: Mapping[str, Mapping[str, Examined]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for test_set in test_sets:
        for name, found in examined[test_set.name].items():
            for i, prediction in enumerate(found.predictions):
                row = asdict(prediction)
                del row["written"]  # `text` says the same
                rows.append(
                    {
                        "test_set": test_set.name,
                        "system": name,
                        "question": test_set.problems[i].question,
                        **row,
                        "tokens": prediction.tokens,
                        "nll": sum(found.nll[i]) / len(found.nll[i]),
                        "answer_tokens": len(found.nll[i]),
                        "operations": test_set.operations[i],
                        "trace_tokens": test_set.trace_tokens[i],
                    }
                )
    pq.write_table(pa.Table.from_pylist(rows), path)


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

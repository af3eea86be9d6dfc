"""Examinations in numbers, and the files that all of them together make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kava_core.evaluation.breakdown import length_bin, score_groups
from kava_core.evaluation.comparison import Comparison
from kava_core.evaluation.examination import Examination, ProblemSet
from kava_core.evaluation.lm_eval import RULES, matches
from kava_core.evaluation.perplexity import perplexity
from kava_core.findings.base import write_finding
from kava_core.findings.differences import compare
from kava_core.findings.evaluation import (
    COMPARISONS,
    HARNESS,
    INSIGHTS,
    METRICS,
    PREDICTIONS,
    SIMILARITY,
    SUMMARY,
    Differences,
    EvaluationCosts,
    HarnessScores,
    Prediction,
    Score,
    Scores,
    SystemCost,
)
from kava_core.findings.scores import CommonestAnswer, score_steps, wilson
from kava_core.findings.tables import write_table
from kava_core.hardware import together

# test set → system → what it did
Examinations = Mapping[str, Mapping[str, Examination]]


def score(examination: Examination, test_set: ProblemSet) -> Score:
    """What an examination says of the system."""
    replies, n = examination.replies, len(examination.replies)
    marks = [reply.correct for reply in replies]
    return Score(
        exact_match=100 * sum(marks) / n,
        ci95=wilson(sum(marks), n),
        n=n,
        forward_passes=sum(reply.passes for reply in replies) / n,
        tokens=sum(reply.tokens for reply in replies) / n,
        perplexity=perplexity(examination.nll),
        by_steps=score_steps([len(problem.steps) for problem in test_set.problems], marks),
        by_operation=score_groups(test_set.operations, marks),
        by_trace_length=score_groups([[length_bin(n)] for n in test_set.trace_tokens], marks),
        commonest_answer=CommonestAnswer.of(
            [reply.answer for reply in replies], [problem.answer for problem in test_set.problems]
        ),
    )


def harness_scores(examinations: Examinations, test_sets: Sequence[ProblemSet]) -> HarnessScores:
    """What lm-evaluation-harness would say of the same answers, by each of its rules."""
    return {
        test_set.name: {
            name: {
                rule: 100
                * sum(
                    matches(reply.text, problem.answer, rule)
                    for problem, reply in zip(test_set.problems, found.replies, strict=True)
                )
                / len(found.replies)
                for rule in RULES
            }
            for name, found in examinations[test_set.name].items()
        }
        for test_set in test_sets
    }


def cost(examination: Examination) -> SystemCost:
    """What an examination cost on this machine."""
    seconds = [reply.seconds for reply in examination.replies]
    return SystemCost(
        seconds_per_problem=sum(seconds) / len(seconds),
        peak_memory_mb=examination.peak_bytes / 1e6,
    )


def costs_of(examinations: Examinations) -> EvaluationCosts:
    """What all of them cost, and on which machines."""
    return EvaluationCosts(
        hardware=together(
            found.hardware for systems in examinations.values() for found in systems.values()
        ),
        systems={
            test_set: {name: cost(found) for name, found in systems.items()}
            for test_set, systems in examinations.items()
        },
    )


def write_results(
    folder: Path,
    test_sets: Sequence[ProblemSet],
    comparison: Comparison,
    students: Sequence[str],
) -> Scores:
    """Write the artefact's files; returns what is in metrics.json.

    Equal answers give equal bytes: nothing here is measured in seconds or megabytes. summary.json
    is for `dvc metrics`, what lies in plots/ for `dvc plots`.
    """
    examinations = comparison.examinations
    scores: Scores = {
        test_set.name: {
            name: score(found, test_set) for name, found in examinations[test_set.name].items()
        }
        for test_set in test_sets
    }
    differences: Differences = {
        test_set: compare(
            {name: [r.correct for r in found.replies] for name, found in systems.items()}, students
        )
        for test_set, systems in examinations.items()
    }
    write_finding(folder / METRICS, scores)
    write_finding(folder / COMPARISONS, differences)
    write_finding(
        folder / SUMMARY,
        {
            test_set: {name: round(entry.exact_match, 2) for name, entry in entries.items()}
            for test_set, entries in scores.items()
        },
    )
    write_table(
        folder / PREDICTIONS,
        [
            prediction
            for test_set in test_sets
            for name, found in examinations[test_set.name].items()
            for prediction in _predictions(test_set, name, found)
        ],
    )
    write_finding(folder / HARNESS, harness_scores(examinations, test_sets))
    write_finding(folder / SIMILARITY, comparison.similarity)
    if comparison.insights:
        write_finding(folder / INSIGHTS, comparison.insights, spaced=False)
    _write_plots(folder / "plots", scores)
    return scores


def _write_plots(folder: Path, scores: Scores) -> None:
    """Rows for `dvc plots`, of whatever systems there are."""
    folder.mkdir()
    entries = [
        ({"test_set": test_set, "system": name}, entry)
        for test_set, systems in scores.items()
        for name, entry in systems.items()
    ]
    write_finding(
        folder / "systems.json",
        [
            {
                **names,
                "exact_match": entry.exact_match,
                "low": entry.ci95[0],
                "high": entry.ci95[1],
            }
            for names, entry in entries
        ],
    )
    write_finding(
        folder / "steps.json",
        [
            {**names, "steps": steps, "exact_match": part.exact_match, "n": part.n}
            for names, entry in entries
            for steps, part in entry.by_steps.items()
        ],
    )


def _predictions(test_set: ProblemSet, name: str, found: Examination) -> list[Prediction]:
    return [
        Prediction(
            test_set=test_set.name,
            system=name,
            id=problem.id,
            question=problem.question,
            n_steps=len(problem.steps),
            topic=problem.topic,
            gold=problem.answer,
            text=reply.text,
            answer=reply.answer,
            correct=reply.correct,
            passes=reply.passes,
            tokens=reply.tokens,
            nll=sum(nll) / len(nll),
            answer_tokens=len(nll),
            operations=operations,
            trace_tokens=trace_tokens,
        )
        for problem, reply, nll, operations, trace_tokens in zip(
            test_set.problems,
            found.replies,
            found.nll,
            test_set.operations,
            test_set.trace_tokens,
            strict=True,
        )
    ]

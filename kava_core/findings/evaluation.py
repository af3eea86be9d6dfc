"""What `kava evaluate` found: accuracy, paired differences, answers; and, apart, what it cost.

evaluation/ holds what is the same on a second machine, measured/evaluation.json what is not.
"""

from __future__ import annotations

from kava_core.findings.base import Finding
from kava_core.findings.scores import CommonestAnswer, GroupScore, Percent

METRICS, COMPARISONS, SUMMARY = "metrics.json", "comparisons.json", "summary.json"
PREDICTIONS, SIMILARITY = "predictions.parquet", "similarity.json"
INSIGHTS = "interpretability.json"
HARNESS = "lm_eval.json"
WEIGHTS = "weights.json"  # system → fingerprint of what was asked
MEASURED = "evaluation.json"


class Score(Finding):
    """One system on one test set of n problems.

    exact_match, ci95: accuracy and its 95 % interval, in %. forward_passes (decoder calls, the
    question's included) and tokens (generated, the end of sequence included) are means per problem.
    perplexity: of the gold answers, per token. A problem with several operations counts under each.
    commonest_answer: None where nothing was answered, and in files of before it was written.
    """

    exact_match: Percent
    ci95: tuple[Percent, Percent]
    n: int
    forward_passes: float
    tokens: float
    perplexity: float
    by_steps: dict[int, GroupScore]
    by_operation: dict[str, GroupScore]
    by_trace_length: dict[str, GroupScore]
    commonest_answer: CommonestAnswer | None = None


Scores = dict[str, dict[str, Score]]  # test set → system


# test set → system → rule of lm-evaluation-harness → accuracy in %
HarnessScores = dict[str, dict[str, dict[str, Percent]]]


class Difference(Finding):
    """Exact match of one system minus that of another on the same problems, in points.

    ci95: the 2.5th and 97.5th percentile over the resamples. p_value: two-sided, that of the
    percentile intervals: twice the smaller share of resamples at or beyond no difference, at most 1
    and never below 2 / (resamples + 1).
    """

    difference: float
    ci95: tuple[float, float]
    p_value: float

    def __neg__(self) -> Difference:
        low, high = self.ci95
        return Difference(
            difference=0.0 - self.difference, ci95=(0.0 - high, 0.0 - low), p_value=self.p_value
        )

    @property
    def clear(self) -> bool:
        """The interval does not hold 0."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


# test set → student → other system
Differences = dict[str, dict[str, dict[str, Difference]]]


class Prediction(Finding):
    """One system's answer to one problem, a row of predictions.parquet.

    text: what it wrote; answer: what was read from that, "" if nothing could be; passes: decoder
    calls; tokens: generated; nll: −log p of the gold answer, mean over its answer_tokens, in nats;
    operations: signs that the gold trace writes; trace_tokens: N_C, 0 without steps.
    """

    test_set: str
    system: str
    id: str
    question: str
    n_steps: int
    topic: str
    gold: str
    text: str
    answer: str
    correct: bool
    passes: int
    tokens: int
    nll: float
    answer_tokens: int
    operations: list[str]
    trace_tokens: int


class SystemCost(Finding):
    """What answering cost on one machine: not the same when it is measured again.

    seconds_per_problem: wall-clock of a batch over its size; peak_memory_mb: 10⁶ bytes of tensors
    beyond the weights, for the batch with the longest questions.
    """

    seconds_per_problem: float
    peak_memory_mb: float


class EvaluationCosts(Finding):
    """measured/evaluation.json: the machines in words, and test set → system → cost."""

    hardware: dict[str, str]
    systems: dict[str, dict[str, SystemCost]]

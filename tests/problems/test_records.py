"""Problem records: how they are described and compared."""

from kava_core.problems.records import Problem, describe, normalise_question

ONE = Problem("a-1", "How many?", ("<<1+1=2>>", "<<2*2=4>>"), "4", "hand", "none")


def test_the_description_counts_every_problem() -> None:
    other = Problem("a-2", "How many in all?", ("<<1+1=2>>",), "2", "hand", "sums")
    assert describe([ONE, other]) == {
        "problems": 2,
        "by_steps": {"1": 1, "2": 1},
        "question_words": {"2": 1, "4": 1},
        "trace_words": {"1": 1, "2": 1},
        "by_topic": {"none": 1, "sums": 1},
        "by_source": {"hand": 2},
        "question_characters": {"min": 9, "median": 9, "p95": 16, "p99": 16, "max": 16},
        "trace_characters": {"min": 9, "median": 9, "p95": 18, "p99": 18, "max": 18},
    }


def test_questions_are_compared_without_case_punctuation_and_spacing() -> None:
    assert normalise_question(" How  many,\nApples? ") == normalise_question("how many apples")
    assert normalise_question("has 12 apples") != normalise_question("has 1 2 apples")

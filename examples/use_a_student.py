"""Put the first test problems of a pipeline to one of its students, in one batch.

python examples/use_a_student.py                        # kava of data/quickstart
python examples/use_a_student.py data/smoke --student kava --problems 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoTokenizer

from kava_core import LatentReasoner


def main(pipeline: Path, name: str, problems: int) -> None:
    folder = pipeline / "students" / name
    student = LatentReasoner.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    asked = pq.read_table(pipeline / "test_sets" / "test.parquet").slice(0, problems).to_pylist()
    # A question ends in a line end; what the student writes behind its latents is the answer.
    questions = tokenizer(
        [problem["question"] + "\n" for problem in asked], padding=True, return_tensors="pt"
    )
    written = student.generate(**questions, return_dict_in_generate=True)
    answers = tokenizer.batch_decode(written.tokens, skip_special_tokens=True)

    right = 0
    for problem, answer, passes in zip(asked, answers, written.passes.tolist(), strict=True):
        right += answer.strip() == problem["answer"]
        mark = "right" if answer.strip() == problem["answer"] else f"wrong: {problem['answer']}"
        print(f"{problem['question']}\n    {answer.strip()} ({mark}; {passes} forward passes)")
    print(f"{right} of {len(asked)} right; {student.config.latents} latents")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", nargs="?", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--student", default="kava")
    parser.add_argument("--problems", type=int, default=8)
    arguments = parser.parse_args()
    main(arguments.pipeline, arguments.student, arguments.problems)

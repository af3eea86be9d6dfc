"""Whoever shares the batch, and whenever they come and go, a row is answered as it is alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from torch import nn

from kava_core.models.latent import LatentReasoner
from kava_core.serving.batch import Batch
from kava_core.serving.engine import Engine, Job, Piece
from kava_core.serving.meters import Meters
from kava_core.serving.served import open_served
from kava_core.serving.text import Text
from tests.serving.conftest import QUESTIONS
from tests.tiny import ARCHITECTURES, EOS, VOCABULARY, tiny_model, tiny_student

LONGEST = 12


@dataclass(eq=False)
class Row:
    ids: list[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def goes_on(self, token: int) -> bool:
        self.written.append(token)
        return token != EOS and len(self.written) < LONGEST


def questions(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [
        [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 30))] for _ in range(count)
    ]


def answered(batch: Batch, arrivals: list[list[Row]]) -> None:
    """Admit each list of rows one token after the one before it; go on until all have ended."""
    while arrivals or len(batch):
        if arrivals:
            new = arrivals.pop(0)
            if new:
                first = batch.admit(new)
                stay = [row.goes_on(token) for row, token in zip(new, first, strict=True)]
                batch.keep([True] * (len(batch) - len(new)) + stay)
        if len(batch):
            tokens = batch.step()
            rows = [row for row in batch.rows if isinstance(row, Row)]
            batch.keep([row.goes_on(token) for row, token in zip(rows, tokens, strict=True)])


def alone(system: LatentReasoner, ids: list[int]) -> list[int]:
    """What the system writes for one question, its end included."""
    found = system.generate(torch.tensor([ids]), max_new_tokens=LONGEST)[0, len(ids) :].tolist()
    return found[: found.index(EOS) + 1] if EOS in found else found


def check(system: LatentReasoner) -> None:
    """Nine questions, of which some come together and others when the first are half done."""
    head = system.get_output_embeddings()
    torch.manual_seed(0)
    # One that is tied to the embeddings writes the last token again and again.
    head.weight = nn.Parameter(torch.randn_like(head.weight))
    rows = [Row(ids) for ids in questions(9)]
    answered(Batch(system), [rows[:3], rows[3:4], [], rows[4:8], [], [], rows[8:]])
    expected = [alone(system, row.ids) for row in rows]
    assert [row.written for row in rows] == expected
    assert len({tuple(written) for written in expected}) > 3  # else it would be no test


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_student_answers_in_company_as_alone(name: str) -> None:
    check(tiny_student(name))


@pytest.mark.parametrize(
    "settings",
    [
        {"reasoning": "sequential"},
        {"stride": 5},
        {"iterations": 0},
        {"latents": 0, "answer_prompt_ids": [5]},
    ],
    ids=str,
)
def test_so_does_one_that_reasons_otherwise(settings: dict[str, object]) -> None:
    check(tiny_student("llama", **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_and_a_teacher_that_writes_its_chain(name: str) -> None:
    check(LatentReasoner.plain(tiny_model(name), answer_prompt_ids=[], eos_token_id=EOS))


def test_drawn_answers_are_those_of_their_seed_whatever_the_company() -> None:
    system = tiny_student("llama")
    ids = questions(6)

    def rows() -> list[Row]:
        return [
            Row(x, temperature=(0.0, 0.7, 1.5)[i % 3], top_p=(1.0, 0.8)[i % 2], seed=i)
            for i, x in enumerate(ids)
        ]

    together, apart, other = rows(), rows(), rows()
    answered(Batch(system), [together[:4], [], together[4:]])
    for row in apart:
        answered(Batch(system), [[row]])
    assert [row.written for row in together] == [row.written for row in apart]
    assert together[0].written == alone(system, ids[0])  # drew nothing
    for row in other:
        row.generator.manual_seed(99)
        answered(Batch(system), [[row]])
    assert [row.written for row in other] != [row.written for row in apart]


def test_what_is_unlikely_is_not_drawn() -> None:
    system = tiny_student("llama")
    ids = questions(1)[0]
    rows = [Row(ids, temperature=1.5, top_p=1e-6, seed=seed) for seed in range(4)]
    answered(Batch(system), [rows])
    assert all(row.written == alone(system, ids) for row in rows)


@pytest.mark.parametrize("temperature", [1e-300, 9e-7, 1e-6])
def test_a_cold_row_costs_its_neighbour_nothing(
    folders: dict[str, Path], temperature: float
) -> None:
    served = open_served(folders["student"])
    pieces: SimpleQueue[tuple[int, Piece]] = SimpleQueue()

    def job(number: int, temperature: float) -> Job:
        return Job(
            served.encoder.encode_questions(QUESTIONS[:1])[0],
            max_tokens=12,
            text=Text(served.encoder.tokenizer),
            tell=lambda piece: pieces.put((number, piece)),
            temperature=temperature,
        )

    engine = Engine(served, Meters(), max_batch=2, queue=2)
    engine.submit([job(0, 0.0), job(1, temperature)])  # before it starts, so that they join as one
    engine.start()
    ended = dict(pieces.get(timeout=60) for _ in range(2))
    engine.stop()
    assert ended[0].finish in ("stop", "length")
    assert ended[1] == ended[0]


def test_rows_that_left_leave_no_columns_behind() -> None:
    system = tiny_student("llama")
    batch = Batch(system)
    long, short = Row([7] * 40), Row([8, 9])
    batch.admit([long, short])
    batch.keep([False, True])
    assert batch._state is not None
    fed = 2 + 6 + 3  # question, <bot>, latents and <eot>, answer prompt
    assert batch._state.mask.shape[1] == fed
    assert all(layer.keys.shape[2] == fed for layer in batch._state.layers)

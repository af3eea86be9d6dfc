"""What a run is stopped by before it learns anything."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kava_core.distill.start import check_teacher, start_student
from kava_core.distill.teacher_job import train_teacher
from kava_core.errors import KavaError
from kava_core.models.loading import save_model
from kava_core.problems.folder import open_problems, write_problems
from kava_core.problems.splits import ProblemSplits
from kava_core.settings import Cadence, Resources, Student, Teacher
from kava_core.store import TargetsStore
from tests.distill.toy import TRAINING
from tests.evaluation.talker import make_encoder, problems
from tests.tiny import COMMON, CONFIGS, tiny_model

ENCODER = make_encoder()
LONGEST = max(len(ids) for ids in ENCODER.encode_questions([p.question for p in problems()]))


def model_of(model_type: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type, **{**COMMON, "vocab_size": len(ENCODER.tokenizer), **settings}
    )
    return tiny_model(config, torch.float32)


def gpt2(positions: int) -> PreTrainedModel:
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.vocab_size, config.n_positions = len(ENCODER.tokenizer), positions
    return tiny_model(config, torch.float32)


def settings(**changes: Any) -> Teacher:
    return Teacher(model="somewhere", training=TRAINING, max_new_tokens=20, **changes)


def test_learned_positions_must_hold_all_that_validation_will_write() -> None:
    needed = LONGEST + len(ENCODER.answer_prompt_ids) + 20
    check_teacher(settings(), gpt2(needed), ENCODER, problems())
    with pytest.raises(
        KavaError, match=r"validation problem p\d takes .* 20 to write \(teacher\.max"
    ):
        check_teacher(settings(), gpt2(needed - 1), ENCODER, problems())


def test_a_model_that_rotates_may_write_past_its_context_and_not_read_past_it() -> None:
    needed = LONGEST + len(ENCODER.answer_prompt_ids) + 1
    check_teacher(
        settings(), model_of("llama", max_position_embeddings=needed), ENCODER, problems()
    )
    small = model_of("llama", max_position_embeddings=needed - 1)
    with pytest.raises(KavaError, match=rf"takes {needed} positions .*Drop long problems"):
        check_teacher(settings(), small, ENCODER, problems())


def test_nobody_to_ask_is_said_before_training() -> None:
    with pytest.raises(KavaError, match="no validation problems"):
        check_teacher(settings(), model_of("llama"), ENCODER, [])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: gpt2(24), "24"),
        (lambda: model_of("diffllama"), "calls transformers' attention interface 2 times"),
    ],
)
def test_a_teacher_is_refused_before_it_trains(model: Any, said: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model(), ENCODER.tokenizer)
    everything = problems()
    write_problems(tmp_path / "problems", ProblemSplits(*[everything] * 3), "equations", {})
    with pytest.raises(KavaError, match=said):
        train_teacher(
            Teacher(model=str(tmp_path / "model"), training=TRAINING, max_new_tokens=20),
            open_problems(tmp_path / "problems"),
            tmp_path / "data" / "teacher",
            Cadence(),
            Resources(),
        )
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_student_is_refused_before_it_trains(store: Path) -> None:
    opened = TargetsStore.open(store)
    with pytest.raises(KavaError, match="not one this library can undo"):
        start_student(
            Student(reads="kv_targets", training=TRAINING, alpha_kv=1.0),
            model_of("cohere"),
            ENCODER.tokenizer,
            opened,
        )
    start_student(
        Student(reads="kv_targets", training=TRAINING, alpha_codi=1.0),
        model_of("cohere"),
        ENCODER.tokenizer,
        opened,
    )
    hybrid = model_of("lfm2", layer_types=["conv", "full_attention", "conv"])
    with pytest.raises(KavaError, match="lfm2 has layers of kind conv"):
        start_student(Student(training=TRAINING, reads="problems"), hybrid, ENCODER.tokenizer, None)


class Doubling(LlamaForCausalLM):
    """A model that makes more of its logits than it says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_written_chain_needs_logits_that_are_known() -> None:
    model = Doubling(LlamaConfig(**{**COMMON, "vocab_size": len(ENCODER.tokenizer)}))

    def start(**terms: float) -> None:
        student = Student(reads="problems", training=TRAINING, **terms)
        start_student(student, model, ENCODER.tokenizer, None)

    start()
    with pytest.raises(KavaError, match=r"makes its logits in a way .*; set w_cot to 0\.$"):
        start(w_cot=1.0)

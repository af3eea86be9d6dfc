"""What a run starts from: a teacher before it learns, a student before it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kava_core.distill.batches import AnswerDataset, TargetsDataset, writes_rest
from kava_core.errors import KavaError
from kava_core.models.context import check_context
from kava_core.models.head import check_head
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import build_llama, load_model, load_tokenizer
from kava_core.models.proofs import prove_asked, prove_latents, prove_slots, prove_teacher
from kava_core.problems.folder import ProblemFolder
from kava_core.problems.prompt import PLAIN, Prompt
from kava_core.problems.records import Problem
from kava_core.problems.tokenizer import train_tokenizer
from kava_core.problems.traces import TraceEncoder
from kava_core.settings import Student, Teacher
from kava_core.store import TargetsStore


def start_teacher(
    settings: Teacher, problems: ProblemFolder
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `settings` name, or one from scratch, with a tokenizer of the problems."""
    if settings.model != "scratch":
        return (
            load_model(settings.model, revision=settings.revision),
            load_tokenizer(settings.model, settings.revision),
        )
    prompt = problems.prompt
    texts = (
        text
        for p in problems.open("train")
        for text in (prompt.asked(p.question), "\n".join(p.steps), f"{prompt.answer} {p.answer}")
    )
    scratch = settings.scratch
    tokenizer = train_tokenizer(texts, scratch.vocabulary)
    assert settings.training is not None
    model = build_llama(
        tokenizer,
        hidden_size=scratch.hidden_size,
        layers=scratch.layers,
        heads=scratch.heads,
        kv_heads=scratch.kv_heads,
        intermediate_size=scratch.intermediate_size,
        context_length=scratch.context_length,
        rope_theta=scratch.rope_theta,
        seed=settings.training.seed,
    )
    return model, tokenizer


def check_teacher(
    settings: Teacher,
    model: PreTrainedModel,
    encoder: TraceEncoder,
    asked: Sequence[Problem],
) -> None:
    """KavaError, before anything is trained, for what would stop the teacher's stages later.

    That is a model whose cache cannot be recorded or that cannot be asked (`prove_teacher`), and a
    problem of `asked`, which it is validated on, without place for all that may be written. A
    model that rotates its keys can write on past its context; one with learned positions cannot.
    """
    rotary = prove_teacher(model)
    if not asked:
        raise KavaError(
            "there are no validation problems to ask the teacher. Ask `prepare` for some."
        )
    questions = encoder.encode_questions([problem.question for problem in asked])
    longest = max(range(len(asked)), key=lambda i: len(questions[i]))
    learned = not rotary.inv_freq.shape[1]
    written = settings.max_new_tokens if learned else 1
    check_context(
        model.config,
        len(questions[longest]) + len(encoder.answer_prompt_ids) + written,
        what=f"validation problem {asked[longest].id}",
        including=f"the answer prompt and {written} to write"
        + (" (teacher.max_new_tokens)" if learned else ""),
        remedy=("Lower teacher.max_new_tokens, d" if learned else "D")
        + "rop long problems in `prepare`, or use a model with a longer context.",
    )


def start_student(
    settings: Student,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: TargetsStore | None,
    prompt: Prompt = PLAIN,
) -> LatentReasoner:
    """The student that begins with the weights of `model`; without a store it has no latents.

    KavaError if the model has no embeddings for all that the tokenizer knows, or does not compute
    in latents what it should (`kava_core.models.proofs`).
    """
    encoder = TraceEncoder(tokenizer, prompt=prompt)
    known = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if known < len(tokenizer):
        raise KavaError(
            f"the tokenizer has {len(tokenizer)} tokens, and {settings.model} has embeddings for "
            f"{known}. Choose a model that knows all of them."
        )
    prove_asked(model)
    if settings.taught("w_cot"):
        check_head(model, "Its written chain cannot be taught; set w_cot to 0.")
    student = LatentReasoner.from_teacher(
        model,
        latents=store.geometry.slots if store else 0,
        iterations=settings.iterations,
        reasoning=settings.reasoning,
        projection=settings.projection,
        per_position=settings.per_position,
        stride=settings.stride,
        answer_prompt_ids=[] if store and writes_rest(store) else encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=settings.training.seed,
    )
    if store:
        prove_latents(student)
        if settings.taught("alpha_kv"):
            prove_slots(student)
    return student


def check_records(student: LatentReasoner, dataset: AnswerDataset | TargetsDataset) -> None:
    """KavaError naming the longest record if the student's context cannot hold it."""
    lengths = dataset.lengths()
    config = student.config
    latents = config.latents * config.stride + 2 if config.latents else 0  # and <bot>, <eot>
    between = np.maximum(lengths.chain, latents) if dataset.chains else latents
    if isinstance(dataset, TargetsDataset) and dataset.records:
        between = lengths.chain + latents  # of which a curriculum replaces one by the other
    needed = lengths.question + between + lengths.answer
    longest = int(needed.argmax())
    check_context(
        student.decoder.config,
        int(needed[longest]),
        what=f"record {dataset.name(longest)}",
        including="all that the student reads and writes "
        f"({lengths.question[longest]} of them the question)",
        remedy="Leave long problems out in `prepare`, or use a model with a longer one.",
    )

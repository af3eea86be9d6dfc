"""A model trains as its settings say: for how long, with which weights, in how much memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from kava_core.distill.adapters import add_lora, merge_lora
from kava_core.distill.batches import AnswerDataset, ChainDataset
from kava_core.distill.fit import Stopped, fit
from kava_core.distill.terms import Terms, chain_terms, student_terms
from kava_core.errors import KavaError
from kava_core.memory import peak_tensor_bytes
from kava_core.models.recompute import recomputed
from kava_core.settings import Cadence, LoRA, Training
from kava_core.store import ShardShuffleSampler
from tests.distill import toy
from tests.distill.toy import TRAINING, files, same, toy_student, toy_traces
from tests.tiny import COMMON, tiny_model

CADENCE = Cadence(log_every=1, save_every=2, gradient_share_every=2)
SHORT = toy.but(TRAINING, steps=4, accumulation=1)
TRACES = toy_traces(14)


def train(
    folder: Path,
    model: Any,
    training: Training,
    terms: Terms = chain_terms,
    dataset: Any = None,
    stop_at: int | None = None,
) -> dict[str, Tensor]:
    """The weights that a run ends with; stop_at: the batch at which SIGTERM arrives."""
    batches = 0

    def counted(trained: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        nonlocal batches
        batches += 1
        if batches == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return terms(trained, batch)

    (folder / "curves").mkdir(parents=True, exist_ok=True)
    fit(
        model,
        counted,
        dataset or ChainDataset(TRACES),
        ShardShuffleSampler([len(TRACES)], seed=training.seed),
        training,
        CADENCE,
        folder=folder / "checkpoints",
        curves=folder / "curves",
        title="toy",
    )
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def teacher(lora: LoRA | None = None, dropout: float = 0.0) -> Any:
    model = tiny_model(LlamaConfig(**COMMON, attention_dropout=dropout), torch.float32)
    if lora is not None:
        add_lora(model, lora, seed=1, path="teacher.training")
    return model


# --- how long -------------------------------------------------------------------------------------


def test_epochs_are_so_many_steps(tmp_path: Path) -> None:
    """14 records are 3 batches of 4, so 2 steps of 2 batches."""
    steps = toy.but(TRAINING, steps=6)
    epochs = Training.model_validate({**steps.model_dump(), "steps": None, "epochs": 3})
    assert (epochs.steps_per_epoch(14), epochs.total_steps(14), steps.total_steps(14)) == (2, 6, 6)
    assert epochs.total_steps(16) == 6 and epochs.total_steps(17 + 3) == 9
    by_epochs = train(tmp_path / "epochs", teacher(), epochs)
    assert same(by_epochs, train(tmp_path / "steps", teacher(), steps))
    assert files(tmp_path / "epochs/curves") == files(tmp_path / "steps/curves")


# --- which weights --------------------------------------------------------------------------------


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, x in before.items() if not torch.equal(x, after[name])}


def test_every_tensor_of_a_teacher_learns_or_its_adapters_alone(tmp_path: Path) -> None:
    model = teacher()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert changed(before, train(tmp_path / "whole", model, SHORT)) == set(before)
    model = tiny_model(LlamaConfig(**COMMON), torch.float32)
    adapters = add_lora(model, toy.lora(2, 4, 0.1, "q_proj", "down_proj"), seed=1, path="it")
    with_adapters = {name: x.clone() for name, x in model.state_dict().items()}
    learnt = changed(with_adapters, train(tmp_path / "lora", model, SHORT))
    assert learnt == {name for name in with_adapters if "lora_" in name} and len(learnt) == 12
    merged = dict(merge_lora(adapters).state_dict())
    assert changed(before, merged) == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(3)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_teacher_goes_on_with_adapters_and_all(tmp_path: Path, precision: str) -> None:
    training = toy.but(SHORT, precision=precision, gradient_checkpointing=True)

    def run(folder: str, stop_at: int | None = None) -> dict[str, Tensor]:
        model = teacher(toy.lora(2, 4, 0.1, "q_proj", "v_proj"), dropout=0.1)
        return train(tmp_path / folder, model, training, stop_at=stop_at)

    with pytest.raises(Stopped):
        run("stopped", stop_at=3)
    assert same(run("stopped"), run("whole"))
    assert files(tmp_path / "stopped/curves") == files(tmp_path / "whole/curves")


# --- in how much memory ---------------------------------------------------------------------------


def no_cot_terms() -> Terms:
    return student_terms(toy.toy_objective(None, w_cot=1.0), None)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_gradient_checkpointing_changes_no_weight(tmp_path: Path, who: str) -> None:
    ends = []
    for on in (False, True):
        training = toy.but(SHORT, gradient_checkpointing=on)
        if who == "teacher":
            model = teacher(dropout=0.1)
            ends.append(train(tmp_path / f"{on}", model, training))
        else:
            model = toy_student(0.1, latents=0)
            dataset = AnswerDataset(TRACES, chains=True)
            ends.append(train(tmp_path / f"{on}", model, training, no_cot_terms(), dataset))
        assert not model.is_gradient_checkpointing  # the caller gets its own model back
    assert same(*ends)
    assert files(tmp_path / "True/curves") == files(tmp_path / "False/curves")


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_gradient_checkpointing_holds_less(who: str) -> None:
    config = LlamaConfig(**{**COMMON, "num_hidden_layers": 8})
    model, terms = tiny_model(config, torch.float32), chain_terms
    batch = ChainDataset(TRACES).__getitems__(list(range(14)))
    if who == "student":
        model, terms = toy_student(latents=0), no_cot_terms()
        batch = AnswerDataset(TRACES, chains=True).__getitems__(list(range(14)))
    model.train()

    def step() -> None:
        model.zero_grad()
        torch.stack(list(terms(model, batch).values())).sum().backward()

    step()
    kept = peak_tensor_bytes(step, torch.device("cpu"))
    with recomputed(model):
        less = peak_tensor_bytes(step, torch.device("cpu"))
    assert less < (0.5 if who == "teacher" else 0.8) * kept


def test_gradient_checkpointing_is_refused_where_a_cache_is_read(tmp_path: Path) -> None:
    training = toy.but(SHORT, gradient_checkpointing=True)
    with pytest.raises(KavaError, match="detaches the cache"):
        train(tmp_path, toy_student(), training)

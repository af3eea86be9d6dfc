"""A killed run ends like one that was never killed, and the run says what it should."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from kava_core.console import console
from kava_core.distill.batches import AnswerDataset, ChainDataset, TargetsDataset
from kava_core.distill.fit import Stopped, fit, following, last_whole_checkpoint
from kava_core.distill.match import Match
from kava_core.distill.student import merge_lora, student_terms
from kava_core.distill.teacher import chain_terms
from kava_core.errors import KavaError
from kava_core.store import ShardShuffleSampler, TargetsStore
from tests.distill import toy
from tests.distill.toy import SETTINGS, Toy, files, same, toy_student, toy_traces, write_store
from tests.tiny import COMMON, tiny_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 records: 6 batches of 4, so 3 steps of 2 batches an epoch, and 2 records left over."""
    folder = tmp_path_factory.mktemp("fit") / "store"
    write_store(folder, toy_traces(26))
    return folder


@pytest.fixture(scope="module")
def whole(
    store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Weights and live files of a run of four epochs that nothing disturbed."""
    torch.set_num_threads(1)
    run = Toy(store, tmp_path_factory.mktemp("whole"), shares_every=7)
    return run.run(), files(run.folder / "live")


def killed(run: Toy) -> int | None:
    """The exit code of a process that does `run`; −9 for SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distill.toy"])
    process = context.Process(target=toy.main, args=(run,))
    process.start()
    process.join()
    return process.exitcode


def checkpoints(run: Toy) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in run.checkpoints.glob("checkpoint-*"))


# --- kills --------------------------------------------------------------------------------------


def test_sigkill_again_and_again_changes_neither_weights_nor_curves(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path, shares_every=7)
    # In steps 2, 5, 7 and 10: before the first checkpoint; between two; and twice after
    # a log that no checkpoint has. Checkpoints 3, 6 and 9 stand between epochs and within logs.
    for step, kept in ((2, []), (5, [3]), (4, [3, 6]), (4, [6, 9])):
        assert killed(run.but(signal_at=step)) == -signal.SIGKILL
        assert checkpoints(run) == kept
    weights, live = whole
    assert same(run.run(), weights)
    assert files(tmp_path / "live") == live


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_checkpoint_cut_off_while_it_was_written_is_not_continued_from(
    store: Path,
    tmp_path: Path,
    whole: tuple[dict[str, Tensor], dict[str, bytes]],
    damage: str,
) -> None:
    run = Toy(store, tmp_path, shares_every=7)
    with pytest.raises(Stopped):
        run.but(signal_at=8, signal=signal.SIGTERM).run()
    assert checkpoints(run) == [6, 8]
    state = run.checkpoints / "checkpoint-8" / "trainer_state.json"
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:200])
    elif damage == "missing":
        (state.parent / "optimizer.pt").unlink()
        state.unlink()
    else:
        shutil.rmtree(state.parent)
        state.parent.mkdir()
    newest = last_whole_checkpoint(run.checkpoints)
    assert newest is not None and newest.name == "checkpoint-6"
    assert checkpoints(run) == [6]
    weights, live = whole
    assert same(run.run(), weights)
    assert files(tmp_path / "live") == live


def test_sigterm_saves_and_stops_and_the_rest_follows(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path, shares_every=7)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped at step 2 of 10 and saved.*again"):
        run.but(signal_at=2, signal=signal.SIGTERM).run()
    assert checkpoints(run) == [2]
    assert signal.getsignal(signal.SIGTERM) is before
    weights, live = whole
    assert same(run.run(), weights)
    assert files(tmp_path / "live") == live


def test_a_process_stopped_by_sigterm_has_an_error_a_person_can_read() -> None:
    assert issubclass(Stopped, KavaError)


def test_a_run_killed_after_its_last_step_takes_no_further_one(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path, shares_every=7)
    run.run()
    weights, live = whole
    shutil.rmtree(tmp_path / "live")
    for _ in range(2):
        assert same(run.run(), weights)
        assert files(tmp_path / "live") == live
    assert checkpoints(run)[-1] == SETTINGS.steps


def test_adapters_and_chains_survive_a_kill(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path / "killed", lora=True, chains=True)
    assert killed(run.but(signal_at=5)) == -signal.SIGKILL
    continued = run.run()
    undisturbed = run.but(folder=tmp_path / "whole").run()
    assert same(continued, undisturbed)
    changed = [name for name, x in toy_student(lora=True).state_dict().items()
               if not torch.equal(x, undisturbed[name])]  # fmt: skip
    assert any("lora_B" in name for name in changed)
    assert not any("base_layer" in name or "embed" in name for name in changed)


def test_half_precision_survives_a_kill(store: Path, tmp_path: Path) -> None:
    settings = toy.replace(SETTINGS, precision="bfloat16")
    run = Toy(store, tmp_path / "killed", settings, lora=True)
    assert killed(run.but(signal_at=5)) == -signal.SIGKILL
    undisturbed = run.but(folder=tmp_path / "whole")
    assert same(run.run(), undisturbed.run())
    assert files(tmp_path / "killed" / "live") == files(tmp_path / "whole" / "live")
    exact = run.but(folder=tmp_path / "exact", settings=SETTINGS)
    exact.run()
    assert curve(exact, "loss") != curve(undisturbed, "loss")
    assert curve(exact, "loss") == pytest.approx(curve(undisturbed, "loss"), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, SETTINGS.steps + 1))
def test_sigkill_at_any_step(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]], step: int
) -> None:
    run = Toy(store, tmp_path, shares_every=7)
    assert killed(run.but(signal_at=step)) == -signal.SIGKILL
    assert same(run.run(), whole[0])
    assert files(tmp_path / "live") == whole[1]


def test_loader_processes_change_nothing(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    run = Toy(store, tmp_path, shares_every=7, loader_workers=1)
    assert same(run.run(), whole[0])
    assert files(tmp_path / "live") == whole[1]


def test_the_seed_changes_the_run(
    store: Path, tmp_path: Path, whole: tuple[dict[str, Tensor], dict[str, bytes]]
) -> None:
    other = toy.replace(SETTINGS, seed=6)
    assert not same(Toy(store, tmp_path, other).run(), whole[0])


# --- order and cutting ----------------------------------------------------------------------------


def fit_recording(folder: Path, settings: Any, records: int = 16) -> list[list[str]]:
    """The records of every batch of a run, in order."""
    traces, seen = toy_traces(records), []
    student = toy_student(latents=0)
    terms = student_terms(toy.toy_objective(None), None)

    def recorded(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(batch["ids"])
        return terms(model, batch)

    fit(
        student,
        recorded,
        AnswerDataset(traces, chains=False),
        ShardShuffleSampler([9, records - 9], seed=settings.seed),
        settings,
        folder=folder / "checkpoints",
        live_folder=folder / "live",
        title="toy",
    )
    return seen


def test_records_come_in_the_samplers_order_epoch_after_epoch(tmp_path: Path) -> None:
    settings = toy.replace(SETTINGS, steps=8, accumulation=1)
    seen = fit_recording(tmp_path, settings)
    sampler = ShardShuffleSampler([9, 7], seed=SETTINGS.seed)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += [f"toy-{i}" for i in sampler]
    assert [name for batch in seen for name in batch] == expected
    assert expected[:16] != expected[16:]


def test_a_batch_of_8_is_two_accumulated_batches_of_4(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(store, toy_traces(24))
    settings = toy.replace(SETTINGS, steps=6, log_every=1)
    parts = Toy(store, tmp_path / "parts", settings, dropout=0.0, chains=True)
    together = Toy(
        store,
        tmp_path / "together",
        toy.replace(settings, batch_size=8, accumulation=1),
        dropout=0.0,
        chains=True,
    )
    a, b = parts.run(), together.run()
    largest = max(float((x - b[name]).abs().max()) for name, x in a.items())
    assert largest < 2e-4  # Adam divides by the gradient's size, and with it by its rounding
    for name in ("loss", "loss_answer", "loss_cot", "loss_kv", "loss_codi", "grad_norm"):
        assert curve(parts, name) == pytest.approx(curve(together, name), rel=1e-4), name


# --- what is logged -------------------------------------------------------------------------------


def curve(run: Toy, name: str) -> list[float]:
    """The values of a curve in DVCLive's file: a header, then `step`, tab, value."""
    text = (run.folder / "live" / "plots" / "metrics" / f"{name}.tsv").read_text()
    header, *rows = text.splitlines()
    assert header.split("\t") == ["step", name]
    assert [int(row.split("\t")[0]) for row in rows] == list(
        range(run.settings.log_every, run.settings.steps + 1, run.settings.log_every)
    )
    return [float(row.split("\t")[1]) for row in rows]


def test_the_loss_is_the_sum_of_its_terms_and_a_mean_since_the_last_log(
    store: Path, tmp_path: Path
) -> None:
    every = Toy(store, tmp_path / "every", toy.replace(SETTINGS, log_every=1))
    second = Toy(store, tmp_path / "second", toy.replace(SETTINGS, log_every=2))
    assert same(every.run(), second.run())
    terms = [curve(every, f"loss_{name}") for name in ("answer", "kv", "codi")]
    assert curve(every, "loss") == pytest.approx(np.sum(terms, axis=0).tolist(), rel=1e-6)
    pairs = np.reshape(curve(every, "loss"), (5, 2)).mean(1)
    assert curve(second, "loss") == pytest.approx(pairs.tolist(), rel=1e-6)


def test_a_run_elsewhere_is_followed_by_what_it_writes(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, toy.replace(SETTINGS, steps=2, log_every=1))
    with following(tmp_path / "live", "toy", 2) as display:
        assert display.tasks[0].completed == 0
        run.run()
    assert display.tasks[0].completed == 2
    assert f"kv {curve(run, 'loss_kv')[-1]:.3f}" in display.tasks[0].fields["note"]


def test_a_cosine_follows_the_warm_up(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, toy.replace(SETTINGS, log_every=1))
    run.run()
    expected = [0.0, 0.5, *(0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8))]
    assert curve(run, "learning_rate") == pytest.approx([1e-2 * x for x in expected], abs=1e-9)


def test_shares_of_the_gradient_are_measured_and_a_weak_term_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", toy_traces(4))
    objective = toy.toy_objective(store, alpha_kv=1e-6)
    student = toy_student()
    terms = student_terms(objective, Match.of(store))
    dataset = TargetsDataset(store, chains=False)
    settings = toy.replace(SETTINGS, steps=1, accumulation=1, log_every=1)
    run = Toy(tmp_path / "store", tmp_path, settings)

    norms = {}
    for name in ("answer", "codi", "kv"):
        student.zero_grad()
        batch = dataset.__getitems__([*ShardShuffleSampler(store.sizes, seed=settings.seed)])
        terms(student, batch)[name].backward()
        squares = [float(p.grad.double().square().sum())
                   for p in student.parameters() if p.grad is not None]  # fmt: skip
        norms[name] = sum(squares) ** 0.5
    student.zero_grad()

    with console.capture() as captured:
        fit(
            student,
            terms,
            dataset,
            ShardShuffleSampler(store.sizes, seed=settings.seed),
            settings,
            folder=run.checkpoints,
            live_folder=tmp_path / "live",
            title="toy",
            shares_every=1,
        )
    said = captured.get()
    for name, norm in norms.items():
        share = norm / sum(norms.values())
        assert curve(run, f"gradient_share_{name}") == [pytest.approx(share, rel=1e-4)]
    assert "the kv term carries 0.00% of the gradient at step 0" in said
    assert said.count("warning") == 1


# --- held-out records -----------------------------------------------------------------------------


def test_held_out_records_are_measured_and_change_nothing(store: Path, tmp_path: Path) -> None:
    """The last 2 of 26 records are left over by every epoch anyway, but for being held out."""
    settings = toy.replace(SETTINGS, batch_size=3, evaluate_every=4)
    watched = Toy(store, tmp_path / "watched", settings, held_out=2)
    alone = watched.but(folder=tmp_path / "alone", settings=toy.replace(settings, evaluate_every=0))
    assert same(watched.run(), alone.run())
    extra = {"eval_loss", *(f"eval_loss_{name}" for name in ("answer", "codi", "kv"))}
    plots = Path("live") / "plots" / "metrics"
    names = {path.stem for path in (watched.folder / plots).iterdir()}
    assert names - {path.stem for path in (alone.folder / plots).iterdir()} == extra
    for name in names - extra:
        assert curve(watched, name) == curve(alone, name)


def test_held_out_losses_are_those_of_the_records(store: Path, tmp_path: Path) -> None:
    """Means over the two records, though a batch of one is measured at a time; without dropout."""
    settings = toy.replace(SETTINGS, steps=1, log_every=1, batch_size=1, evaluate_every=1)
    run = Toy(store, tmp_path, settings, dropout=0.3, held_out=2)
    weights = run.run()
    student, opened = toy_student(), TargetsStore.open(store)
    student.load_state_dict(weights)
    terms = student_terms(toy.toy_objective(opened), Match.of(opened))
    with torch.no_grad():
        expected = terms(
            student.eval(), TargetsDataset(opened, chains=False).__getitems__([24, 25])
        )
    for name, value in expected.items():
        assert curve(run, f"eval_loss_{name}") == [pytest.approx(float(value), rel=1e-5)]
    total = sum(float(value) for value in expected.values())
    assert curve(run, "eval_loss") == [pytest.approx(total, rel=1e-5)]


def test_held_out_losses_survive_a_kill(store: Path, tmp_path: Path) -> None:
    settings = toy.replace(SETTINGS, evaluate_every=2)
    run = Toy(store, tmp_path / "killed", settings, held_out=2)
    assert killed(run.but(signal_at=8)) == -signal.SIGKILL  # 4 and 6 evaluated, 6 saved
    whole = run.but(folder=tmp_path / "whole")
    assert same(run.run(), whole.run())
    assert files(run.folder / "live") == files(whole.folder / "live")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_names_the_records_and_saves_what_came_before(
    store: Path, tmp_path: Path, accumulation: int
) -> None:
    """The checkpoint is that of step 4, though the second batch of step 5 is the broken one."""
    run = Toy(store, tmp_path, toy.replace(SETTINGS, accumulation=accumulation))
    opened = TargetsStore.open(store)
    terms = student_terms(toy.toy_objective(opened), Match.of(opened))
    seen: list[list[str]] = []

    def broken(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(batch["ids"])
        result = terms(model, batch)
        return {**result, "kv": result["kv"] * float("nan")} if len(seen) == last else result

    last = 5 * accumulation
    with pytest.raises(KavaError) as error:
        fit(
            toy_student(dropout=0.1),
            broken,
            TargetsDataset(opened, chains=False),
            ShardShuffleSampler(opened.sizes, seed=SETTINGS.seed),
            run.settings,
            folder=run.checkpoints,
            live_folder=tmp_path / "live",
            title="toy",
        )
    assert "nan at step 5" in str(error.value)
    assert f"records {', '.join(seen[last - 1])}. The state before" in str(error.value)
    assert checkpoints(run) == [3, 4]
    assert same(run.run(), run.but(folder=tmp_path / "whole").run())
    assert files(tmp_path / "live") == files(tmp_path / "whole" / "live")


def test_no_checkpoint_no_continuation(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_numbers_of_checkpoints_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    newest = last_whole_checkpoint(tmp_path)
    assert newest is not None and newest.name == "checkpoint-100"


# --- other models and precisions ------------------------------------------------------------------


def test_half_precision_leaves_the_caller_its_own_model(store: Path, tmp_path: Path) -> None:
    run = Toy(store, tmp_path, toy.replace(SETTINGS, steps=2, precision="bfloat16"))
    opened = TargetsStore.open(store)
    student = toy_student()
    before = type(student).forward
    fit(
        student,
        student_terms(toy.toy_objective(opened), Match.of(opened)),
        TargetsDataset(opened, chains=False),
        ShardShuffleSampler(opened.sizes, seed=0),
        run.settings,
        folder=run.checkpoints,
        live_folder=tmp_path / "live",
        title="toy",
    )
    assert student.forward.__func__ is before  # no autocast is left around it
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_teacher_learns_its_chains(tmp_path: Path) -> None:
    traces = toy_traces(4)
    model = tiny_model(LlamaConfig(**COMMON), torch.float32)
    dataset = ChainDataset(traces)
    with torch.no_grad():
        first = float(chain_terms(model, dataset.__getitems__([0, 1, 2, 3]))["chain"])
    fit(
        model,
        chain_terms,
        dataset,
        ShardShuffleSampler([4], seed=0),
        toy.replace(SETTINGS, steps=40, accumulation=1, save_every=100),
        folder=tmp_path / "checkpoints",
        live_folder=tmp_path / "live",
        title="teacher",
    )
    with torch.no_grad():
        last = float(chain_terms(model.eval(), dataset.__getitems__([0, 1, 2, 3]))["chain"])
    assert last < 0.2 * first


def test_adapters_start_from_their_seed_whatever_was_drawn_before() -> None:
    def adapters(seed: int, drawn: int) -> dict[str, Tensor]:
        student = toy_student()
        torch.manual_seed(drawn)
        toy.add_lora(student, rank=2, alpha=2, dropout=0.0, targets=["q_proj"], seed=seed)
        after = torch.rand(())
        torch.manual_seed(drawn)
        assert torch.equal(after, torch.rand(()))  # nothing was drawn from the common stream
        return {name: x for name, x in student.state_dict().items() if "lora_A" in name}

    assert same(adapters(3, drawn=1), adapters(3, drawn=2))
    assert not same(adapters(3, drawn=1), adapters(4, drawn=1))


def test_merged_adapters_compute_what_they_did() -> None:
    student = toy_student(latents=2)
    adapters = toy.add_lora(
        student, rank=2, alpha=4, dropout=0.0, targets=["q_proj", "v_proj"], seed=3
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    student.eval()
    batch = AnswerDataset(toy_traces(3), chains=False).__getitems__([0, 1, 2])
    given = [batch[k] for k in ("question_ids", "question_mask", "answer_ids", "answer_mask")]
    before = student(*given).logits
    merge_lora(student, adapters)
    assert not any("lora" in name for name, _ in student.named_parameters())
    torch.testing.assert_close(student(*given).logits, before, rtol=1e-4, atol=1e-4)


def test_unknown_projections_are_refused_by_name() -> None:
    with pytest.raises(KavaError, match=r"training\.lora\.targets \['query'\]"):
        toy.add_lora(toy_student(), rank=2, alpha=2, dropout=0.0, targets=["query"], seed=0)

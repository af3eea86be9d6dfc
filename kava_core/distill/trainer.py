"""The Trainer with our loss: named terms, measured over all processes, and what they weigh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kava_core.artefacts import clear, fresh_folder, sync, sync_tree
from kava_core.console import warn
from kava_core.distill.balance import Balance
from kava_core.distill.callbacks import Window
from kava_core.distill.checkpoints import (
    RandomState,
    keep_last,
    last_whole_checkpoint,
    step_of,
)
from kava_core.distill.terms import Batch, Terms
from kava_core.errors import KavaError
from kava_core.parallel import group
from kava_core.store import ShardShuffleSampler

LOWEST_SHARE = 0.01
CHECKPOINTS = 2  # that are kept: the last may turn out torn


class TermsTrainer(Trainer):
    """Minimises the sum of the terms, in the sampler's order.

    balance: what the terms are multiplied with. shares_every: every so many steps (0: never) each
    term's share in the gradient is measured, where there are several. held_out: indices of the
    dataset that `evaluate` measures.
    """

    model_accepts_loss_kwargs = False  # every term is a mean over records: plain averaging is right

    def __init__(
        self,
        *,
        terms: Terms,
        balance: Balance,
        sampler: ShardShuffleSampler,
        window: Window,
        shares_every: int,
        held_out: Sequence[int],
        **options: Any,
    ) -> None:
        self.terms = terms
        self.balance = balance
        self.sampler = sampler
        self.window = window
        self.shares_every = shares_every
        self.held_out = held_out
        self.warned: set[str] = set()
        self.unmeasured: list[Batch] = []  # of the step that begins
        self.unfit: list[str] = []  # terms whose gradient in this step is no number
        self.ids: list[str] = []  # of the batches of this step that were taught, if any is unfit
        self.left = 0  # batches of this step
        super().__init__(**options)

    def take_over(self, checkpoint: Path) -> None:
        """End as the run did that wrote its last checkpoint; `train` would take one step more."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def write_weights(self, folder: Path) -> None:
        """What is trained, as a checkpoint holds it, whole or not at all."""
        if group.rank() == 0:
            temporary = fresh_folder(folder.with_name(f".{folder.name}.tmp"))
            self._save(str(temporary))
            sync_tree(temporary)
            clear(folder)
            temporary.replace(folder)
        group.wait()

    def read_weights(self, folder: Path) -> None:
        """Take what `write_weights` wrote."""
        self._load_from_checkpoint(str(folder))

    def _get_train_sampler(self, train_dataset: Any = None) -> ShardShuffleSampler:
        return self.sampler

    def get_batch_samples(self, *given: Any, **more: Any) -> tuple[list[Batch], Any]:
        """Keeps the batches of the step: what is measured is measured on all of them."""
        batches, items = super().get_batch_samples(*given, **more)
        self.unmeasured = batches
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        # Here, not when the batches are read: the step has begun, in its stage of a curriculum.
        batches, self.unmeasured = self.unmeasured, []
        if batches:
            self.unfit, self.ids, self.left = self._measure(batches), [], len(batches)
        terms = self.terms(model, inputs)
        terms = {name: term * self._factor(name) for name, term in terms.items()}
        loss = torch.stack(list(terms.values())).sum()
        # One exchange: the means over all processes, which are not finite if any process's is not.
        values = group.mean(torch.stack([loss, *terms.values()]).detach()).tolist()
        if not math.isfinite(values[0]):
            bad = [] if torch.isfinite(loss) else inputs["ids"]
            self._give_up(model, f"the loss became {values[0]:g}", bad)
        self.left -= 1
        if self.unfit:
            self.ids += inputs["ids"]
            if not self.left:  # no loss has named its records
                what = f"the gradient of {', '.join(self.unfit)} became no number"
                self._give_up(model, what, self.ids)
        window = self.window
        for name, value in zip(("loss", *terms), values, strict=True):
            window.sums[name] = window.sums.get(name, 0.0) + value
        window.batches += 1
        return (loss, None) if return_outputs else loss

    def _give_up(self, model: nn.Module, what: str, ids: list[str]) -> None:
        """Save what the steps before this one gave, and say where it went wrong.

        ids: of the records of this process on which it did.
        """
        step = self.state.global_step
        saved = group.from_first(lambda: last_whole_checkpoint(Path(str(self.args.output_dir))))
        if step > (step_of(saved) if saved else 0):
            self.window.rewind()
            self._save_checkpoint(model, trial=None)
        bad = group.gather(ids)
        raise KavaError(
            f"{what} at step {step + 1}, on the records "
            f"{', '.join(name for names in bad for name in names)}. The state before that step is "
            "saved. Lower the learning rate, or look at these records."
        )

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """A checkpoint holds all that is trained, a student's folder only what answers need."""
        assert self.model is not None
        super()._save(output_dir, self.model.state_dict() if state_dict is None else state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """On the disk, whole, before older ones go."""
        super()._save_checkpoint(model, trial)
        if group.rank() == 0:
            folder = Path(str(self.args.output_dir))
            sync_tree(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            sync(folder)
            keep_last(folder, CHECKPOINTS)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        if group.rank() == 0:
            sync_tree(folder)
        else:  # of the first process's files, some may still be there under names for the moment
            sync(folder / f"rng_state_{group.rank()}.pth")
            sync(folder)
        # The first process writes the Trainer's state next, which makes the checkpoint a whole one:
        # all else is on the disk before it.
        group.wait()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The terms on the held-out records, logged as `eval_loss…`; draws no random numbers.

        Without what they are balanced with, which changes from step to step, so that the values of
        a curve can be compared.
        """
        assert self.model is not None
        own = self.held_out[group.rank() :: group.size()]
        step = self.args.per_device_train_batch_size
        sums: dict[str, float] = {}
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for first in range(0, len(own), step):
                indices = list(own[first : first + step])
                batch = self.train_dataset.__getitems__(indices)  # type: ignore[union-attr]
                terms = self.terms(self.model, send_to_device(batch, self.args.device))
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(term) * len(indices)
        self.model.train()
        parts = [part for part in group.gather(sums) if part]  # a process may have no records
        logs = {
            f"eval_loss_{name}": sum(part[name] for part in parts) / len(self.held_out)
            for name in parts[0]
        }
        logs["eval_loss"] = sum(logs.values())
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _measure(self, batches: list[Batch]) -> list[str]:
        """The weights and the shares of the terms, where the step that begins is due; the names of
        terms whose gradient is no number."""
        step = self.state.global_step
        weights_due = self.balance.due(step)
        shares_due = self.shares_every > 0 and step % self.shares_every == 0
        if not weights_due and not shares_due:
            return []
        norms = self._gradient_norms(batches)
        if unfit := [name for name, norm in norms.items() if not math.isfinite(norm)]:
            return unfit
        if weights_due:
            self.window.weights = self.balance.weights(norms, self._done())
        if shares_due and norms:
            self._note_shares({name: norm * self._factor(name) for name, norm in norms.items()})
        return []

    def _factor(self, name: str) -> float:
        if name in self.balance.shares:
            return self.window.weights.get(name, 0.0)
        return self.balance.left(name, self._done())

    def _done(self) -> float:
        return self.state.global_step / self.args.max_steps

    def _gradient_norms(self, batches: list[Batch]) -> dict[str, float]:
        """Of each term's gradient over all batches of a step and all processes; none of one term.

        The step itself then draws the random numbers that were drawn here. One term after the
        other, so that no more than one gradient is held.
        """
        assert self.model is not None
        numbers = RandomState.now()
        with torch.no_grad():
            names = list(self.terms(self.model, batches[0]))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norms = {}
        for name in names if len(names) > 1 else []:
            numbers.restore()
            sums: dict[int, Tensor] = {}
            for batch in batches:
                term = self.terms(self.model, batch)[name]
                for i, g in enumerate(torch.autograd.grad(term, parameters, allow_unused=True)):
                    if g is not None:
                        sums[i] = sums[i] + g.float() if i in sums else g.float()
            squares = [group.mean(x / len(batches)).square().sum() for x in sums.values()]
            norms[name] = float(torch.stack(squares).sum().sqrt())
        numbers.restore()
        return norms

    def _note_shares(self, norms: dict[str, float]) -> None:
        total = sum(norms.values()) or 1.0
        self.window.shares = {name: norm / total for name, norm in norms.items()}
        for name, share in self.window.shares.items():
            if share < LOWEST_SHARE and name not in self.warned:
                self.warned.add(name)
                warn(
                    f"warning: the {name} term carries {share:.2%} of the gradient at step "
                    f"{self.state.global_step}; at this weight it teaches next to nothing."
                )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the window, which begins anew."""
        window = self.window
        if window.batches and "loss" in logs:
            for name, total in window.sums.items():
                logs["loss" if name == "loss" else f"loss_{name}"] = total / window.batches
            for name, share in window.shares.items():
                logs[f"gradient_share_{name}"] = share
            for name, weight in window.weights.items():
                logs[f"weight_{name}"] = weight
            window.sums, window.batches = {}, 0
        super().log(logs, *args, **kwargs)

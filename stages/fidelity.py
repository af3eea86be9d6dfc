"""fidelity ← problems, teacher: what the teacher can still answer from a compressed cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kava_core.artefacts import publish, read_json, work_folder, write_json
from kava_core.console import progress, say
from kava_core.errors import KavaError
from kava_core.settings import Fidelity

from .run import Run, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kava_core.eviction import Policy
    from kava_core.fidelity.examiner import Batch, Examiner, Layers, Outcome
    from kava_core.fidelity.results import Cell, Result
    from kava_core.models.slot_cache import SlotCache
    from kava_core.record import Record


@dataclass(frozen=True)
class Plan:
    """The grid of settings against the teacher's layers; budgets per layer or group of layers."""

    cells: list[Cell]
    policies: dict[str, Policy]
    layers: Layers
    budgets: dict[int, list[int]]
    half: str

    @classmethod
    def of(cls, settings: Fidelity, model_layers: int) -> Plan:
        """KavaError names the setting that cannot be met."""
        from kava_core.eviction import group_layers, make_budgets, parse_layers
        from kava_core.fidelity.examiner import Layers
        from kava_core.fidelity.results import Cell

        policies = {policy.label: policy for policy in settings.policies}
        chosen = parse_layers(settings.model_dump()["layers"], model_layers)
        groups = group_layers(len(chosen), settings.share_size if settings.share != "none" else 1)
        budgets = sorted(settings.budgets)
        return cls(
            cells=[
                Cell("full"),
                Cell("none"),
                *(
                    Cell(policy, budget, bits.keys, bits.values)
                    for policy in policies
                    for budget in budgets
                    for bits in settings.bits
                ),
            ],
            policies=policies,
            layers=Layers(chosen, groups, settings.share),
            budgets={m: make_budgets(settings.budget_shape, len(groups), m) for m in budgets},
            half=settings.half,
        )


@stage
def fidelity(run: Run) -> None:
    """Let the teacher answer held-out problems from its compressed cache.

    For every policy, budget and bit width of the `fidelity` settings, and for the full cache and
    none: exact match, perplexity of the gold answer and KL to the full cache in metrics.json, every
    answer in answers.parquet, seconds and memory in timings.json, heatmaps over budget and number
    of steps. Prints the smallest budget near enough to the full cache. Killed and run again, it
    goes on where it was.
    """
    from rich.console import Console

    from kava_core.fidelity.examiner import Examiner, alike
    from kava_core.fidelity.results import recommendation_table, write_results
    from kava_core.models.loading import (
        DTYPES,
        load_config,
        load_model,
        load_tokenizer,
        model_fingerprint,
        to_device,
        tokenizer_fingerprint,
    )
    from kava_core.models.teacher_pass import check_lengths
    from kava_core.parallel.threads import torch_threads
    from kava_core.problems.folder import AskedFolder, ProblemFolder, open_problems, open_test_sets
    from kava_core.problems.traces import TraceEncoder

    settings = run.settings.fidelity
    if settings is None:
        raise KavaError(f"pipeline {run.name} has no section `fidelity`. Add one, or leave it out.")
    source: ProblemFolder | AskedFolder
    if settings.split == "test":
        source = open_test_sets(run.path("test_sets"))
    else:
        source = open_problems(run.path("problems"))
    teacher = str(run.path("teacher"))
    tokenizer, config = load_tokenizer(teacher), load_config(teacher)
    plan = Plan.of(settings, config.num_hidden_layers)
    # Without steps there is no cache to compress.
    problems = [p for p in source.load(settings.split) if p.steps][: settings.limit]
    if not problems:
        raise KavaError(
            f"{source.path} has no {settings.split} problems with steps. Ask `prepare` for some."
        )
    encoder = TraceEncoder(tokenizer, source.traces)
    traces = encoder.encode_all(problems)
    check_lengths(traces, config)
    output = run.path("fidelity")
    work = work_folder(
        output,
        "fidelity",
        {
            "settings": settings.model_dump(mode="json", by_alias=True),
            "inputs": {
                "problems": source.fingerprint(settings.split),
                "teacher": model_fingerprint(teacher),
                "tokenizer": tokenizer_fingerprint(tokenizer),
            },
        },
    )
    batches = [[traces[i] for i in chosen] for chosen in alike(traces, settings.batch_size)]
    with torch_threads(settings.threads):
        examiner = Examiner(
            to_device(load_model(teacher, DTYPES[settings.model_dtype])),
            plan.layers,
            eos=encoder.eos,
            max_new_tokens=settings.max_new_tokens,
        )
        results = _examine(plan, examiner, tokenizer, batches, work)
    built = work / "output"
    built.mkdir(exist_ok=True)
    metrics = write_results(built, results, split=settings.split, within=settings.within)
    publish((built, output))
    Console().print(recommendation_table(metrics))


def _examine(
    plan: Plan,
    examiner: Examiner,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Record]],
    work: Path,
) -> list[Result]:
    """The teacher reads each batch once and answers it from every kind of cache.

    A batch's answers from one kind are a file in `work`, which is not made twice.
    """
    from kava_core.fidelity.results import Result

    results = [Result(cell) for cell in plan.cells]
    parts = [
        [work / f"batch-{batch:05d}-cell-{cell:05d}.json" for cell in range(len(results))]
        for batch in range(len(batches))
    ]
    total = len(batches) * len(results)
    done = sum(file.is_file() for files in parts for file in files)
    if done:
        say(f"fidelity: {done} of {total} parts are finished already")
    with progress() as display:
        task = display.add_task("fidelity", total=total, note="")
        for traces, files in zip(batches, parts, strict=True):
            if not all(file.is_file() for file in files):
                batch = examiner.read(traces)
                # Not the answers of cell `full`: the first forward of a shape is slow to start.
                reference = examiner.examine(batch, partial(examiner.full, batch))
            for result, file in zip(results, files, strict=True):
                display.update(task, note=f"{result.cell.series}, {result.cell.budget or ''}")
                if not file.is_file():
                    write_json(
                        file, _part(plan, result.cell, examiner, tokenizer, batch, reference)
                    )
                part = read_json(file)
                result.answers += part["answers"]
                result.costs.append(part["costs"])
                display.advance(task)
    return results


def _part(
    plan: Plan,
    cell: Cell,
    examiner: Examiner,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    reference: Outcome,
) -> dict[str, Any]:
    """The answers to one batch from one kind of cache, and what they cost."""
    from kava_core.answers import same_answer
    from kava_core.evaluation.accuracy import read_answer

    make, tokens, size = _cache(plan, cell, examiner, batch)
    outcome = examiner.examine(batch, make, reference.log_probs)
    answers = []
    for i, trace in enumerate(batch.traces):
        text = str(tokenizer.decode(outcome.written[i], skip_special_tokens=True))
        answer = read_answer(text, prompted=True)
        answers.append(
            {
                "id": trace.id,
                "n_steps": trace.n_steps,
                "topic": trace.topic,
                "cot_tokens": len(trace.cot_ids),
                "policy": cell.policy,
                "budget": cell.budget,
                "keys_bits": cell.keys_bits,
                "values_bits": cell.values_bits,
                "tokens_kept": tokens[i],
                "bytes": size[i],
                "text": text,
                "answer": answer,
                "gold": trace.answer,
                "correct": bool(answer) and same_answer(answer, trace.answer),
                "nll": outcome.nll[i],
                "kl": outcome.kl[i],
                "answer_tokens": len(trace.answer_ids),
            }
        )
    costs = {
        "problems": len(answers),
        "n_steps": batch.traces[0].n_steps,
        "seconds_per_problem": outcome.seconds,
        "peak_memory_bytes": outcome.memory,
    }
    return {"answers": answers, "costs": costs}


def _cache(
    plan: Plan, cell: Cell, examiner: Examiner, batch: Batch
) -> tuple[Callable[[], SlotCache], list[float], list[int]]:
    """What makes a batch's cache of one kind; per record the tokens a head sees, stored bytes."""
    from kava_core.store import Codec

    lengths = batch.slots.lengths
    if cell.policy == "full":
        tokens = [float(n) for n in lengths]
        return partial(examiner.full, batch), tokens, examiner.full_bytes(batch)
    if cell.keys_bits is None or cell.values_bits is None or cell.budget is None:
        return partial(examiner.none, batch), [0.0] * len(lengths), [0] * len(lengths)
    codec = Codec.from_bits(keys=cell.keys_bits, values=cell.values_bits, half=plan.half)
    budgets = plan.budgets[cell.budget]
    compressed = examiner.compress(batch, plan.policies[cell.policy], budgets, codec)
    return partial(examiner.restore, batch, compressed), compressed.tokens, compressed.bytes

"""teacher ← problems: a causal LM that writes the chain of thought and then the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kava_core.artefacts import publish, work_folder, write_json
from kava_core.console import progress, say
from kava_core.problems.folder import open_problems

from .run import Run, stage, torch_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kava_core.problems.folder import ProblemFolder
    from kava_core.problems.traces import TraceEncoder


@stage
def teacher(run: Run) -> None:
    """Load or build a causal LM and fine-tune it on chains of thought.

    Writes teacher/: weights, configuration and tokenizer in Hugging Face's layout, loss curves, and
    metrics.json with its accuracy on validation problems with and without a written chain.
    """
    from kava_core.distill.batches import ChainDataset
    from kava_core.distill.fit import fit
    from kava_core.distill.teacher import chain_terms
    from kava_core.models.loading import save_model, to_device
    from kava_core.problems.traces import TraceEncoder
    from kava_core.store.sampler import ShardShuffleSampler

    from .fitting import fit_settings, hold_out

    settings = run.settings.teacher
    problems = open_problems(run.path("problems"))
    output = run.path("teacher")
    made_from = {
        "settings": settings.model_dump(mode="json"),
        "fingerprints": {"problems": problems.fingerprint("train", "validation")},
    }
    work = work_folder(output, "teacher", made_from)
    training = settings.training
    with torch_threads(training.threads if training else 1):
        model, tokenizer = _start(run, problems)
        encoder = TraceEncoder(tokenizer, problems.traces)
        folder = work / "output"
        folder.mkdir(exist_ok=True)
        if training is not None:
            traces = encoder.encode_all(problems.load("train"))
            _check(traces, model)
            taught, held_out = hold_out([len(traces)], training, "teacher.training")
            fit(
                model,
                chain_terms,
                ChainDataset(traces),
                ShardShuffleSampler(taught, seed=training.seed),
                fit_settings(training, run.settings.cadence),
                folder=work / "checkpoints",
                live_folder=folder / "live",
                title="teacher",
                loader_workers=run.settings.resources.loader_workers,
                held_out=held_out,
            )
        metrics = _validate(run, to_device(model), encoder, problems)
        save_model(folder, model, tokenizer)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "teacher.json", made_from)
        publish((folder, output))
    say(
        f"teacher on {metrics['n']} validation problems: {metrics['exact_match_cot']:.1f} % with "
        f"a chain of thought, {metrics['exact_match_no_cot']:.1f} % without"
    )


def _start(run: Run, problems: ProblemFolder) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from kava_core.models.loading import build_llama, load_model, load_tokenizer
    from kava_core.problems.tokenizer import train_tokenizer
    from kava_core.problems.traces import ANSWER_PROMPT

    settings = run.settings.teacher
    if settings.model != "scratch":
        return load_model(settings.model), load_tokenizer(settings.model)
    train = problems.load("train")
    texts = [
        text
        for p in train
        for text in (p.question + "\n", "\n".join(p.steps), f"{ANSWER_PROMPT} {p.answer}")
    ]
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


def _check(traces: list, model: PreTrainedModel) -> None:
    from kava_core.models.teacher_pass import check_lengths

    check_lengths(traces, model.config.get_text_config())


def _validate(
    run: Run, model: PreTrainedModel, encoder: TraceEncoder, problems: ProblemFolder
) -> dict[str, float]:
    from kava_core.evaluation.accuracy import ask, summarise
    from kava_core.models.latent import LatentReasoner

    chosen = problems.load("validation")[: run.settings.teacher.validate_on]
    results = {}
    with progress() as display:
        for name, prompt in (("cot", []), ("no_cot", encoder.answer_prompt_ids)):
            task = display.add_task(f"teacher, {name}", total=len(chosen), note="")
            predictions = ask(
                LatentReasoner.plain(model, answer_prompt_ids=prompt, eos_token_id=encoder.eos),
                encoder.tokenizer,
                encoder,
                chosen,
                batch_size=run.settings.teacher.batch_size,
                max_new_tokens=run.settings.teacher.max_new_tokens,
                advance=lambda n, task=task: display.advance(task, n),  # type: ignore[misc]
            )
            results[name] = summarise(predictions)
    return {
        "n": len(chosen),
        "exact_match_cot": results["cot"]["exact_match"],
        "exact_match_no_cot": results["no_cot"]["exact_match"],
    }

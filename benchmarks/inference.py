"""What reasoning in latents saves when a model answers.

    python benchmarks/inference.py [--json] [--dtype bfloat16] [--profile]

Problems per second and decoder calls of a latent student against the same weights writing their
chain of thought with `model.generate` (transformers; greedy, with a KV cache): Q = 64, a trace of
128 tokens, A = 8; M = 24 latents, T = 3 Jacobi iterations; batches of 1 and of 32. Weights are
random and nothing ends a sequence, so the lengths are forced and no step is spent on looking for an
end. The written answer's prompt is not counted against the chain of thought: it writes 128 + 8
tokens, while the student reads the prompt as well. Rounds alternate between all ways; ratios are
medians over rounds. Beside the seconds stand those of the processor, all threads together, which
other programs on the machine change little.

Beside these two, what bounds them: the same weights answering at once (`no_cot`), and the bare
decoder (`bound`), called as often as the student calls it and with the same shapes, with embeddings
made before, no masks and no choice of tokens. Of the ratios

    latent_vs_cot_b1, _b32     how many times as fast as the chain a latent answer is
    no_cot_vs_cot_b1, _b32     the same of an answer at once, which no latents can surpass
    latent_vs_no_cot_b1, _b32  what thinking costs: seconds over those of an answer at once
    latent_vs_bound_b1, _b32   seconds of the bare decoder over those of the student
    passes_cot_vs_latent       decoder calls of the chain over those of the student

`--profile` prints instead which operations the processor's time of a latent answer goes to.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from kava_stages.cli import quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import to_device

QUESTION, TRACE, ANSWER, PROMPT = 64, 128, 8, 4
LATENTS, ITERATIONS = 24, 3
BATCHES = (1, 32)
TARGETS = {
    "latent_vs_cot_b1": 10.0,
    "latent_vs_cot_b32": 6.0,
    "latent_vs_bound_b1": 0.8,
    "latent_vs_bound_b32": 0.8,
    "passes_cot_vs_latent": 8.0,
}
LABELS = {
    "cot": "written, model.generate",
    "latent": "latent student",
    "no_cot": "answer at once",
    "bound": "bare decoder",
}
# What an operation's name has in it, of those that take time.
PARTS = {
    "multiplications by weights": ("::mm", "::addmm", "::bmm"),
    "attention": ("attention",),
    "copies, the cache's growth among them": ("::cat", "::copy", "::clone"),
}


def build(dtype: torch.dtype) -> tuple[PreTrainedModel, LatentReasoner]:
    """A Llama of 18 M parameters, and the student made from it, which has its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    config._attn_implementation = "sdpa"
    model = to_device(LlamaForCausalLM(config)).eval()
    for parameter in model.parameters():  # not model.to(dtype), which rounds rotary frequencies
        parameter.data = parameter.data.to(dtype)
    # No end of sequence: then transformers looks for none.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    student = LatentReasoner.from_teacher(
        model,
        latents=LATENTS,
        iterations=ITERATIONS,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=list(range(5, 5 + PROMPT)),
        eos_token_id=-1,
        seed=0,
    )
    student.config.eos_token_id = None  # nor here
    return model, student.eval()


def systems(
    batch: int, calls: list[None], dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], Tensor]]:
    """Every way to answer a batch of questions, giving the tokens written; `calls` grows by one
    with every decoder call."""
    model, student = build(dtype)
    ids = torch.randint(8, 8000, (batch, QUESTION), generator=torch.Generator().manual_seed(1))
    ids, mask = ids.to(model.device), torch.ones_like(ids).to(model.device)
    at_once = LatentReasoner.plain(
        model, answer_prompt_ids=student.config.answer_prompt_ids, eos_token_id=-1
    )
    at_once.config.eos_token_id = None

    generate: Any = model.generate  # typed as a tensor by its mixin

    def written() -> Tensor:
        found = generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=TRACE + ANSWER,
            do_sample=False,
            use_cache=True,
        )
        return found[:, QUESTION:]

    for decoder in (model, student.decoder):
        decoder.base_model.register_forward_hook(lambda *_: calls.append(None))
    return {
        "cot": written,
        "latent": lambda: student.generate(ids, mask, max_new_tokens=ANSWER)[:, QUESTION:],
        "no_cot": lambda: at_once.generate(ids, mask, max_new_tokens=ANSWER)[:, QUESTION:],
        "bound": bare(student.decoder, batch),
    }


def bare(decoder: PreTrainedModel, batch: int) -> Callable[[], Tensor]:
    """T + 1 calls of the shapes in which a student thinks, and one for each further token."""
    first = QUESTION + 1 + LATENTS
    columns = [first, *[LATENTS] * (ITERATIONS - 1), LATENTS + 1 + PROMPT, *[1] * (ANSWER - 1)]
    size, like = decoder.config.get_text_config().hidden_size, next(decoder.parameters())
    embeds = [torch.randn(batch, n, size).to(like) for n in columns]

    def answer() -> Tensor:
        cache = DynamicCache()
        for n, x in enumerate(embeds[:ITERATIONS]):
            if n:
                cache.crop(-LATENTS)
            decoder.base_model(inputs_embeds=x, past_key_values=cache, use_cache=True)
        cache.crop(-LATENTS)
        logits = [
            decoder(inputs_embeds=x, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            for x in embeds[ITERATIONS:]
        ]
        return torch.cat(logits, 1).argmax(-1)

    return answer


@dataclass
class Measured:
    """One way to answer: seconds, and the processor's, of every round; decoder calls of one."""

    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    passes: int = 0


def measure(batch: int, rounds: int, dtype: torch.dtype) -> dict[str, Measured]:
    lengths = {"cot": TRACE + ANSWER, "latent": ANSWER, "no_cot": ANSWER, "bound": ANSWER}
    found = {name: Measured() for name in lengths}
    calls: list[None] = []
    ways = systems(batch, calls, dtype)
    for turn in range(rounds + 1):
        for name, answer in ways.items():
            calls.clear()
            began, busy = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                tokens = answer()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                found[name].seconds.append(time.perf_counter() - began)
                found[name].busy.append(time.process_time() - busy)
            found[name].passes = len(calls)
            assert tokens.shape == (batch, lengths[name]), tokens.shape
    return found


def shares(batch: int, dtype: torch.dtype) -> dict[str, float]:
    """Which part of the time of a latent answer, as torch's profiler sees it, goes to what."""
    answer = systems(batch, [], dtype)["latent"]
    with torch.inference_mode():
        answer()  # warms up
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            answer()
    found = {**dict.fromkeys(PARTS, 0.0), "the rest": 0.0}
    for event in seen.key_averages():
        fits = (part for part, names in PARTS.items() if any(name in event.key for name in names))
        found[next(fits, "the rest")] += event.self_cpu_time_total
    whole = sum(found.values())
    return {part: spent / whole for part, spent in found.items()}


def show_shares(console: Console, dtype: torch.dtype) -> None:
    table = Table(title=f"What the time of a latent answer goes to, in per cent; {dtype}")
    for column in ("", *(f"batch {batch}" for batch in BATCHES)):
        table.add_column(column, justify="left" if not column else "right")
    found = [shares(batch, dtype) for batch in BATCHES]
    for part in found[0]:
        table.add_row(part, *(f"{100 * one[part]:.0f}" for one in found))
    console.print(table)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the ratios.")
@click.option(
    "--rounds", type=click.IntRange(1), default=7, show_default=True, help="Timed rounds of each."
)
@click.option(
    "--dtype",
    "dtype_name",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the weights.",
)
@click.option("--profile", "profiled", is_flag=True, help="Show what the time goes to.")
def main(as_json: bool, rounds: int, dtype_name: str, profiled: bool) -> None:
    """Compare a student's latents with a written chain of thought."""
    quiet()
    dtype: torch.dtype = getattr(torch, dtype_name)
    console = Console(file=sys.stdout)
    if profiled:
        show_shares(console, dtype)
        return
    table = Table(
        title=f"Q = {QUESTION}, trace of {TRACE} tokens, A = {ANSWER}; "
        f"M = {LATENTS}, T = {ITERATIONS}; {dtype_name}"
    )
    for column in ("", "batch", "seconds", "processor s", "problems/s", "passes"):
        table.add_column(column, justify="left" if not column else "right")
    ratios: dict[str, float] = {}
    for batch in BATCHES:
        found = measure(batch, rounds, dtype)

        def ratio(one: str, other: str, found: dict[str, Measured] = found) -> float:
            # Round by round, so that a machine that drifts drifts under both.
            pairs = zip(found[one].seconds, found[other].seconds, strict=True)
            return statistics.median(a / b for a, b in pairs)

        ratios[f"latent_vs_cot_b{batch}"] = ratio("cot", "latent")
        ratios[f"no_cot_vs_cot_b{batch}"] = ratio("cot", "no_cot")
        ratios[f"latent_vs_no_cot_b{batch}"] = ratio("latent", "no_cot")
        ratios[f"latent_vs_bound_b{batch}"] = ratio("bound", "latent")
        for name, label in LABELS.items():
            middle, busy = (statistics.median(x) for x in (found[name].seconds, found[name].busy))
            row = f"{middle:.3f}", f"{busy:.3f}", f"{batch / middle:.1f}", str(found[name].passes)
            table.add_row(label, str(batch), *row)
    ratios["passes_cot_vs_latent"] = found["cot"].passes / found["latent"].passes
    if as_json:
        print(json.dumps(ratios))
        return
    console.print(table)
    for name, value in ratios.items():
        target = TARGETS.get(name)
        console.print(f"{name}: {value:.2f}" + (f" (target: at least {target})" if target else ""))


if __name__ == "__main__":
    main()

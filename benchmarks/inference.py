"""What reasoning in latents saves when a model answers.

    python benchmarks/inference.py [--json]

Problems per second and decoder calls of a latent student against the same weights writing their
chain of thought with `model.generate` (transformers; greedy, with a KV cache): Q = 64, a trace of
128 tokens, A = 8; M = 24 latents, T = 3 Jacobi iterations; batches of 1 and of 32. Weights are
random and nothing ends a sequence, so the lengths are forced and no step is spent on looking for an
end. The written answer's prompt is not counted against the chain of thought: it writes 128 + 8
tokens, while the student reads the prompt as well. Rounds alternate between the two; ratios are
medians over rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import to_device
from stages.cli import quiet

QUESTION, TRACE, ANSWER, PROMPT = 64, 128, 8, 4
LATENTS, ITERATIONS = 24, 3
BATCHES = (1, 32)
TARGETS = {"latent_vs_cot_b1": 4.0, "latent_vs_cot_b32": None, "passes_cot_vs_latent": 8.0}


def build() -> tuple[PreTrainedModel, LatentReasoner]:
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
    model = to_device(LlamaForCausalLM(config))
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


def systems(batch: int, calls: list[None]) -> dict[str, Callable[[], Tensor]]:
    """Either way to answer a batch of questions, giving the tokens written; `calls` grows by one
    with every decoder call."""
    model, student = build()
    ids = torch.randint(8, 8000, (batch, QUESTION), generator=torch.Generator().manual_seed(1))
    ids, mask = ids.to(model.device), torch.ones_like(ids).to(model.device)

    generate: Any = model.generate  # typed as a tensor by its mixin

    def written() -> Tensor:
        with torch.inference_mode():
            found = generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=TRACE + ANSWER,
                do_sample=False,
                use_cache=True,
            )
        return found[:, QUESTION:]

    def latent() -> Tensor:
        with torch.inference_mode():
            return student.generate(ids, mask, max_new_tokens=ANSWER)[:, QUESTION:]

    for decoder in (model, student.decoder):
        decoder.base_model.register_forward_hook(lambda *_: calls.append(None))
    return {"cot": written, "latent": latent}


def measure(batch: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round, and decoder calls, of either way to answer."""
    seconds: dict[str, list[float]] = {"cot": [], "latent": []}
    passes = {}
    lengths = {"cot": TRACE + ANSWER, "latent": ANSWER}
    calls: list[None] = []
    ways = systems(batch, calls)
    for turn in range(rounds + 1):
        for name, answer in ways.items():
            calls.clear()
            began = time.perf_counter()
            tokens = answer()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
            passes[name] = len(calls)
            assert tokens.shape == (batch, lengths[name]), tokens.shape
    return seconds, passes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the ratios.")
@click.option(
    "--rounds", type=click.IntRange(1), default=7, show_default=True, help="Timed rounds of each."
)
def main(as_json: bool, rounds: int) -> None:
    """Compare a student's latents with a written chain of thought."""
    quiet()
    table = Table(
        title=f"Q = {QUESTION}, trace of {TRACE} tokens, A = {ANSWER}; "
        f"M = {LATENTS}, T = {ITERATIONS}"
    )
    for column in ("", "batch", "seconds (median)", "problems/s", "passes"):
        table.add_column(column, justify="left" if not column else "right")
    ratios: dict[str, float] = {}
    for batch in BATCHES:
        seconds, passes = measure(batch, rounds)
        # Pair by pair, so that a machine that drifts drifts under both.
        ratios[f"latent_vs_cot_b{batch}"] = statistics.median(
            cot / latent for cot, latent in zip(seconds["cot"], seconds["latent"], strict=True)
        )
        for name, label in (("cot", "written, model.generate"), ("latent", "latent student")):
            middle = statistics.median(seconds[name])
            table.add_row(
                label, str(batch), f"{middle:.3f}", f"{batch / middle:.1f}", str(passes[name])
            )
    ratios["passes_cot_vs_latent"] = passes["cot"] / passes["latent"]
    if as_json:
        print(json.dumps(ratios))
        return
    console = Console(file=sys.stdout)
    console.print(table)
    for name, ratio in ratios.items():
        target = TARGETS[name]
        console.print(f"{name}: {ratio:.2f}" + (f" (target: at least {target})" if target else ""))


if __name__ == "__main__":
    main()

"""The inputs of every stage, each made without the stage that makes it in a pipeline.

So a stage's golden values change with that stage alone: another loss of the teacher's says nothing
about eviction. Numbers come from numpy, whose generator gives the same ones on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kava_core.artefacts import write_json
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import model_fingerprint, save_model, tokenizer_fingerprint
from kava_core.models.phase import rotary_of
from kava_core.problems.folder import open_problems, write_problems, write_test_sets
from kava_core.problems.records import Problem
from kava_core.problems.splits import ProblemSplits
from kava_core.problems.traces import TraceEncoder
from kava_core.record import Record
from kava_core.settings import load_pipeline
from kava_core.store import (
    Codec,
    Geometry,
    Manifest,
    StoreSpec,
    finalise,
    write_targets_shard,
    write_teacher_shard,
)

PIPELINES = Path(__file__).parent / "pipelines.yaml"
NAME = "golden"
FLOAT32 = Codec(keys="float32", values="float32", endpoint="float32")
SHARD = 8  # records
SHAPE: dict[str, int] = {"layers": 2, "kv_heads": 2, "head_dim": 8, "hidden_size": 32}
SLOTS = 4
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {
            "question": f"Dr. Lee has {n:,} pens and buys 1.5 times as many. How many now?",
            "answer": f"She buys {n}*1.5=<<{n} * 1.5={1.5 * n}>>{1.5 * n}. Well.\n"
            f"So {n}+{1.5 * n}=<<{n}+{1.5 * n}={2.5 * n}>>{2.5 * n}.\n#### {2.5 * n:,}",
        }
        for n in range(900, 1020, 10)
    ],
    "gsm8k-aug": [
        {"text": f"{n} and 2?||<<{n}+2={n + 2}>> <<{n + 2}*2=9>> #### 9"} for n in (3, 4)
    ],
    "gsm8k-aug-nl": [
        {"question": f"{n} and 1?", "cot": f"Mr. A has 2.5. He adds {n}! So 3.5.", "answer": "3.5"}
        for n in range(3)
    ],
    "gsm-hard": [{"input": f"{n}?", "code": "", "target": n / 3} for n in (1.0, 3e20)],
    "svamp": [
        {
            "Body": "Dan has 8 cats.",
            "Question": f"And {n}?",
            "Equation": f"( ( 8.0 - {n}.0 ) * 2.50 )",
            "Answer": 2.5 * (8 - n),
            "Type": "Subtraction",
        }
        for n in range(3)
    ],
    "metamath": [
        {
            "query": f"{n}?",
            "response": f"Add. So $x = {n}$.\n#### {n}\nThe answer is: \\frac{{1}}{{{n}}}",
        }
        for n in range(1, 4)
    ],
    "math": [
        {
            "problem": f"{n}?",
            "solution": f"First \\boxed{{1}}. Then $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
        }
        for n in range(1, 4)
    ],
    "table": [
        {"q": f"{n}?", "a": n / 8, "s": ["one", "two  words"], "t": "sums"} for n in range(3)
    ],
}


def make_inputs(home: Path) -> Path:
    """Everything that a stage may read, under `home`/data, and the settings beside it."""
    (home / "pipelines.yaml").write_text(PIPELINES.read_text(encoding="utf-8"), encoding="utf-8")
    for name, rows in ROWS.items():
        ending = "txt" if name == "gsm8k-aug" else "jsonl"
        lines = [row["text"] if ending == "txt" else json.dumps(row) for row in rows]
        (home / f"rows/{name}.{ending}").parent.mkdir(exist_ok=True)
        (home / f"rows/{name}.{ending}").write_text("\n".join(lines), encoding="utf-8")
    data = home / "data" / NAME
    rng = np.random.default_rng(20)
    _problems(data)
    tokenizer = _tokenizer()
    model = _model(tokenizer, rng)
    save_model(data / "teacher", model, tokenizer)
    source = open_problems(data / "problems")
    encoder = TraceEncoder(tokenizer, source.traces)
    records = encoder.encode_all(source.load("train"))
    fingerprints = {
        "problems": source.fingerprint("train"),
        "teacher": model_fingerprint(str(data / "teacher")),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    rotary = rotary_of(model)
    caches = StoreSpec(Geometry.plain(**SHAPE), FLOAT32, "pre_rope", rotary)
    targets = StoreSpec(Geometry.plain(**SHAPE, slots=SLOTS), FLOAT32, "pre_rope", rotary)
    manifest = _teacher_kv(data / "teacher_kv", caches, records, rng, fingerprints)
    fingerprints["teacher_kv"] = manifest.digest
    _kv_targets(data / "kv_targets", targets, records, rng, fingerprints)
    for name, latents in (("kava", SLOTS), ("no-cot", 0)):
        _student(data / "students" / name, model, encoder, latents, rng, fingerprints)
    return home


def settings_of(name: str) -> dict[str, Any]:
    """The plain settings of one section of the pipeline, with every default."""
    _, pipeline = load_pipeline(PIPELINES, NAME)
    found: dict[str, Any] = getattr(pipeline, name).model_dump(mode="json", by_alias=True)
    return found


def _problems(data: Path) -> None:
    def problems(split: str, numbers: range) -> list[Problem]:
        return [
            Problem(
                id=f"golden-{split}-{i:06d}",
                question=f"ann has {n} pens . she gets {n % 7 + 2} and makes it twice . how many ?",
                steps=(f"<<{n}+{n % 7 + 2}={n + n % 7 + 2}>>", f"<<{n + n % 7 + 2}*2=4>>")[
                    : 1 + n % 3
                ],
                answer=str(n % 10),
                source="golden",
                topic=("even", "odd")[n % 2],
            )
            for i, n in enumerate(numbers)
        ]

    splits = ProblemSplits(
        problems("train", range(20, 44)),
        problems("validation", range(50, 56)),
        problems("test", range(60, 84)),
        test_sets={
            "bare": [Problem(f"bare-{n}", f"{n} ?", (), str(n), "bare", "") for n in range(3)]
        },
    )
    write_problems(data / "problems", splits, "equations", {})
    write_test_sets(data / "test_sets", splits, "equations", {})


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    signs = ["<|pad|>", "<|eos|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=False,
    )


def _model(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> LlamaForCausalLM:
    """A Llama that attends unevenly and answers at random, mostly in digits, and briefly."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=48,
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=4,
        num_key_value_heads=SHAPE["kv_heads"],
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(_normal(rng, *parameter.shape, scale=0.25))
        digits = [tokenizer.convert_tokens_to_ids(sign) for sign in "0123456789"]
        loud = torch.full((len(tokenizer), 1), 0.05)
        loud[digits], loud[tokenizer.eos_token_id] = 1.0, 2.0
        model.lm_head.weight.mul_(loud)
    return model.eval()


def _teacher_kv(
    folder: Path,
    spec: StoreSpec,
    records: list[Record],
    rng: np.random.Generator,
    fingerprints: dict[str, str],
) -> Manifest:
    """Caches in which neighbours are alike, so that there is redundancy to find."""
    folder.mkdir(parents=True)
    layers, heads = SHAPE["layers"], SHAPE["kv_heads"]
    shards = [records[first : first + SHARD] for first in range(0, len(records), SHARD)]
    for number, shard in enumerate(shards):
        tokens = sum(len(record.cot_ids) for record in shard)
        lead = (tokens, layers, heads)
        noise = _normal(rng, *lead, SHAPE["head_dim"])
        write_teacher_shard(
            folder,
            spec,
            number,
            shard,
            keys=noise + 0.8 * noise.roll(1, 0) + 0.5,
            values=_normal(rng, *lead, SHAPE["head_dim"]),
            importance=_normal(rng, *lead).exp() / tokens,
            endpoint=_normal(rng, len(shard), layers + 1, SHAPE["hidden_size"]),
        )
    return finalise(
        folder,
        spec,
        shards=len(shards),
        settings={"generate": settings_of("generate"), "traces": "equations"},
        fingerprints=fingerprints,
    )


def _kv_targets(
    folder: Path,
    spec: StoreSpec,
    records: list[Record],
    rng: np.random.Generator,
    fingerprints: dict[str, str],
) -> None:
    folder.mkdir(parents=True)
    shards = [records[first : first + SHARD] for first in range(0, len(records), SHARD)]
    for number, shard in enumerate(shards):
        lead = (len(shard), SHAPE["layers"], SHAPE["kv_heads"])
        positions = [
            [
                sorted(rng.choice(len(r.cot_ids), SLOTS, replace=False))
                for _ in range(lead[1] * lead[2])
            ]
            for r in shard
        ]
        write_targets_shard(
            folder,
            spec,
            number,
            shard,
            keys=_normal(rng, *lead, SLOTS, SHAPE["head_dim"]),
            values=_normal(rng, *lead, SLOTS, SHAPE["head_dim"]),
            slot_counts=torch.full(lead, SLOTS),
            slot_positions=torch.tensor(np.array(positions)).reshape(*lead, SLOTS),
            endpoint=_normal(rng, len(shard), SHAPE["layers"] + 1, SHAPE["hidden_size"]),
        )
    made = {"generate": settings_of("generate"), "evict": settings_of("evict")}
    finalise(
        folder,
        spec,
        shards=len(shards),
        settings={**made, "traces": "equations"},
        fingerprints=fingerprints,
    )


def _student(
    folder: Path,
    model: LlamaForCausalLM,
    encoder: TraceEncoder,
    latents: int,
    rng: np.random.Generator,
    fingerprints: dict[str, str],
) -> None:
    student = LatentReasoner.from_teacher(
        model,
        latents=latents,
        iterations=2,
        reasoning="jacobi",
        projection=True,
        per_position=True,
        answer_prompt_ids=encoder.answer_prompt_ids,
        eos_token_id=encoder.eos,
        seed=0,
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(_normal(rng, *parameter.shape, scale=0.05))
    save_model(folder, student, encoder.tokenizer)
    about = {
        "name": folder.name,
        "settings": settings_of_student(folder.name),
        "fingerprints": fingerprints,
        "traces": "equations",
    }
    write_json(folder / "student.json", about)


def settings_of_student(name: str) -> dict[str, Any]:
    """The plain settings of one student of the pipeline."""
    _, pipeline = load_pipeline(PIPELINES, NAME)
    return pipeline.students[name].model_dump(mode="json", by_alias=True)


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))


def with_settings(home: Path, section: str, **settings: Any) -> None:
    """Change settings of one section in the pipelines.yaml of `home`."""
    file = home / "pipelines.yaml"
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    document["pipelines"][NAME][section].update(settings)
    file.write_text(yaml.safe_dump(document), encoding="utf-8")

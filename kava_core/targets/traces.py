"""traces ← problems, teacher: the problems again, with chains of thought that the teacher wrote.

The folder is one of problems, and is read as such by whatever is taught: the teacher's caches and
students without latents are made from the same chains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from kava_core.artefacts import (
    atomic_path,
    clear,
    ensure_folder,
    fingerprint,
    fresh_folder,
    read_json,
    work_folder,
    write_json,
)
from kava_core.console import progress, say, warn
from kava_core.errors import KavaError
from kava_core.findings.base import Finding, read_finding
from kava_core.models.batching import by_length, pad
from kava_core.models.context import check_context
from kava_core.models.latent import LatentReasoner
from kava_core.models.loading import (
    DTYPES,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from kava_core.models.phase import rotates
from kava_core.models.placing import place_frozen
from kava_core.models.teacher_pass import check_lengths
from kava_core.parallel.shards import run_shards
from kava_core.problems.folder import ProblemFolder, open_problems
from kava_core.problems.parquet import save_problems
from kava_core.problems.prompt import check_prompt
from kava_core.problems.records import Problem, describe
from kava_core.problems.traces import PART, TraceEncoder, chat_fingerprint
from kava_core.problems.written import Chain, Outcome, read_chain
from kava_core.settings import Resources, Traces

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class _Sample(Finding):
    """A chain as a shard has it."""

    text: str
    outcome: Outcome
    steps: tuple[str, ...]


@dataclass(frozen=True)
class WriteJob:
    """The chains of problems [k·S, (k+1)·S), for every shard k, written to `folder`."""

    problems: Path
    teacher: Path
    settings: Traces
    folder: Path

    @property
    def threads(self) -> int:
        return self.settings.threads

    def is_finished(self, shard: int, problems: int) -> bool:
        """Whether a run before wrote the chains of this many problems; what is torn goes."""
        file = shard_file(self.folder, shard)
        if not file.exists():
            return False
        try:
            found = read_finding(list[list[_Sample]], file, "traces")
            if [len(samples) for samples in found] == [self.settings.samples] * problems:
                return True
        except KavaError:
            pass
        warn(f"traces: {file} is damaged, and is made again")
        clear(file)
        return False

    def open(self) -> Callable[[int], int]:
        """Load the teacher; what is returned writes a shard and says how many problems it has."""
        settings = self.settings
        source = open_problems(self.problems)
        problems = source.open_unchecked("train")
        encoder = encoder_of(source, self.teacher)
        model = place_frozen(load_model(str(self.teacher), DTYPES[settings.model_dtype]))
        writer = LatentReasoner.plain(model, answer_prompt_ids=[], eos_token_id=encoder.eos)

        def work(shard: int) -> int:
            first = shard * settings.shard_size
            chosen = problems[first : first + settings.shard_size]
            texts = write(writer, encoder, chosen, settings, shard)
            read = [
                [_as_json(text, chain) for text, chain in read_chains(problem, of, encoder, model)]
                for problem, of in zip(chosen, texts, strict=True)
            ]
            write_json(shard_file(self.folder, shard), read)
            return len(chosen)

        return work


def write(
    writer: LatentReasoner,
    encoder: TraceEncoder,
    problems: Sequence[Problem],
    settings: Traces,
    shard: int,
) -> list[list[tuple[str, bool]]]:
    """For each problem its samples: the text, and whether it came to its end.

    Chains of questions of similar length are written together. What is drawn depends on the seed,
    the number of the shard and that of the batch in it, and on no other process.
    """
    questions = encoder.encode_questions([problem.question for problem in problems])
    rows = [i for i in range(len(problems)) for _ in range(settings.samples)]
    drawing = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    options = drawing if settings.temperature else {}
    found: dict[int, tuple[str, bool]] = {}
    batches = by_length([len(questions[i]) for i in rows], settings.batch_size)
    for number, chosen in enumerate(batches):
        ids, mask = pad([questions[rows[row]] for row in chosen], "left")
        with torch.random.fork_rng():
            torch.manual_seed(int(fingerprint([settings.seed, shard, number])[:15], 16))
            written = writer.generate(
                ids.to(writer.device),
                mask.to(writer.device),
                max_new_tokens=settings.max_new_tokens,
                return_dict_in_generate=True,
                **options,
            ).tokens.tolist()
        for row, tokens in zip(chosen, written, strict=True):
            ended = encoder.eos in tokens
            kept = tokens[: tokens.index(encoder.eos) + 1] if ended else tokens
            text = encoder.tokenizer.decode(kept, skip_special_tokens=True)
            found[row] = (str(text), ended)
    size = settings.samples
    return [[found[i * size + k] for k in range(size)] for i in range(len(problems))]


def read_chains(
    problem: Problem,
    texts: Sequence[tuple[str, bool]],
    encoder: TraceEncoder,
    model: PreTrainedModel,
) -> Iterator[tuple[str, Chain]]:
    """What becomes of each of a problem's chains; of equal ones the first is kept."""
    seen: set[tuple[str, ...]] = set()
    for text, ended in texts:
        chain = read_chain(
            text, problem, encoder.traces, answer_prompt=encoder.prompt.answer, ended=ended
        )
        if chain.outcome == "kept" and chain.steps in seen:
            chain = Chain("repeated")
        elif chain.outcome == "kept":
            try:
                record = encoder.encode(replace(problem, steps=chain.steps))
                check_lengths([record], model.config.get_text_config())
                seen.add(chain.steps)
            except KavaError:
                chain = Chain("unusable")
        yield text, chain


@dataclass(frozen=True)
class Written:
    """A folder of problems that is complete but not yet in its place, and what became of chains.

    outcomes: chains by `Outcome`, all of them; without: problems that none is kept of.
    """

    folder: Path
    problems: int
    outcomes: Mapping[str, int]
    without: int

    @property
    def told(self) -> str:
        """For people."""
        lost = [f"{n} {outcome}" for outcome, n in self.outcomes.items() if n and outcome != "kept"]
        return (
            f"{self.outcomes['kept']} of {sum(self.outcomes.values())} chains are kept"
            + (f" ({', '.join(lost)})" if lost else "")
            + f"; {self.without} of {self.problems} problems are left without one"
        )


def build_traces(
    problems: Path, teacher: Path, settings: Traces, output: Path, resources: Resources
) -> Written:
    """Let the teacher write chains for the training problems, in the work of `output`.

    Repeated after a kill, it goes on with the shards that are not written. KavaError if there is
    nothing to write, for a question that leaves the teacher no place to write, and if no chain is
    kept.
    """
    source = open_problems(problems)
    examples = source.open("train")
    if not examples:
        raise KavaError(f"{problems} has no training problems. Ask `prepare` for some.")
    check_prompt(source.prompt, teacher, "teacher.json", "kava teacher")
    encoder = encoder_of(source, teacher)
    _check_place(examples, encoder, teacher, settings)
    about = {
        "settings": settings.model_dump(mode="json"),
        "fingerprints": {
            "problems": source.fingerprint("train", "validation"),
            "teacher": model_fingerprint(str(teacher)),
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            **chat_fingerprint(source.prompt, encoder.tokenizer),
        },
    }
    work = work_folder(output, "traces", about)
    shards = ensure_folder(work / "shards")
    _run(WriteJob(problems, teacher, settings, shards), len(examples), resources)
    return _finish(fresh_folder(work / "output"), shards, source, examples, settings, about)


def _run(job: WriteJob, problems: int, resources: Resources) -> None:
    size = job.settings.shard_size
    sizes = [min(size, problems - first) for first in range(0, problems, size)]
    left = [shard for shard, count in enumerate(sizes) if not job.is_finished(shard, count)]
    if len(left) < len(sizes):
        say(f"traces: {len(sizes) - len(left)} of {len(sizes)} shards are finished already")
    with progress() as display:
        done = problems - sum(sizes[shard] for shard in left)
        task = display.add_task("traces (problems)", total=problems, completed=done, note="")
        for _, count in run_shards(
            job,
            left,
            resources,
            folder=job.folder,
            examples=lambda _, count: count,
        ):
            display.update(task, advance=count, note="")


@dataclass(frozen=True)
class _Chains:
    """Each problem with its chains, as the shards have them: read anew each time, shard by shard.

    size: problems of a shard.
    """

    shards: Path
    problems: Sequence[Problem]
    size: int

    def __iter__(self) -> Iterator[tuple[Problem, list[dict[str, Any]]]]:
        for number, first in enumerate(range(0, len(self.problems), self.size)):
            chains = read_json(shard_file(self.shards, number))
            yield from zip(self.problems[first : first + self.size], chains, strict=True)


@dataclass(frozen=True)
class _Kept:
    """The problems that are taught, one for each chain that is kept."""

    chains: _Chains
    samples: int

    def __iter__(self) -> Iterator[Problem]:
        for problem, of in self.chains:
            for sample, chain in enumerate(of):
                name = f"{problem.id}~{sample}" if self.samples > 1 else problem.id
                if chain["outcome"] == "kept":
                    yield replace(problem, id=name, steps=tuple(chain["steps"]))


def _finish(
    folder: Path,
    shards: Path,
    source: ProblemFolder,
    examples: Sequence[Problem],
    settings: Traces,
    about: Mapping[str, Any],
) -> Written:
    """The folder of problems, made of all shards."""
    chains = _Chains(shards, examples, settings.shard_size)
    kept = _Kept(chains, settings.samples)
    counted: Counter[str] = Counter()
    without = 0
    for _, of in chains:
        counted.update(chain["outcome"] for chain in of)
        without += all(chain["outcome"] != "kept" for chain in of)
    outcomes: dict[str, int] = {outcome: counted[outcome] for outcome in OUTCOMES}
    written = Written(folder, len(examples), outcomes, without)
    if not counted["kept"]:
        raise KavaError(
            f"the teacher wrote no chain that can be taught: {written.told}. Expected one with the "
            "right answer, in the form that `prepare.traces` and `prepare.prompt` say. Train it "
            "longer, show it examples, or write more `samples`; or leave the section `traces` out."
        )
    save_problems(folder / "train.parquet", kept)
    save_problems(folder / "validation.parquet", source.load("validation"))
    _save_written(folder / "written.parquet", chains)
    metrics = {"problems": written.problems, "chains": outcomes, "without": without}
    write_json(folder / "metrics.json", {**metrics, "train": describe(kept)})
    tokenizer = {} if source.tokenizer is None else {"tokenizer": source.tokenizer}
    form = {"traces": source.traces, **source.prompt.kept()}
    write_json(folder / "problems.json", {**form, **tokenizer, **about})
    return written


_WRITTEN = pa.schema(
    [("id", pa.string()), ("sample", pa.int32()), ("text", pa.string()), ("outcome", pa.string())]
)
_GROUP = 65_536  # rows that are held at once


def _save_written(path: Path, chains: _Chains) -> None:
    """All that was written, as a table of _WRITTEN."""
    rows = (
        {"id": problem.id, "sample": sample, **chain}
        for problem, of in chains
        for sample, chain in enumerate(of)
    )
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, _WRITTEN, compression="zstd") as writer,
    ):
        while group := list(islice(rows, _GROUP)):
            writer.write_table(pa.Table.from_pylist(group, _WRITTEN), row_group_size=_GROUP)


def encoder_of(source: ProblemFolder, teacher: Path) -> TraceEncoder:
    """What asks the teacher, and makes traces of what it writes."""
    return TraceEncoder(load_tokenizer(str(teacher)), source.traces, prompt=source.prompt)


def shard_file(folder: Path, number: int) -> Path:
    """Where shard `number` of unfinished work lies."""
    return folder / f"{number:06d}.json"


def _as_json(text: str, chain: Chain) -> dict[str, Any]:
    return {"text": text, **asdict(chain)}


def _check_place(
    examples: Sequence[Problem], encoder: TraceEncoder, teacher: Path, settings: Traces
) -> None:
    """KavaError for the longest question, if what may be written has no place behind it."""
    config = load_config(str(teacher))
    longest, tokens = "", 0
    rest = iter(examples)
    while part := list(islice(rest, PART)):
        questions = encoder.encode_questions([problem.question for problem in part])
        for problem, ids in zip(part, questions, strict=True):
            if len(ids) > tokens:
                longest, tokens = problem.id, len(ids)
    # A model that rotates its keys can write on past its context.
    learned = not rotates(config)
    written = settings.max_new_tokens if learned else 1
    check_context(
        config,
        tokens + written,
        what=f"problem {longest}",
        including=f"{written} to write" + (" (traces.max_new_tokens)" if learned else ""),
        remedy=("Lower traces.max_new_tokens, d" if learned else "D")
        + "rop long problems in `prepare`, or use a model with a longer context.",
    )

"""problems ← a generator or files."""

from __future__ import annotations

from kava_core.artefacts import publish, work_folder
from kava_core.console import say
from kava_core.problems.folder import write_problems
from kava_core.problems.gsm8k import load_gsm8k
from kava_core.problems.splits import ProblemSplits
from kava_core.problems.synthetic import Generator
from stages.common import Run, stage


@stage
def prepare(run: Run) -> None:
    """Generate or read problems and split them.

    Writes problems/{train,validation,test}.parquet, disjoint by question, with counts, length
    histograms and what was left out in problems/metrics.json.
    """
    settings = run.settings.prepare
    output = run.path("problems")
    splits = _splits(run)
    folder = work_folder(output, settings.model_dump(mode="json")) / "output"
    folder.mkdir(exist_ok=True)
    write_problems(folder, splits, settings.traces, settings.model_dump(mode="json"))
    publish(folder, output)
    say(", ".join(f"{len(problems)} {split}" for split, problems in splits.named().items()))


def _splits(run: Run) -> ProblemSplits:
    settings = run.settings.prepare
    if settings.source == "gsm8k":
        assert settings.gsm8k is not None  # checked when the settings were read
        return load_gsm8k(
            settings.gsm8k.path,
            traces=settings.traces,
            train=settings.train,
            validation=settings.validation,
            test=settings.test,
            seed=settings.seed,
            allow_leakage=settings.gsm8k.allow_leakage,
        )
    assert settings.train is not None and settings.test is not None
    generator = Generator(traces=settings.traces, **settings.synthetic.model_dump())
    return generator.splits(settings.train, settings.validation, settings.test, seed=settings.seed)

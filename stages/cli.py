"""The `kava` command: one subcommand per stage, and the tools beside them.

`kava …` and `python -m stages …` are the same. Errors that a person can mend are one sentence and
exit status 1.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings

import click

from kava_core import __version__
from kava_core.errors import KavaError

# Stage → (module, attribute, the line shown in the list). Modules are imported when asked for, so
# that `kava --help` does not wait for torch.
COMMANDS = {
    "plan": (".plan", "plan", "Plan: bytes, memory and time of a pipeline, before it runs."),
    "check": (".check", "check", "Check: try a pipeline, or a model, before it costs days."),
    "prepare": (".prepare", "prepare", "Problems: generate or read them, and split them."),
    "teacher": (".teacher", "teacher", "Teacher: fine-tune it to write chains of thought."),
    "generate": (".generate", "generate", "Teacher KV: store its caches over the traces."),
    "evict": (".evict", "evict", "KV targets: cut the caches down to M slots."),
    "fidelity": (".fidelity", "fidelity", "Fidelity: answers from compressed caches."),
    "distill": (".distill", "distill", "Student: train one from the targets."),
    "evaluate": (".evaluate", "evaluate", "Metrics: accuracy and cost of every system."),
    "report": (".report", "report", "Report: one HTML page and a table."),
    "show": (".show", "show", "Show the results of a pipeline."),
    "ask": (".ask", "ask", "Put a question to a trained student."),
    "compare": (".compare", "compare", "Compare pipelines: one table and one page."),
    "study": (".study", "study", "Study: students × seeds × settings, and what they say."),
    "init": (".init", "init", "Make a project of your own in an empty folder."),
    "recipe": (".recipe", "recipe", "Recipe: take published settings over."),
    "sync": (".sync", "sync", "Tell DVC what pipelines.yaml says."),
    "store": (".store", "store_group", "Inspect, verify and export stores."),
}


class Kava(click.Group):
    """A group whose commands are imported on first use and listed in pipeline order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module, __package__), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Stages, in order, and tools"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])


@click.group(cls=Kava, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def kava() -> None:
    """Offline latent-reasoning distillation (KaVa, arXiv 2510.02312).

    A pipeline of stages, each of which reads the artefacts before it and writes its own under
    data/<pipeline>/. `dvc repro` runs those that are out of date; every stage can also be run by
    hand. Settings are in pipelines.yaml.
    """


def main() -> None:
    """Run the command line; KavaErrors become one line on stderr and exit status 1."""
    quiet()
    try:
        kava.main(standalone_mode=False)
    except KavaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to go on", err=True)
        sys.exit(130)


def quiet() -> None:
    """Libraries keep their remarks to themselves unless the caller asked to hear them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # names every kernel it cannot load
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")

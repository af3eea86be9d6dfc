"""The `kava` command: one subcommand per stage, and the tools beside them.

`kava …` and `python -m stages …` are the same. Errors that a person can mend are one sentence and
exit status 1; what was told to end exits with the status that a shell expects.
"""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import logging
import os
import signal
import sys
import warnings

import click

from kava_core import __version__
from kava_core.console import Format, complain, configure
from kava_core.errors import KavaError, is_out_of_memory
from kava_core.interrupt import receive_signals, settle

# Stage → (module, attribute, the line shown in the list). Modules are imported when asked for, so
# that `kava --help` does not wait for torch.
COMMANDS = {
    "plan": (".plan", "plan", "Plan: bytes, memory and time of a pipeline, before it runs."),
    "check": (".check", "check", "Check: try a pipeline, or a model, before it costs days."),
    "prepare": (".prepare", "prepare", "Problems: generate or read them, and split them."),
    "teacher": (".teacher", "teacher", "Teacher: fine-tune it to write chains of thought."),
    "traces": (".traces", "traces", "Traces: let the teacher write the chains of thought."),
    "generate": (".generate", "generate", "Teacher KV: store its caches over the traces."),
    "evict": (".evict", "evict", "KV targets: cut the caches down to M slots."),
    "fidelity": (".fidelity", "fidelity", "Fidelity: answers from compressed caches."),
    "distill": (".distill", "distill", "Student: train one from the targets."),
    "evaluate": (".evaluate", "evaluate", "Metrics: accuracy and cost of every system."),
    "report": (".report", "report", "Report: one HTML page and a table."),
    "repro": (".repro", "repro", "Repro: what `dvc repro` does, with students side by side."),
    "show": (".show", "show", "Show the results of a pipeline."),
    "ask": (".ask", "ask", "Put a question to a trained student."),
    "serve": (".serve", "serve", "Serve a student to clients of OpenAI's API."),
    "import-student": (
        ".import_student",
        "import_student",
        "Import a student that others published.",
    ),
    "convert-weights": (
        ".import_student",
        "convert_weights",
        "Make safetensors of what torch.save wrote.",
    ),
    "compare": (".compare", "compare", "Compare pipelines: one table and one page."),
    "study": (".study", "study", "Study: students × seeds × settings, and what they say."),
    "init": (".init", "init", "Make a project of your own in an empty folder."),
    "recipe": (".recipe", "recipe", "Recipe: take published settings over."),
    "sync": (".sync", "sync", "Tell DVC what pipelines.yaml says."),
    "store": (".store", "store_group", "Inspect, verify, export and import stores."),
    "publish": (".publish", "publish_group", "Publish a student or a store on the Hub."),
    "clean": (".clean", "clean", "Remove unfinished work that nobody goes on with."),
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
@click.version_option(__version__, prog_name="kava")
@click.option(
    "-q", "--quiet", "less", is_flag=True, envvar="KAVA_QUIET", help="Say warnings and errors only."
)
@click.option(
    "-v",
    "--verbose",
    "more",
    is_flag=True,
    envvar="KAVA_VERBOSE",
    help="Progress every 10 seconds, what libraries say, and the traceback behind an error.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    envvar="KAVA_LOG_FORMAT",
    help="Lines for people, or a JSON object a line, on stderr.",
)
def kava(less: bool, more: bool, log_format: Format) -> None:
    """Offline latent-reasoning distillation (KaVa, arXiv 2510.02312).

    A pipeline of stages, each of which reads the artefacts before it and writes its own under
    data/<pipeline>/. `dvc repro` runs those that are out of date; every stage can also be run by
    hand. Settings are in pipelines.yaml. The options below stand before the command; as
    KAVA_QUIET=1, KAVA_VERBOSE=1 and KAVA_LOG_FORMAT=json they reach stages that DVC runs.
    """
    if less and more:
        raise click.UsageError("--quiet and --verbose exclude each other: choose one.")
    configure(log_format, "quiet" if less else "verbose" if more else "normal")
    if not more:
        quiet()


GO_ON = "run the same command again to go on"
# What a disk refuses, whoever wrote to it: nothing that a traceback would help with.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# What it refuses one file, for reading or for writing.
FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.EIO, errno.EBUSY, errno.ESTALE, errno.ENAMETOOLONG,
               errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)  # fmt: skip
# Of torch's writer of checkpoints, which stands in that file of its own.
TORCH_WRITER = ("PytorchStreamWriter failed", "inline_container.cc")


def main() -> None:
    """Run the command line; KavaErrors become one line on stderr and their exit status, 1.

    SIGINT and SIGTERM end it in good order, with one line and the status that a shell expects.
    """
    if sys.getfilesystemencoding() != "utf-8":
        found = sys.getfilesystemencoding()
        complain(
            f"error: expected UTF-8 for names of files and text, found {found}. Set PYTHONUTF8=1, "
            "or a locale such as C.UTF-8."
        )
        sys.exit(1)
    receive_signals()
    # At the end the collector would go through all that torch and others imported: over a second.
    atexit.register(gc.freeze)
    try:
        kava.main(standalone_mode=False)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        # Libraries make errors of their own of an interrupt that reaches them.
        number = settle()
        if number or isinstance(error, click.Abort | KeyboardInterrupt):
            # click makes an error of its own of the one that has the notes.
            notes = getattr(error, "__notes__", getattr(error.__cause__, "__notes__", [GO_ON]))
            complain("; ".join(["interrupted", *notes]))
            sys.exit(128 + (number or signal.SIGINT))
        if isinstance(error, KavaError):
            complain(f"error: {error}", error)
            sys.exit(error.status)
        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        why = _refusal(error)
        if why is not None:
            complain(f"error: {why}", error)
            sys.exit(1)
        raise


def _refusal(error: BaseException) -> str | None:
    """What a machine that lacks disk or memory said through a library; None if it is not that.

    Rust writes `(os error 28)`, torch's writer of checkpoints no number at all.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for each in chain:
        text = str(each)
        number = each.errno if isinstance(each, OSError) else None
        reasons = [
            os.strerror(known)
            for known in DISK_ERRORS
            if known == number or f"os error {known})" in text or os.strerror(known) in text
        ]
        written = "PytorchStreamReader" not in text
        if not reasons and written and any(words in text for words in TORCH_WRITER):
            reasons = ["torch could not write all of it"]
        if reasons:
            name = (each.filename if isinstance(each, OSError) else None) or "a file"
            return (
                f"{name} cannot be written ({reasons[0]}). Free some space on that disk, or check "
                "that it may be written to; finished work is kept."
            )
        if isinstance(each, OSError) and number in FILE_ERRORS and each.filename:
            return (
                f"{each.filename2 or each.filename} cannot be used ({os.strerror(number)}). Check "
                "its disk, its name and who may read and write it; finished work is kept."
            )
        if number == errno.EMFILE:
            return (
                "this process may open no more files (Too many open files). Raise the limit with "
                "`ulimit -n 4096`, and run the same command again; finished work is kept."
            )
        if is_out_of_memory(each):
            return (
                "there is not enough memory. Lower batch_size or shard_size of this stage, or "
                "resources.workers, or free some, and run the same command again; finished work is "
                "kept."
            )
    return None


def quiet() -> None:
    """Libraries keep their remarks to themselves unless the caller asked to hear them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # names every kernel it cannot load
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if "transformers" in sys.modules:  # it has read the environment already
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()

"""Datasets as the Hub has them, read by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets import load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from kava_core.errors import KavaError
from kava_core.problems.rows import Row
from kava_core.problems.splits import SPLIT_NAMES

_SECONDS = 10.0


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a dataset on the Hub (None: its newest) is now.

    None where the Hub cannot be asked: a dataset in the local cache can be read all the same.
    KavaError if the Hub says that it has no such dataset, or no such revision of it.
    """
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=_SECONDS).sha
    except RevisionNotFoundError:
        raise KavaError(
            f"The dataset {name} on the Hub has no revision {revision!r}. Correct `revision` (a "
            "branch, a tag or a commit), or leave it out for the newest."
        ) from None
    except RepositoryNotFoundError:
        raise KavaError(
            f"{name!r} is no local path, and no dataset on the Hub that may be read from here. "
            "Correct `path`, or log in with `hf auth login` if it is a private one."
        ) from None
    except Exception:  # transports fail each in their own way, and none of them matters here
        return None


def read_dataset(
    name: str, config: str | None = None, revision: str | None = None
) -> dict[str, Iterator[Row]]:
    """What `datasets` reads, streamed, by split: a Hub name, or the folder of a downloaded dataset.

    revision: of a dataset on the Hub; None: its newest. KavaError if there is no such dataset, if
    it has none of the splits, and, while it is read, if a row cannot be had.
    """

    def failed(error: Exception) -> KavaError:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        expected = (
            f"Expected train.jsonl (or .json, .csv, .parquet, .txt; and test.…) or a dataset in "
            f"{name}"
            if Path(name).is_dir()
            else f"{name!r} is no local path, and it was looked for on the Hub"
            + (f" at revision {revision}" if revision else "")
        )
        remedy = (
            "Correct the path."
            if Path(name).is_dir()
            else "Correct the path, or try again with a network; where there is none, get it "
            f"elsewhere with `hf download {name} --repo-type dataset --local-dir FOLDER`, and set "
            "`path` to that folder."
        )
        return KavaError(f"{expected}: {type(error).__name__}: {reason}. {remedy}")

    def rows(split: str) -> Iterator[Row]:
        number = 0
        try:
            for fields in found[split]:
                yield Row(dict(fields), f"{name} [{split}] row {number}", number)
                number += 1
        except KavaError:
            raise
        except Exception as error:  # transports and file formats fail each in their own way
            raise KavaError(
                f"{name} [{split}] row {number} cannot be read: {type(error).__name__}: {error}. "
                "Try again, or get the dataset again."
            ) from None

    try:
        found = load_dataset(name, config, revision=revision, streaming=True)
    except Exception as error:  # the library raises what its transports raise: no common class
        raise failed(error) from None
    given = {split: [n for n in found if n in names] for split, names in SPLIT_NAMES.items()}
    splits = {split: rows(names[0]) for split, names in given.items() if names}
    if not splits:
        raise KavaError(f"{name}: expected splits such as train or test, found {sorted(found)}.")
    return splits

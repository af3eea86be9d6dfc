"""The Hugging Face Hub: folders are fetched from there and sent there, and hold no secret."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from kava_core.errors import KavaError
from kava_core.store.export import check_secrets

Kind = Literal["dataset", "model"]
_ADDRESS = re.compile(r"hf://(datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub: OWNER/NAME; revision None: its main branch."""

    name: str
    kind: Kind
    revision: str | None = None

    @classmethod
    def parse(cls, address: str, kind: Kind) -> Self:
        """Of `hf://OWNER/NAME`, a dataset's `hf://datasets/OWNER/NAME`, with `@REVISION` if one is
        meant; KavaError if it is neither."""
        found = _ADDRESS.fullmatch(address)
        wanted = "hf://datasets/OWNER/NAME" if kind == "dataset" else "hf://OWNER/NAME"
        if found is None or (found[1] is None) == (kind == "dataset"):
            raise KavaError(f"expected {wanted}, found {address!r:.100}.")
        return cls(found[2], kind, found[3])


def download(repository: Repository, folder: Path) -> Path:
    """Fetch all of a repository into `folder`; KavaError says why it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision,
                local_dir=folder,
            )
        )
    except Exception as error:  # transports fail each in their own way
        raise KavaError(
            f"the {repository.kind} {repository.name} cannot be fetched from the Hub: "
            f"{_reason(error)}. Correct the name, log in with `hf auth login` if it is private, or "
            f"fetch it where there is a network (`hf download {repository.name} --repo-type "
            f"{repository.kind} --local-dir FOLDER`) and name that folder."
        ) from None


def upload(folder: Path, repository: Repository, *, public: bool) -> str:
    """Send a folder to the Hub, as whom this machine is logged in.

    Gives the address. The repository is made if there is none, private unless `public`, and holds
    what the folder holds afterwards: of an older student no file stays among those of this one. Its
    .gitattributes are the Hub's own and stay. KavaError if something in the folder is a secret, the
    repository is public already and `public` is not asked for, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    if repository.revision is not None:
        raise KavaError(
            f"expected {repository.name} without a revision: what is published goes to the main "
            "branch. Leave it out."
        )
    check_secrets(folder)
    api = HfApi()
    try:
        made = api.create_repo(
            repository.name, repo_type=repository.kind, private=not public, exist_ok=True
        )
        if not public and not api.repo_info(repository.name, repo_type=repository.kind).private:
            raise KavaError(
                f"expected {repository.name} to be private, and it is public already: everybody "
                "could read what is sent there. Publish with --public if that is meant; else make "
                "it private in its settings on the Hub, or choose another name."
            )
        api.upload_folder(
            repo_id=repository.name,
            repo_type=repository.kind,
            folder_path=folder,
            commit_message="Publish with kava",
            delete_patterns="*",
        )
    except KavaError:
        raise
    except Exception as error:  # transports fail each in their own way
        raise KavaError(
            f"{repository.name} cannot be published: {_reason(error)}. Log in with `hf auth login` "
            "as somebody who may write there, and try again; or name a folder instead, and upload "
            "that."
        ) from None
    return str(made)


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")

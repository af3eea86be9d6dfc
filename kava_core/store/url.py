"""Where a store lies: a folder on this machine, or a URL on object storage."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from kava_core.errors import KavaError

# Scheme → what to install to read it, and how whoever asks is known to the service.
INSTALL = {
    "s3": "'kava[s3]'",
    "gs": "'kava[gs]'",
    "hf": "huggingface_hub",
    "https": "'kava[https]'",
    "http": "'kava[https]'",
}
CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, of somebody who may; "
    "for a public bucket set FSSPEC_S3_ANON=true",
    "gs": "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS; for "
    "a public bucket set FSSPEC_GS_TOKEN=anon",
    "hf": "Run `hf auth login`, or set HF_TOKEN, of somebody who may",
    "https": "Ask whoever shares it for an address that may be read",
}
CREDENTIALS["http"] = CREDENTIALS["https"]
LOCAL, HTTP = "file", ("https", "http")
FOLDED = re.compile(rf"({'|'.join((*INSTALL, LOCAL))}):/(?!/)")


@dataclass(frozen=True)
class Url:
    """The address of a folder or a file on object storage.

    Shown, it has neither name and password nor what follows a `?`: they may be secrets.
    """

    whole: str = field(repr=False)

    def __str__(self) -> str:
        parts = urlsplit(self.whole)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path}"

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __truediv__(self, name: str) -> Url:
        """The file or folder `name` in this folder; the query stays that of the folder."""
        path, mark, query = self.whole.partition("?")
        return Url(f"{path.rstrip('/')}/{name}{mark}{query}")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return urlsplit(self.whole).path.rstrip("/").rpartition("/")[2]

    @property
    def scheme(self) -> str:
        return urlsplit(self.whole).scheme

    def absolute(self) -> Url:
        """Itself: a URL means the same in every folder."""
        return self


StorePath = Path | Url


def locate(path: str | StorePath) -> StorePath:
    """The folder or the URL that `path` names; `file://` is a folder of this machine.

    A URL that went through a `Path`, which folds its slashes, is understood. KavaError for a
    scheme that is not read, and for a URL without a bucket or host.
    """
    if isinstance(path, Url):
        return path
    text = str(path)
    if isinstance(path, Path) and FOLDED.match(text):
        text = text.replace(":/", "://", 1)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return Path(path)
    scheme = scheme.lower()
    if scheme == LOCAL:
        return Path(urlsplit(text).path)
    if scheme == "gcs":
        scheme = "gs"
    url = Url(f"{scheme}://{rest.partition('#')[0]}")
    if scheme not in INSTALL:
        raise KavaError(
            f"{url} cannot be read: expected a folder or a URL that begins with s3://, gs://, "
            f"hf:// or https://, found {scheme!r:.40}. Copy the store to one of them."
        )
    user, _, host = urlsplit(url.whole).netloc.rpartition("@")
    if not host:
        raise KavaError(
            f"{url} names no store: expected {scheme}://BUCKET/FOLDER. Say in which bucket (or on "
            "which host) it lies."
        )
    if scheme not in HTTP and (user or "?" in url.whole):
        raise KavaError(
            f"{url} was given with a name, a password or a query in it: expected "
            f"{scheme}://BUCKET/FOLDER. Leave them out. {CREDENTIALS[scheme]}."
        )
    return url

"""Objects on object storage, read and written through fsspec; asked for again where it stumbles.

What a service or a library says of a failure may repeat a URL with a secret in it, so that nothing
of it is passed on but a status and the name of the error.
"""

from __future__ import annotations

import os
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kava_core.errors import KavaError
from kava_core.store.http import Body
from kava_core.store.url import CREDENTIALS, HTTP, INSTALL, Url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PART = 16 << 20  # bytes asked for, or sent, at a time: what a slow line takes in seconds
PARTS_SENT = 2  # of one file, at the same time: they are held in memory
SMALLEST_PART = 5 << 20  # that S3 takes of a file in parts
ATTEMPTS, FIRST_WAIT = 5, 0.5  # the wait doubles: 7.5 s in all
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 30.0

DENIED = (401, 403)
PASSING = (408, 425, 429)  # the only 4xx that the same request may outlive, and those named so:
PASSING_CODES = (
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "OperationAborted",
    "NoSuchUpload",  # its parts are gone: the next attempt begins with the first one
)
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
)
FULL = (
    "QuotaExceeded",
    "XMinioAdminBucketQuotaExceeded",
    "XMinioStorageFull",
    "StorageFull",
)
OUR_MISTAKES = (TypeError, AttributeError, NameError)

T = TypeVar("T")
Read = Callable[[int, int], bytes]  # start, stop

# A forked process shares its parent's event queue: were it to close what it inherited, the parent
# would not hear of its own connections any more. So it keeps all of that, unused, to its end.
_in_use: weakref.WeakValueDictionary[int, AbstractFileSystem] = weakref.WeakValueDictionary()
_inherited: list[AbstractFileSystem] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(_in_use.values()))


class Missing(KavaError):
    """There is no such object."""


@dataclass(frozen=True)
class State:
    """What a service says of an object: its bytes, and a tag that another content would change
    (None where it gives none)."""

    size: int
    tag: str | None


class Objects:
    """The objects of one service, that of `url`; may be pickled, and used in any thread."""

    def __init__(self, url: Url) -> None:
        self.url = url
        self._filesystem: tuple[int, AbstractFileSystem] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Objects, (self.url,)

    def size(self, url: Url) -> int | None:
        """Bytes of an object; None where the service does not say."""
        found = self._ask(url, lambda: self._open().info(url.whole)["size"])
        return None if found is None else int(found)

    def lengths(self) -> dict[str, int] | None:
        """Bytes of each object in the folder; None where a service lists none (http)."""
        if self.url.scheme in HTTP:
            return None
        return {name: state.size for name, state in self.states().items()}

    def states(self) -> dict[str, State]:
        """The objects in the folder, by name."""
        prefix = self.url.whole.rstrip("/")
        entries = self._ask(self.url, lambda: self._open().ls(prefix, detail=True, refresh=True))
        files = (entry for entry in entries if entry["type"] == "file")
        return {str(entry["name"]).rpartition("/")[2]: _state(entry) for entry in files}

    def read(self, url: Url, most: int) -> bytes:
        """The whole of a small object; KavaError if it has more than `most` bytes."""
        size, content = self.size(url), b""
        if size is None or size <= most:
            content = self._ask(url, partial(self._whole, url, size, most + 1))
        if (found := max(size or 0, len(content))) > most:
            more = "" if size is not None else " or more"
            raise KavaError(
                f"{url} cannot be read: expected at most {most:,} bytes, found {found:,}{more}. "
                "Make it again."
            )
        return content

    def head(self, url: Url, length: int) -> bytes:
        """The first `length` bytes of an object."""
        return b"".join(self.pieces(url, length))

    def pieces(self, url: Url, length: int) -> Iterator[bytes]:
        """An object of `length` bytes, piece by piece, each as long as it should be."""
        with self._reader(url) as read:
            for start in range(0, length, PART):
                stop = min(start + PART, length)
                yield self._ask(url, partial(_exactly, read, start, stop))

    def write(self, url: Url, content: bytes) -> None:
        """Put a small object."""
        self._ask(url, lambda: self._open().pipe_file(url.whole, content), "written")

    def upload(self, url: Url, file: str) -> State:
        """Put a file of this machine; what is there then."""
        part = max(PART, SMALLEST_PART)
        self._ask(url, lambda: self._open().put_file(file, url.whole, chunksize=part), "written")
        return _state(self._ask(url, lambda: self._open().info(url.whole)))

    def remove(self, url: Url) -> None:
        """Remove an object, if it is there."""
        try:
            self._ask(url, lambda: self._open().rm_file(url.whole), "removed")
        except Missing:
            return

    def _whole(self, url: Url, size: int | None, most: int) -> bytes:
        """An object, or its first `most` bytes where a server does not say how many it has."""
        if self.url.scheme in HTTP:
            with self._reader(url) as read:
                content = read(0, most)
        else:
            content = self._open().cat_file(url.whole)
        if len(content) < (size or 0):
            raise EOFError(f"{len(content)} of {size} bytes")
        return content

    @contextmanager
    def _reader(self, url: Url) -> Iterator[Read]:
        """What reads an object's bytes, from its beginning on."""
        if self.url.scheme not in HTTP:
            yield lambda start, stop: self._open().cat_file(url.whole, start=start, end=stop)
            return
        body = Body(self._open(), url.whole)
        try:
            yield body.read
        finally:
            body.close()

    def _ask(self, url: Url, call: Callable[[], T], what: str = "read") -> T:
        """The result of `call`, repeated where that may help."""
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except KavaError:
                raise
            except OUR_MISTAKES:
                raise
            except Exception as error:
                if (final := _explained(error, url, what)) is not None:
                    raise final from None
                if attempt == ATTEMPTS - 1:
                    raise KavaError(
                        f"{url} cannot be {what}: asked {ATTEMPTS} times, the last time "
                        f"{_said(error)}. Check the network and the service, and run this again."
                    ) from None
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25))
        raise AssertionError

    def _open(self) -> AbstractFileSystem:
        """The service, asked by this process; what was set up before a fork is of no use."""
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            self._filesystem = os.getpid(), _filesystem(self.url)
            _in_use[id(self._filesystem[1])] = self._filesystem[1]
        return self._filesystem[1]


def _exactly(read: Read, start: int, stop: int) -> bytes:
    piece = read(start, stop)
    if len(piece) < stop - start:
        raise EOFError(f"{len(piece)} of {stop - start} bytes")
    return piece


def _state(entry: Mapping[str, Any]) -> State:
    """entry: of fsspec's `ls` or `info`. A generation, where there is one, is another one each
    time an object is written."""
    found = (entry.get(key) for key in ("ETag", "etag", "generation"))
    return State(int(entry["size"]), next((str(tag) for tag in found if tag), None))


def _filesystem(url: Url) -> AbstractFileSystem:
    """fsspec's view of a service, with credentials and settings from the environment.

    Its own retries are left to `Objects._ask`.
    """
    import fsspec

    scheme = url.scheme
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        options["max_concurrency"] = PARTS_SENT
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENT_SECONDS,
            "retries": {"total_max_attempts": 1},
        }
    try:
        if scheme in (*HTTP, "gs"):
            import aiohttp

            limits = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        if scheme in HTTP:
            options["client_kwargs"] = {"timeout": limits}
            options["encoded"] = True
        if scheme == "gs":
            options["requests_timeout"] = limits
            options["consistency"] = "md5"  # of what has been sent
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError:
        raise KavaError(
            f"{url} cannot be read: what reads {scheme}:// is not installed. Run `pip install "
            f"{INSTALL[scheme]}`."
        ) from None
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem


def _explained(error: Exception, url: Url, what: str) -> KavaError | None:
    """What a person can mend; None for what the same request may outlive."""
    status, code = _status(error), _code(error)
    if code in FULL or status == 507:
        return KavaError(
            f"{url} cannot be {what}: its bucket is full ({code or status}). Free some space "
            "there, or have its quota raised; what was written is kept, and the same command goes "
            "on."
        )
    if code in PASSING_CODES:
        return None
    if isinstance(error, FileNotFoundError) or status == 404:
        if what == "written":
            return KavaError(
                f"{url} cannot be written: there is no such bucket. Check the address."
            )
        return Missing(f"{url} is not there. Check the address, or put the store there again.")
    # gcsfs has no kind of its own for what is forbidden.
    denied = isinstance(error, PermissionError) or status in DENIED or _is_forbidden(error)
    if denied or any(kind.__name__ in NO_CREDENTIALS for kind in type(error).__mro__):
        found = "access was denied" if denied else "no credentials were found"
        return KavaError(f"{url} cannot be {what}: {found}. {CREDENTIALS[url.scheme]}.")
    if status is not None and 400 <= status < 500 and status not in PASSING:
        return KavaError(
            f"{url} cannot be {what}: the service answered {_said(error)}. Check the address."
        )
    return None


def _is_forbidden(error: Exception) -> bool:
    return type(error) is OSError and str(error).startswith("Forbidden:")


def _said(error: Exception) -> str:
    """A failure in a few words that hold no secret."""
    if isinstance(error, EOFError):
        return f"only {error} came"
    status = _status(error)
    return f"with status {status}" if status is not None else f"with {type(error).__name__}"


def _status(error: BaseException) -> int | None:
    """The HTTP status of a library's error, if it has one."""
    found = getattr(error, "status", None) or getattr(error, "code", None)
    for each in (error, error.__cause__):  # s3fs makes errors of its own of botocore's
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif response is not None:
            found = getattr(response, "status_code", found)
    return found if isinstance(found, int) and 100 <= found < 600 else None


def _code(error: BaseException) -> str | None:
    """The error code of an S3 service, if it has one."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
    return None

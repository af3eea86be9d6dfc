"""Object storage on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kava_core.store import objects
from tests.store.s3 import S3


@pytest.fixture(scope="session")
def service() -> Iterator[S3]:
    with S3().running() as service:
        yield service


@pytest.fixture
def s3(service: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """A service with an empty bucket, and whoever asks may."""
    import s3fs

    service.fault = lambda _method, _key, _n: None
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{service.port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "KAVA_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(objects, "PART", 1 << 12)
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    if files.exists("bucket"):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    service.asked.clear()
    service.unchecked.clear()
    return service

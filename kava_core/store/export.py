"""A store as a dataset folder for the Hugging Face Hub.

DEST/README.md       the dataset card
DEST/index.parquet   the index, which `datasets.load_dataset(DEST)` opens
DEST/store/          the store itself, unchanged
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.errors import KavaError
from kava_core.store.index import SCHEMA
from kava_core.store.layout import INDEX_FILE, MANIFEST_FILE
from kava_core.store.manifest import KIND_NAMES, read_manifest
from kava_core.store.summary import describe_store
from kava_core.store.verify import open_store, verify

READERS = {"teacher_kv": "TeacherStore", "kv_targets": "TargetsStore"}


def export(path: Path, destination: Path) -> None:
    """Write the store in folder `path` as a Hub-style dataset folder.

    destination: a folder that does not exist yet, or an empty one; it appears once it is complete.
    KavaError if it is neither, lies in the store or cannot be written, or if the store is damaged
    (every checksum is checked: a damaged store must not be passed on).
    """
    destination = destination.absolute()
    if destination.is_relative_to(path.absolute()):
        raise KavaError(f"{destination} lies in the store itself. Choose a folder outside of it.")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise KavaError(f"{destination} exists already. Choose a new folder, or empty it.")
    problems = verify(path, full=True)
    if problems:
        raise KavaError(problems[0])
    building = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        _build(path, building)
        building.replace(destination)
    except OSError as error:
        raise KavaError(
            f"{destination} cannot be written ({error.strerror}). Free some space on that disk, or "
            "choose a folder that may be written to."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(path: Path, folder: Path) -> None:
    inside = folder / "store"
    inside.mkdir(parents=True)
    for name in [*read_manifest(path).files, MANIFEST_FILE]:
        shutil.copyfile(path / name, inside / name)
    with (
        pa.memory_map(str(inside / INDEX_FILE)) as source,
        pq.ParquetWriter(folder / "index.parquet", SCHEMA) as writer,
    ):
        reader = pa.ipc.open_file(source)
        for shard in range(reader.num_record_batches):
            writer.write_batch(reader.get_batch(shard))
    (folder / "README.md").write_text(dataset_card(inside), encoding="utf-8")


def dataset_card(path: Path) -> str:
    """The README of an exported store: YAML for the Hub, then text for people."""
    from huggingface_hub import DatasetCardData

    store = open_store(path, checksums=False)
    manifest = store.manifest
    data = DatasetCardData(
        pretty_name=f"{manifest.kind} store",
        tags=["kv-cache", "latent-reasoning", "distillation", manifest.kind],
        size_categories=[_size_category(manifest.records)],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "index.parquet"}],
            }
        ],
    )
    cells = [(name, value.replace("|", "\\|")) for name, value in describe_store(store)]
    facts = "\n".join(f"| {name} | {value} |" for name, value in cells)
    reader = READERS[manifest.kind]
    return f"""---
{data.to_yaml()}
---

# {KIND_NAMES[manifest.kind][0].upper()}{KIND_NAMES[manifest.kind][1:]}

Made for distilling a teacher's written chain of thought into latent tokens, offline. The folder
`store/` holds the tensors and a manifest with a checksum for each file; `index.parquet` has one row
per record with its token ids, lengths, source and topic.

| | |
|---|---|
{facts}

```python
import datasets
from kava_core.store import {reader}

index = datasets.load_dataset("PATH_OF_THIS_FOLDER", split="train")
store = {reader}.open("PATH_OF_THIS_FOLDER/store")
```

`kava store verify PATH_OF_THIS_FOLDER/store --full` checks every checksum.
"""


def _size_category(records: int) -> str:
    for limit, name in (
        (1_000, "n<1K"),
        (10_000, "1K<n<10K"),
        (100_000, "10K<n<100K"),
        (1_000_000, "100K<n<1M"),
        (10_000_000, "1M<n<10M"),
    ):
        if records < limit:
            return name
    return "n>10M"

"""A store as a dataset folder for the Hugging Face Hub.

DEST/README.md       the dataset card
DEST/index.parquet   the index, which `datasets.load_dataset(DEST)` opens
DEST/store/          the store itself, unchanged
DEST/teacher/        if asked for: the teacher's weights and tokenizer
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kava_core.artefacts import atomic_folder
from kava_core.errors import KavaError
from kava_core.store.index import SCHEMA
from kava_core.store.layout import INDEX_FILE, MANIFEST_FILE
from kava_core.store.manifest import KIND_NAMES, REMAKE, Manifest
from kava_core.store.place import identity
from kava_core.store.provenance import CARD, KEY, Provenance
from kava_core.store.summary import describe_store
from kava_core.store.verify import AHEAD, open_store, verify
from kava_core.store.where import place_of

READERS = {"teacher_kv": "TeacherStore", "kv_targets": "TargetsStore"}
STORE, TEACHER = "store", "teacher"
# What the Hub takes: bytes of a file, files of a folder.
LARGEST_FILE, MOST_FILES = 20 * 10**9, 10_000
# What a model's folder is made of; anything else in it stays at home.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")

HUB_CACHE = re.compile("(models|datasets)--")  # the folder of a repository in the Hub's cache

# Access tokens of the Hub and of others, private keys, signed tokens, passwords and tokens in
# addresses. In JSON the letter of an escaped line end may stand right before one.
SECRETS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,}"
    rb"|glpat-[A-Za-z0-9_-]{20,}|xox[abeprs]-[0-9][A-Za-z0-9-]{9,}|AIza[A-Za-z0-9_-]{35}"
    rb"|(?:(?<![A-Za-z0-9])|(?<=\\n))sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{32,}"
    rb"|(?<![A-Z0-9])A[KS]IA[A-Z0-9]{16}(?![A-Z0-9])"
    rb"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.|-----BEGIN [A-Z ]*PRIVATE KEY"
    rb"|(?i:[?&#;](?:[a-z]+[_-])*(?:token|api_?key|secret|password|signature|sig)="
    rb"(?=[a-z%._~+/-]*[0-9])[\w%.~+/-]{8,})"
    rb"|://[^/\s:@\"?#]*:[^/\s@\"?#]+@|(?i:https?://(?!git@)[\w.~%+=-]+@)"
)
TEXTS = {".json", ".jinja", ".txt", ".md", ".py", ".yaml"}


def export(
    path: Path,
    destination: Path,
    provenance: Provenance | None = None,
    teacher: Path | None = None,
) -> None:
    """Write the store in folder `path` as a Hub-style dataset folder.

    destination: a folder that does not exist yet, or an empty one; it appears once it is complete.
    provenance: what the card says of data and teacher; None: that nothing is known. teacher: a
    folder whose weights and tokenizer go along. KavaError if the destination is neither, lies in
    the store or cannot be written, if the Hub would not take a file or a folder, if something looks
    like a secret, or if the store is damaged (every checksum is checked: a damaged store must not
    be passed on). A folder that stands for a store on object storage is that store.
    """
    if destination.absolute().is_relative_to(path.absolute()):
        raise KavaError(f"{destination} lies in the store itself. Choose a folder outside of it.")
    check_new(destination)
    with atomic_folder(destination) as folder:
        inside = folder / STORE
        manifest = copy_store(path, inside)
        _write_index(inside, folder / "index.parquet")
        if teacher is not None:
            copy_model(teacher, folder / TEACHER)
        about = provenance or Provenance.of(manifest, None, None)
        text = dataset_card(inside, about, with_teacher=teacher is not None)
        (folder / CARD).write_text(text, encoding="utf-8")
        check_limits(folder)
        check_secrets(folder)


def check_new(destination: Path) -> None:
    """KavaError unless the folder is not there yet, or empty."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise KavaError(f"{destination} exists already. Choose a new folder, or empty it.")


def copy_store(path: Path, destination: Path, kind: str | None = None) -> Manifest:
    """Copy a store, wherever it lies, into a new folder; its manifest.

    KavaError for a store of another kind and for one that is damaged: every checksum is checked, in
    the copy. Nothing is copied through a link out of its folder.
    """
    place = place_of(path)
    manifest = place.load_manifest(kind)
    destination.mkdir(parents=True)
    names = list(manifest.files)
    for number, name in enumerate(names):
        place.fetch_ahead(manifest, [name], names[number + 1 : number + AHEAD])
        copy = partial(_copied, destination / name)
        place.opened(manifest, name, copy, identity, checksums=False)
    (destination / MANIFEST_FILE).write_bytes(place.manifest_content(manifest))
    if problems := verify(destination, full=True):
        raise KavaError(problems[0].replace(str(destination), str(place.path)))
    return manifest


def _copied(destination: Path, source: Path) -> None:
    try:
        shutil.copyfile(source, destination)
    except FileNotFoundError:  # a cache may have made room of it
        raise KavaError(f"{source} is missing, but the manifest lists it. {REMAKE}") from None


def copy_model(source: Path, destination: Path) -> None:
    """The files that a model's folder is made of, adapters included; KavaErrors of `copy_file`."""
    for folder in (source, source / "adapter"):
        found = sorted(file for kind in MODEL_FILES for file in folder.glob(kind))
        for file in found:
            copy_file(file.relative_to(source), source, destination)


def copy_file(name: Path, source: Path, destination: Path) -> None:
    """The file of that name in the folder `source`, to the same place in `destination`.

    KavaError for one that is no file, and for a link out of the folder: what it leads to may be
    nobody's to pass on. Links of the Hub's cache, into its own folder of contents, are followed.
    """
    inside, file = source.resolve(), source / name
    hub = next((p.parent for p in inside.parents if p.name == "snapshots"), None)
    contents = hub / "blobs" if hub and HUB_CACHE.match(hub.name) else inside
    real = file.resolve()
    if not real.is_relative_to(inside) and real.parent != contents:
        raise KavaError(
            f"{file} is a symbolic link out of its folder. Put a copy or a hard link in its place "
            "(with DVC: set cache.type to reflink,hardlink,copy and run `dvc checkout --relink`)."
        )
    if not real.is_file():
        raise KavaError(
            f"{file} cannot be read: expected a file, found a folder, a pipe or a device, or "
            "nothing. Move it away, or put the file in its place."
        )
    place = destination / name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)


def check_limits(folder: Path) -> None:
    """KavaError names a file that is larger than the Hub takes, or a folder that holds more."""
    for root, _, names in os.walk(folder):
        place = Path(root).relative_to(folder)
        if len(names) >= MOST_FILES:
            raise KavaError(
                f"{place}/ would have {len(names):,} files, and a folder on the Hub may have fewer "
                f"than {MOST_FILES:,}. Make the store again with a larger `generate.shard_size`."
            )
        for name in names:
            if (size := (Path(root) / name).stat().st_size) > LARGEST_FILE:
                raise KavaError(
                    f"{place / name} has {size / 1e9:.1f} GB, and a file on the Hub may have "
                    f"{LARGEST_FILE / 1e9:.0f}. Make the store again with a smaller "
                    "`generate.shard_size`, or save the model in several files."
                )


def check_secrets(folder: Path) -> None:
    """KavaError names a text file of the folder with something in it that looks like a secret."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXTS and (found := SECRETS.search(file.read_bytes())):
            raise KavaError(
                f"{file.relative_to(folder)} holds what looks like a secret "
                f"({found[0][:4].decode(errors='replace')}…). Take it out where it came from, and "
                "make that secret invalid."
            )


def _write_index(store: Path, path: Path) -> None:
    with (
        pa.memory_map(str(store / INDEX_FILE)) as source,
        pq.ParquetWriter(path, SCHEMA) as writer,
    ):
        reader = pa.ipc.open_file(source)
        for shard in range(reader.num_record_batches):
            writer.write_batch(reader.get_batch(shard))


def dataset_card(path: Path, provenance: Provenance, *, with_teacher: bool) -> str:
    """The README of an exported store: YAML for the Hub, then text for people."""
    from huggingface_hub import DatasetCardData

    store = open_store(path, checksums=False)
    manifest = store.manifest
    licence = provenance.data.licence if provenance.data else None
    data = DatasetCardData(
        license=licence,
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
    setattr(data, KEY, provenance.model_dump(mode="json"))
    beside = ""
    if with_teacher:
        beside = " `teacher/` holds the teacher's weights and tokenizer."
    reader = READERS[manifest.kind]
    return f"""---
{data.to_yaml()}
---

# {KIND_NAMES[manifest.kind][0].upper()}{KIND_NAMES[manifest.kind][1:]}

Made for distilling a teacher's written chain of thought into latent tokens, offline. The folder
`store/` holds the tensors and a manifest with a checksum for each file; `index.parquet` has one row
per record with its token ids, lengths, source and topic.{beside}

{table([*provenance.facts(), *describe_store(store)])}

```python
import datasets
from kava_core.store import {reader}

index = datasets.load_dataset("PATH_OF_THIS_FOLDER", split="train")
store = {reader}.open("PATH_OF_THIS_FOLDER/store")
```

`kava store verify PATH_OF_THIS_FOLDER/store --full` checks every checksum, and `kava store import
PATH_OF_THIS_FOLDER` takes it into a project, where students are trained from it.
"""


def table(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values as a table without a heading, in Markdown."""
    cells = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in facts]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


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

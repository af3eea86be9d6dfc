"""A damaged, foreign or hostile store gives one sentence that names the file and what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from kava_core.errors import KavaError
from kava_core.store import (
    Expectation,
    Ranges,
    TargetsStore,
    TeacherStore,
    finalise,
    write_targets_shard,
    write_teacher_shard,
)
from kava_core.store.checksum import file_checksum
from kava_core.store.manifest import manifest_digest
from kava_core.store.verify import open_store, verify
from stages.store import store_group
from tests.store.make import (
    FLOAT32,
    GEOMETRY,
    TARGETS,
    TARGETS_GEOMETRY,
    TEACHER,
    make_spec,
    make_targets_store,
    make_teacher_store,
    targets_data,
    teacher_data,
)

SHARD = "shard-00001.safetensors"


@pytest.fixture(params=["teacher_kv", "kv_targets"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    (make_teacher_store if request.param == "teacher_kv" else make_targets_store)(folder)
    return folder


def use(folder: Path) -> None:
    """Read everything that there is in a store, as a stage would."""
    store = open_store(folder)
    if isinstance(store, TeacherStore):
        for k in range(store.shards):
            store.shard(k).keys.dequantise()
    else:
        store.batch(range(len(store))).dequantise()


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and set its digest right again, as a hostile or careless hand would."""
    file = folder / "manifest.json"
    plain = json.loads(file.read_text())
    change(plain)
    plain["digest"] = manifest_digest(plain)
    file.write_text(json.dumps(plain))


def register(folder: Path, name: str) -> None:
    """Make the manifest agree with what the file holds now."""
    file = folder / name
    entry = {"blake3": file_checksum(file), "bytes": file.stat().st_size}
    edit_manifest(folder, lambda plain: plain["files"].update({name: entry}))


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 8)


def flip(folder: Path, name: str = SHARD) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)


def remove(folder: Path) -> None:
    (folder / SHARD).unlink()


def link_out(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    shutil.move(folder / SHARD, outside)
    (folder / SHARD).symlink_to(outside)


def wrong_dtype(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors["keys"] = tensors["keys"].half()
    save_file(tensors, folder / SHARD)
    register(folder, SHARD)


def not_safetensors(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"\xff" * 100)
    register(folder, SHARD)


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a shard, checksum and all."""
    content = (folder / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    register(folder, SHARD)


def deep_header(folder: Path) -> None:
    text = b"[" * 200_000
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text)
    register(folder, SHARD)


def link_to_itself(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(SHARD)


def manifest_is_a_folder(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def manifest_text(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "manifest.json").write_text(text)


def shorter_index(folder: Path) -> None:
    """The index has a row less than the shard."""
    with pa.OSFile(str(folder / "index.arrow")) as source:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(0), reader.get_batch(1).slice(0, 2)]
    write_batches(folder, batches)


def longer_trace(folder: Path) -> None:
    """The index gives a trace one token less than the shard has."""
    with pa.OSFile(str(folder / "index.arrow")) as source:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(0), reader.get_batch(1)]
    columns = batches[1].to_pydict()
    longest = int(np.argmax(columns["n_cot"]))
    columns["n_cot"][longest] = 1
    columns["cot_ids"][longest] = [5]
    write_batches(folder, [batches[0], pa.RecordBatch.from_pydict(columns, batches[1].schema)])


def edit_index(folder: Path, change: Callable[[dict[str, pa.Array]], Any]) -> None:
    """Change columns of the second shard's rows in the index, checksum and all."""
    with pa.OSFile(str(folder / "index.arrow")) as source:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(0), reader.get_batch(1)]
    columns = {name: batches[1].column(name) for name in batches[1].schema.names}
    change(columns)
    changed = pa.RecordBatch.from_arrays(list(columns.values()), schema=batches[1].schema)
    write_batches(folder, [batches[0], changed])


def not_unicode(columns: dict[str, pa.Array]) -> None:
    ids = columns["id"]
    size = len(ids.buffers()[2])
    buffers = [None, ids.buffers()[1], pa.py_buffer(b"\xff" * size)]
    columns["id"] = pa.Array.from_buffers(pa.string(), len(ids), buffers)


def out_of_bounds(folder: Path) -> None:
    """The index says that the sources of the second shard's rows lie far behind its end."""
    content = bytearray((folder / "index.arrow").read_bytes())
    offsets = np.arange(0, 28, len("made up"), dtype=np.int32)
    place = content.rfind(offsets.tobytes())
    content[place : place + offsets.nbytes] = (offsets << 20).tobytes()
    (folder / "index.arrow").write_bytes(content)
    register(folder, "index.arrow")


def write_batches(folder: Path, batches: list[pa.RecordBatch]) -> None:
    with (
        pa.OSFile(str(folder / "index.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, batches[0].schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
    register(folder, "index.arrow")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (truncate, rf"{SHARD} has \d+ bytes, the manifest says"),
    "flipped byte": (flip, rf"{SHARD} does not match its checksum"),
    "flipped byte in the index": (lambda f: flip(f, "index.arrow"), r"index\.arrow does not match"),
    "missing shard": (remove, rf"{SHARD} is missing"),
    "link out of the folder": (link_out, rf"{SHARD} is a symbolic link out of"),
    "wrong dtype": (wrong_dtype, rf"{SHARD}: tensor (keys|importance) is float16"),
    "not safetensors": (not_safetensors, rf"{SHARD} is not a safetensors file"),
    "index shorter than shard": (shorter_index, r"index\.arrow has 2 rows for shard 1.*says 3"),
    "index and shard disagree": (longer_trace, rf"{SHARD}(: tensor| and the index disagree)"),
    "manifest changed": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"budget"', '"Budget"')
        ),
        r"manifest\.json does not match its own digest",
    ),
    "manifest is no JSON": (
        lambda f: (f / "manifest.json").write_text("{"),
        r"manifest\.json is not valid JSON",
    ),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing"),
    "zero records": (
        lambda f: edit_manifest(f, lambda m: m.update(records=0, shards=[])),
        r"manifest\.json says that the store has zero records",
    ),
    "a path out of the folder": (
        lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": m["files"][SHARD]})),
        r"manifest\.json names the file '\.\./x'",
    ),
    "an absolute path": (
        lambda f: edit_manifest(f, lambda m: m["files"].update({"/etc/x": m["files"][SHARD]})),
        r"manifest\.json names the file '/etc/x'",
    ),
    "a newer format": (
        lambda f: edit_manifest(f, lambda m: m.update(format_version=4, unheard="of")),
        r"manifest\.json is of format version 4, this program reads version 3",
    ),
    "the format before": (
        lambda f: edit_manifest(
            f,
            lambda m: m.update(
                format_version=1,
                files={n: {"sha256": i["blake3"], "bytes": 1} for n, i in m["files"].items()},
            ),
        ),
        r"format version 1, this program reads version 3",
    ),
    "no version": (
        lambda f: edit_manifest(f, lambda m: m.update(format_version="2")),
        r"manifest\.json has no valid format_version \(found '2'\)",
    ),
    "another checksum": (
        lambda f: edit_manifest(f, lambda m: m["files"].update({SHARD: {"sha256": "0" * 64}})),
        r"manifest\.json: files\.shard-00001\.safetensors\.blake3: ",
    ),
    "an unknown key": (
        lambda f: edit_manifest(f, lambda m: m.update(unheard="of")),
        r"manifest\.json: unheard: ",
    ),
    "a wrong type": (
        lambda f: edit_manifest(f, lambda m: m["geometry"].update(kv_heads="two")),
        r"manifest\.json: geometry\.kv_heads: ",
    ),
    "a shard that links to itself": (
        link_to_itself,
        rf"{SHARD} cannot be read",
    ),
    "a folder for a manifest": (manifest_is_a_folder, r"manifest\.json cannot be read"),
    "a manifest too deep": (manifest_text("[" * 200_000), r"manifest\.json cannot be read"),
    "a number too long": (manifest_text(f"[{'1' * 5000}]"), r"manifest\.json cannot be read"),
    "half a character": (
        manifest_text('{"format_version": 3, "a": "\\ud800"}'),
        r"manifest\.json cannot be read",
    ),
    "a list for a manifest": (manifest_text("[]"), r"manifest\.json must hold a JSON object"),
    "a header too deep": (deep_header, rf"{SHARD} is not a safetensors file"),
    "a place that is no pair": (
        lambda f: header(f, lambda h: h["keys"].update(data_offsets=[0, 1, 2])),
        rf"{SHARD} is not a safetensors file",
    ),
    "a place that is no integer": (
        lambda f: header(f, lambda h: h["keys"].update(data_offsets=[0.0, "x"])),
        rf"{SHARD} is not a safetensors file .*place of keys is not of integers",
    ),
    "a place past the end": (
        lambda f: header(f, lambda h: h["keys"].update(data_offsets=[0, 1 << 62])),
        rf"{SHARD}: tensor keys has a wrong place or length",
    ),
    "a tensor too many": (
        lambda f: header(f, lambda h: h.update(more=h["keys"])),
        rf"{SHARD}: tensor more is float32 .*, the manifest and the index say none",
    ),
    "empty cells in the index": (
        lambda f: edit_index(f, lambda c: c.update(id=pa.array(["a", None, "b"]))),
        r"index\.arrow has empty cells in shard 1",
    ),
    "text that is none": (lambda f: edit_index(f, not_unicode), r"index\.arrow cannot be read"),
    "text out of bounds": (out_of_bounds, r"index\.arrow cannot be read"),
    "a file left out": (
        lambda f: edit_manifest(f, lambda m: m["files"].pop(SHARD)),
        rf"manifest\.json: files lists wrongly or leaves out {SHARD}",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_never_gives_a_wrong_batch(store: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    use(store)
    damage(store)
    with pytest.raises(KavaError, match=message):
        use(store)
    result = CliRunner().invoke(store_group, ["verify", str(store), "--full"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert len(result.stderr.splitlines()) == len(verify(store, full=True)) >= 1


def test_all_damage_is_found_and_told_once(store: Path) -> None:
    truncate(store)
    flip(store, "shard-00000.safetensors")
    flip(store, "index.arrow")
    (store / "notes.txt").touch()
    problems = verify(store, full=True)
    for name in ("notes.txt", "index.arrow", "shard-00000.safetensors", SHARD):
        assert sum(f"{store / name} " in problem for problem in problems) == 1
    assert len(problems) == 4


def test_a_repeated_id_is_found(store: Path) -> None:
    edit_index(store, lambda c: c.update(id=pa.array(["0-0", "new", "newer"])))
    assert [p.partition(" has")[2] for p in verify(store)] == [
        " two records '0-0'. Fetch the store again, or run the stage that makes it."
    ]


def test_slots_that_are_no_places_in_the_trace_are_refused(tmp_path: Path) -> None:
    for number, spoil in enumerate(
        (
            lambda counts, _: counts[1].fill_(0),
            lambda _, positions: positions[1].fill_(99),
            lambda _, positions: positions[1, 0, 0].copy_(positions[1, 0, 0].flip(0)),
        )
    ):
        folder = tmp_path / str(number)
        make_targets_store(folder)
        tensors = load_file(folder / SHARD)
        spoil(tensors["slot_counts"], tensors["slot_positions"])
        save_file(tensors, folder / SHARD)
        register(folder, SHARD)
        with pytest.raises(KavaError, match=rf"{SHARD} .*disagree: the slots of record 1 of"):
            use(folder)


def test_damaged_calibration_is_named(tmp_path: Path) -> None:
    ranges = Ranges(*[torch.tensor(x).expand(3).clone() for x in (-9.0, 9.0, -9.0, 9.0)])
    codec = FLOAT32.from_bits(keys=8, values=8, granularity="tensor")
    make_targets_store(tmp_path / "store", codec=codec, ranges=ranges)
    file = tmp_path / "store" / "calibration.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert verify(tmp_path / "store") == []
    (problem,) = verify(tmp_path / "store", full=True)[:1]
    assert "calibration.safetensors does not match its checksum" in problem
    with pytest.raises(KavaError, match=r"calibration\.safetensors does not match its checksum"):
        use(tmp_path / "store")


def test_an_extra_file_is_named(store: Path) -> None:
    (store / "shard-00002.safetensors").write_bytes(b"")
    problems = verify(store)
    assert len(problems) == 1
    assert "shard-00002.safetensors does not belong to the store" in problems[0]


def test_a_geometry_too_large_for_the_files_takes_no_memory(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store")
    edit_manifest(tmp_path / "store", lambda m: m["geometry"].update(head_dim=10**15))
    with pytest.raises(KavaError, match=r"shard-00000\.safetensors: tensor keys is"):
        use(tmp_path / "store")
    with pytest.raises(KavaError, match=r"shard-00000\.safetensors: tensor keys is"):
        TargetsStore.open(tmp_path / "store").buffer(2)


def test_damage_after_opening_is_found(tmp_path: Path) -> None:
    make_targets_store(tmp_path / "store")
    targets = TargetsStore.open(tmp_path / "store")
    targets.batch([0])
    truncate(tmp_path / "store")
    with pytest.raises(KavaError, match=f"{SHARD} has"):
        targets.batch([6])


def test_quick_verification_leaves_contents_alone(store: Path) -> None:
    assert verify(store) == verify(store, full=True) == []
    flip(store)
    assert verify(store) == []
    assert len(verify(store, full=True)) == 1


def test_another_kind_is_refused(tmp_path: Path) -> None:
    make_teacher_store(tmp_path / "store")
    with pytest.raises(KavaError, match=r"\(teacher_kv\), but .*\(kv_targets\) is needed"):
        TargetsStore.open(tmp_path / "store")
    with pytest.raises(KavaError, match="is not a folder"):
        TargetsStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (Expectation("other", "kkkkkkkk"), r"teacher tttttttt, this run has other"),
        (Expectation("tttttttt", "other"), r"tokenizer kkkkkkkk, this run has other"),
    ],
)
def test_a_store_that_is_not_what_the_run_expects(
    tmp_path: Path, expected: Expectation, message: str
) -> None:
    make_targets_store(tmp_path / "store")
    with pytest.raises(KavaError, match=message):
        TargetsStore.open(tmp_path / "store", expected)
    TargetsStore.open(tmp_path / "store", Expectation(teacher="tttttttt", tokenizer="kkkkkkkk"))


def test_a_store_that_does_not_say_its_teacher_is_not_what_the_run_expects(tmp_path: Path) -> None:
    write_teacher_shard(tmp_path, TEACHER, 0, **vars(teacher_data(1)))
    finalise(tmp_path, TEACHER, shards=1, settings={}, fingerprints={})
    with pytest.raises(KavaError, match=r"teacher \(not recorded\), this run has tttttttt"):
        TeacherStore.open(tmp_path, Expectation(teacher="tttttttt", tokenizer="kkkkkkkk"))


@pytest.mark.parametrize("name", ["keys", "values", "importance", "endpoint"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_record_that_is_not_finite_is_named(
    tmp_path: Path, name: str, bad: float, bits: int
) -> None:
    data = teacher_data(3)
    tokens = [len(record.cot_ids) for record in data.records]
    place = 1 if name == "endpoint" else tokens[0] + tokens[1] - 1
    getattr(data, name)[place].view(-1)[-1] = bad
    codec = FLOAT32.from_bits(keys=bits, values=bits, endpoint=bits)
    with pytest.raises(KavaError, match=rf"record '0-1' has a NaN or an infinity in its {name}"):
        write_teacher_shard(tmp_path, make_spec(GEOMETRY, codec), 0, **vars(data))
    assert list(tmp_path.iterdir()) == []


def test_a_number_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    data = targets_data(2)
    data.endpoint[1, 0, 0] = 1e6
    codec = FLOAT32.from_bits(endpoint=16, half="float16")
    with pytest.raises(KavaError, match=r"record '0-1' has .* in its endpoint \(float16\)"):
        write_targets_shard(tmp_path, make_spec(TARGETS_GEOMETRY, codec), 0, **vars(data))


def test_wrong_shapes_and_dtypes_are_refused(tmp_path: Path) -> None:
    for name, wrong in (
        ("keys", lambda x: x[:, :2]),
        ("values", lambda x: x.int()),
        ("slot_counts", lambda x: x.float()),
        ("slot_positions", lambda x: x[..., :3]),
        ("endpoint", lambda x: x[:1]),
    ):
        fields = vars(targets_data(2))
        fields[name] = wrong(fields[name])
        with pytest.raises(KavaError, match=rf"shard 0: {name} must be"):
            write_targets_shard(tmp_path, TARGETS, 0, **fields)


def test_a_spec_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spec without slots, found 4"):
        write_teacher_shard(tmp_path, TARGETS, 0, **vars(teacher_data(2)))
    with pytest.raises(ValueError, match="spec with slots, found none"):
        write_targets_shard(tmp_path, TEACHER, 0, **vars(targets_data(2)))


def test_impossible_slots_are_named(tmp_path: Path) -> None:
    for spoil in (
        lambda counts, _: counts[1].fill_(5),
        lambda counts, _: counts[1].zero_(),
        lambda _, positions: positions[1].fill_(2),
        lambda _, positions: positions[1, 0, 0].fill_(-1),
        lambda _, positions: positions[1, :, :, 0].fill_(99),
    ):
        data = targets_data(2)
        spoil(data.slot_counts, data.slot_positions)
        with pytest.raises(KavaError, match=r"record '0-1' .* has impossible slots"):
            write_targets_shard(tmp_path, TARGETS, 0, **vars(data))


def test_an_empty_trace_is_named(tmp_path: Path) -> None:
    fields = vars(teacher_data(2))
    fields["records"][1].cot_ids.clear()
    length = len(fields["records"][0].cot_ids)
    for name in ("keys", "values", "importance"):
        fields[name] = fields[name][:length]
    with pytest.raises(KavaError, match="record '0-1' has no tokens in cot_ids"):
        write_teacher_shard(tmp_path, TEACHER, 0, **fields)

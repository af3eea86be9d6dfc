"""The store: a folder of safetensors shards, an Arrow index and a manifest that describes them.

Two kinds: `teacher_kv`, the whole cache of every trace, and `kv_targets`, the slots kept of it.
`docs/store-format.md` is the specification.
"""

from kava_core.store.codec import EncodedTensor, Ranges, calibrate, fake_quantise
from kava_core.store.layout import Codec, Geometry
from kava_core.store.manifest import Expectation, Manifest, load_manifest
from kava_core.store.read import (
    Buffer,
    TargetsBatch,
    TargetsStore,
    TargetTensors,
    TeacherShard,
    TeacherStore,
)
from kava_core.store.sampler import ShardShuffleSampler
from kava_core.store.spec import StoreSpec
from kava_core.store.write import (
    finalise,
    finished_shards,
    merged_manifest,
    noted_shards,
    write_targets_shard,
    write_teacher_shard,
)

__all__ = [
    "Buffer",
    "Codec",
    "EncodedTensor",
    "Expectation",
    "Geometry",
    "Manifest",
    "Ranges",
    "ShardShuffleSampler",
    "StoreSpec",
    "TargetTensors",
    "TargetsBatch",
    "TargetsStore",
    "TeacherShard",
    "TeacherStore",
    "calibrate",
    "fake_quantise",
    "finalise",
    "finished_shards",
    "load_manifest",
    "merged_manifest",
    "noted_shards",
    "write_targets_shard",
    "write_teacher_shard",
]

"""The store: a folder of safetensors shards, an Arrow index and a manifest that describes them.

Two kinds: `teacher_kv`, the whole cache of every trace, and `kv_targets`, the slots kept of it.
`docs/store-format.md` is the specification.
"""

from kava_core.store.batch import Buffer, TargetsBatch, TargetTensors, TeacherShard
from kava_core.store.cache import Cache
from kava_core.store.codec import EncodedTensor, Ranges, calibrate, fake_quantise
from kava_core.store.finalise import (
    finalise,
    finished_shards,
    merged_manifest,
    noted_shards,
)
from kava_core.store.layout import Codec, Geometry
from kava_core.store.manifest import Expectation, Manifest
from kava_core.store.push import push
from kava_core.store.read import TargetsStore, TeacherStore
from kava_core.store.sampler import ShardShuffleSampler
from kava_core.store.spec import StoreSpec
from kava_core.store.url import StorePath, Url, locate
from kava_core.store.where import link, load_manifest
from kava_core.store.work import Work
from kava_core.store.write import write_targets_shard, write_teacher_shard

__all__ = [
    "Buffer",
    "Cache",
    "Codec",
    "EncodedTensor",
    "Expectation",
    "Geometry",
    "Manifest",
    "Ranges",
    "ShardShuffleSampler",
    "StorePath",
    "StoreSpec",
    "TargetTensors",
    "TargetsBatch",
    "TargetsStore",
    "TeacherShard",
    "TeacherStore",
    "Url",
    "Work",
    "calibrate",
    "fake_quantise",
    "finalise",
    "finished_shards",
    "link",
    "load_manifest",
    "locate",
    "merged_manifest",
    "noted_shards",
    "push",
    "write_targets_shard",
    "write_teacher_shard",
]

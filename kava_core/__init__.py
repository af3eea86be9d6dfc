"""Offline latent-reasoning distillation: everything that has a tensor or a format in it.

The names below are what most uses of a store or a student need. They are imported when they are
first asked for, so that `import kava_core` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kava_core.lazy import lazily

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "LatentReasoner",
    "TargetsStore",
    "TeacherStore",
    "__version__",
    "evict",
]

if TYPE_CHECKING:
    from kava_core.eviction import POLICIES, evict
    from kava_core.models.latent import LatentReasoner
    from kava_core.store import TargetsStore, TeacherStore
else:
    __getattr__ = lazily(
        __name__,
        {
            "POLICIES": "kava_core.eviction",
            "LatentReasoner": "kava_core.models.latent",
            "TargetsStore": "kava_core.store",
            "TeacherStore": "kava_core.store",
            "evict": "kava_core.eviction",
        },
    )

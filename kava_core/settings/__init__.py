"""The settings of every stage, read from `pipelines.yaml` and checked before any work starts.

A pipeline is one mapping per stage. Each stage is tracked by DVC through exactly its own section;
`resources` and `cadence` change no result and are tracked by none. Every value that is
unknown, of the wrong type or impossible is an error that names its key path.
"""

from kava_core.settings.evaluate import Evaluate, Report
from kava_core.settings.evict import EveryLayer, Evict, LastLayers
from kava_core.settings.fidelity import Fidelity, FidelityBits
from kava_core.settings.generate import Generate
from kava_core.settings.imported import Imported, Imports, load_any_pipeline
from kava_core.settings.pipeline import Cadence, Pipeline, Resources, load_pipeline, read_document
from kava_core.settings.prepare import Prepare, TestSet
from kava_core.settings.student import Student
from kava_core.settings.study import Study, load_study
from kava_core.settings.teacher import Scratch, Teacher
from kava_core.settings.traces import Traces
from kava_core.settings.training import ExactMatch, HeldOut, LoRA, Training

__all__ = [
    "Cadence",
    "Evaluate",
    "EveryLayer",
    "Evict",
    "ExactMatch",
    "Fidelity",
    "FidelityBits",
    "Generate",
    "HeldOut",
    "Imported",
    "Imports",
    "LastLayers",
    "LoRA",
    "Pipeline",
    "Prepare",
    "Report",
    "Resources",
    "Scratch",
    "Student",
    "Study",
    "Teacher",
    "TestSet",
    "Traces",
    "Training",
    "load_any_pipeline",
    "load_pipeline",
    "load_study",
    "read_document",
]

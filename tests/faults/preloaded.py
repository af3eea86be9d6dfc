"""What the stages import, so that a process of `tests.faults.stage` starts at once."""

from __future__ import annotations

import gc

import transformers.models.llama.modeling_llama  # noqa: F401

import kava_core.distill.inputs
import kava_core.distill.student_job
import kava_core.distill.teacher_job
import kava_core.evaluation.comparison
import kava_core.evaluation.results
import kava_core.evaluation.validation
import kava_core.fidelity.results
import kava_core.problems.prepare
import kava_core.reporting.costs
import kava_core.reporting.page
import kava_core.reporting.terminal
import kava_core.targets.evict
import kava_core.targets.generate  # noqa: F401
import tests.faults.stage
import tests.faults.weigh  # noqa: F401

# A forked process that collects garbage would go through the 0.8 million objects imported here and
# copy their pages: half a second that belongs to no stage.
gc.freeze()

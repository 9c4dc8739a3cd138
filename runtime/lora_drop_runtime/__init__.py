"""The runtime of LoRA-Drop bundles: numpy and an engine, no torch, no transformers.

Reading order: plan/ (drop list, surrogate, schedule, policy), bundle/graph_io.py (inputs and outputs of the step
graphs), bundle/ (files), decoding/session.py and request.py (requests, caches, steps),
decoding/batch.py, row.py and slots.py (rows that join and leave), engines/engine.py (what a
session needs of one), engines/ort/, engines/trt/, decoding/sampling.py, text.py.
"""

from lora_drop_runtime.decoding.batch import Batch
from lora_drop_runtime.decoding.constraint import Constraint
from lora_drop_runtime.decoding.row import Event
from lora_drop_runtime.decoding.sampling import SamplingOptions
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import (
    BundleError,
    InputError,
    LoraDropError,
    ModelError,
    NoDeviceError,
    PlanError,
    VerificationError,
)
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import (
    EntropySchedule,
    LastLogits,
    MarginSchedule,
    PeriodicSchedule,
    Schedule,
    StepKind,
)

__all__ = [
    "Batch",
    "BundleError",
    "Constraint",
    "DropPlan",
    "EntropySchedule",
    "Event",
    "InputError",
    "LastLogits",
    "LoraDropError",
    "MarginSchedule",
    "ModelError",
    "NoDeviceError",
    "PeriodicSchedule",
    "PlanError",
    "SamplingOptions",
    "Schedule",
    "Session",
    "StepKind",
    "VerificationError",
]

"""The runtime of LoRA-Drop bundles: numpy and an engine, no torch, no transformers.

Reading order: plan.py (drop list, schedule), graph_io.py (inputs and outputs of the step graphs), bundle.py (files),
session.py (schedule, caches, steps), engine.py (what a session needs of one), engine_ort.py (ONNX Runtime),
engine_trt.py (TensorRT), sampling.py, text.py.
"""

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
from lora_drop_runtime.plan.schedule import PeriodicSchedule, Schedule, StepKind

__all__ = [
    "BundleError",
    "DropPlan",
    "InputError",
    "LoraDropError",
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

"""The runtime of LoRA-Drop bundles: numpy and an engine, no torch, no transformers.

Reading order: plan.py (drop list, schedule), graph_io.py (inputs and outputs of the step graphs), bundle.py (files),
session.py (schedule, caches, steps), engine.py (what a session needs of one), engine_ort.py (ONNX Runtime),
engine_trt.py (TensorRT), sampling.py, text.py.
"""

from .errors import BundleError, InputError, LoraDropError, ModelError, NoDeviceError, PlanError, VerificationError
from .plan import DropPlan, PeriodicSchedule, Schedule, StepKind
from .sampling import SamplingOptions
from .session import Session

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

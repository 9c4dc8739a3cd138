"""TensorRT or TensorRT-RTX as an installed library, for programs that import it: fake_trt.py and fake_cuda.py.

What it stands for: the exporter finds a library, lowers and «builds» (an engine is then the graph that the builder
gets), and the runtime opens and runs that. What it cannot show: a parser, a builder, and all that fake_trt.py cannot.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from lora_drop_runtime.engines.trt.library import MODULES
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.targets.trt import build
from lora_drop_export.targets.trt.profiles import Profile
from tests.support.fake_gpu import BINDINGS, FakeGpu
from tests.support.fake_trt import SCRATCH, VERSION, FakeTrt


class FakeLibrary(FakeTrt):
    class ComputeCapability:
        SM86, SM89, SM120 = range(3)


class FakeBuilder:
    """As EngineBuilder. A plan names the graph's place in the finished bundle, which the real one does not know."""

    version = VERSION
    timing_cache = b""
    reads_valid_slots = True
    compute_capabilities = ("8.9",)
    bundle = Path()

    def __init__(self, target: str, *_: Any) -> None:
        self._target = target

    def build(self, proto: onnx.ModelProto, profiles: Mapping[str, Profile]) -> bytes:
        plan = {
            "version": self.version,
            "root": str(self.bundle),
            "graph": f"{self._target}/{StepKind(proto.graph.name).value}.onnx",
            "profiles": list(profiles.values()),
            "scratch": SCRATCH[StepKind(proto.graph.name)],
        }
        return json.dumps(plan).encode()


def install(target: str, library: Any = None) -> None:
    """For this process, in the place of the library and of the exporter's builder; without one also of CUDA."""
    if library is None:
        cuda: Any = FakeGpu()
        sys.modules.update(dict.fromkeys(BINDINGS, cuda))
        library = FakeLibrary(cuda, rtx=target == "tensorrt-rtx")
    sys.modules[MODULES[target]] = library
    setattr(build, "EngineBuilder", FakeBuilder)  # noqa: B010


def engines_of(bundle: Path) -> None:
    """Where the next export's bundle will lie."""
    FakeBuilder.bundle = bundle

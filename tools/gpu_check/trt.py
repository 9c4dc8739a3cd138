"""Stage `trt`: TensorRT."""

from __future__ import annotations

from functools import partial

from gpu_check.engines import run_target

run = partial(run_target, target="tensorrt")

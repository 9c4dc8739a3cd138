"""Stage `device`: the device runtime of the TensorRT targets on this card, without TensorRT.

Both engines are PyTorch programs that read and write where the runtime says (tests/support/torch_trt.py), in the plugin
form with the plugins' own kernels. All else is
the runtime's own: page-locked memory, copies, CUDA graphs, buffers, weights that both engines share.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.bundles import agreement, exported, need_exporter, same_tokens, small_checkpoint, timed_windows
from gpu_check.cuda import cuda_runtime
from gpu_check.job import Job, Skip

TARGET = "tensorrt-rtx"
PLUGIN_TARGET = "tensorrt"
# In the plugin form, whose nodes run on the kernels that the stage `build` made
PLUGIN_CASES: dict[str, dict[str, Any]] = {
    "plugin": {},
    "plugin, int8 caches": {"kv_dtype": "int8"},
    "plugin, int4, fp8 caches": {
        "dtype": "int4",
        "activation_dtype": "bfloat16",
        "quantization": "rtn",
        "kv_dtype": "float8_e4m3fn",
    },
}
STEPS = 9
CLOSE = 1e-3  # of the largest logit: the same steps in other buffers


def install(job: Job, target: str = TARGET) -> str:
    """PyTorch in the place of a target's library, for this process; returns the card's compute capability."""
    import torch
    from lora_drop_runtime.engines.trt.cuda_device import device_compute_capability

    from gpu_check.build import library_of
    from plugins.kernels.binding import load_library
    from tests.support import fake_library
    from tests.support.fake_gpu import BINDINGS
    from tests.support.torch_trt import TorchTrt

    cuda = cuda_runtime(job)
    if job.stand_in:
        sys.modules.update(dict.fromkeys(BINDINGS, cuda))
    elif not torch.cuda.is_available():
        raise Skip("the installed torch has no CUDA")
    kernels = load_library(library_of(job)) if target == PLUGIN_TARGET else None
    fake_library.install(target, TorchTrt(cuda, kernels, rtx=target == TARGET))
    capability = device_compute_capability()
    fake_library.FakeBuilder.compute_capabilities = (capability,)
    return capability


def forced(session: Any, batch: int) -> Any:
    """Logits of a prefill and of forced steps; of the last one."""
    import numpy as np

    prompts = np.array([[7, 3, 11, 19, 2], [5, 23, 29, 31, 4]])[:batch]
    session.prefill(prompts, max_new_tokens=STEPS + 1)
    for step in range(STEPS):
        logits = session.step(np.array([3 + step, 40 + step])[:batch])
    return logits.copy()


def graphs_and_growth(bundle: Path) -> dict[str, Any]:
    """Steps are captured and replayed; buffers grow for a larger batch, and the smaller one's steps stay right."""
    import numpy as np
    from lora_drop_runtime import Session

    with Session.open(bundle, target=TARGET, k=2) as session:
        engine: Any = session._opened()
        found, captures = [], []
        for batch in (1, 1, 2, 1):
            found.append(forced(session, batch))
            captures.append(engine.captures)
        note, resident = engine.capture_note, dict(engine.resident_bytes)
        pinned = engine.allocate("gpu_check", (4,), "int64")
        assert engine._device.is_pinned(pinned), "what the engine allocates is not page-locked"
    assert note == "", f"steps run without CUDA graphs: {note}"
    assert captures[0] > 0, "no step was captured"
    assert captures[2] > captures[1], f"steps of a larger batch were not captured: {captures}"
    bound = CLOSE * np.abs(found[0]).max()
    for what, logits in {"replayed": found[1], "of a larger batch": found[2][:1], "after it": found[3]}.items():
        worst = float(np.abs(logits - found[0]).max())
        same = what != "of a larger batch"  # whose products round otherwise in half precision
        assert worst <= (bound if same else 60 * bound), f"logits {what} differ by {worst}"
    return {"captures": captures, "resident_bytes": resident}


def export(job: Job, model: Path, name: str, options: dict[str, Any]) -> str:
    exported(job, model, name, **options)
    return "built"


def plugin_forms(job: Job, model: Path) -> str:
    """Bundles of target tensorrt: each part is a number of its own. Raises Skip where there are no kernels."""
    from lora_drop_runtime.engines.trt.plugin import PLUGIN_VARIABLE

    from tests.support import fake_library
    from tests.support.fake_trt import PLUGIN_LIBRARY

    install(job, PLUGIN_TARGET)
    plugin = job.work / "stand-in.plugin"  # for the stand-in's registry: its kernels are there already
    plugin.write_bytes(PLUGIN_LIBRARY)
    os.environ[PLUGIN_VARIABLE] = str(plugin)
    for name, options in PLUGIN_CASES.items():
        bundle = job.work / f"device.{name}"
        fake_library.engines_of(bundle)
        made = {"targets": (PLUGIN_TARGET,), "dtype": "bfloat16", "rank": 2, "surrogate": "recurrent"} | options
        job.attempt(f"{name} export", partial(export, job, model, bundle.name, made))
        if bundle.is_dir():
            job.attempt(f"{name} logits", partial(agreement, bundle, PLUGIN_TARGET, None))
            job.attempt(f"{name} tokens", partial(same_tokens, bundle, PLUGIN_TARGET, None))
    return "ran"


def run(job: Job) -> None:
    need_exporter()
    capability = install(job)
    from lora_drop_export.targets.trt.options import BuilderOptions
    from tests.support import fake_library

    model = small_checkpoint(job)
    builder = BuilderOptions(compute_capabilities=(capability,))
    for dtype in ("bfloat16",) if job.stand_in else ("float32", "bfloat16"):
        name = f"device.{dtype}"
        fake_library.engines_of(job.work / name)
        options = {"targets": (TARGET,), "dtype": dtype, "rank": 2, "surrogate": "recurrent", "builder": builder}
        job.attempt(f"{dtype} export", partial(export, job, model, name, options))
        if not (job.work / name).is_dir():
            continue
        bundle = job.work / name
        job.attempt(f"{dtype} logits", partial(agreement, bundle, TARGET, None))
        job.attempt(f"{dtype} tokens", partial(same_tokens, bundle, TARGET, None))
        job.attempt(f"{dtype} graphs", partial(graphs_and_growth, bundle))
        job.attempt(f"{dtype} times", partial(timed_windows, job, bundle, TARGET, None))
    job.attempt("plugins", partial(plugin_forms, job, model))

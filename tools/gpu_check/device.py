"""Stage `device`: the device runtime of the TensorRT targets on this card, without TensorRT.

Both engines are PyTorch programs that read and write where the runtime says (tests/support/torch_trt.py). All else is
the runtime's own: page-locked memory, copies, CUDA graphs, buffers, weights that both engines share.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.bundles import agreement, exported, need_exporter, same_tokens, small_checkpoint, timed_windows
from gpu_check.cuda import cuda_runtime
from gpu_check.job import Job, Skip

TARGET = "tensorrt-rtx"
STEPS = 9
CLOSE = 1e-3  # of the largest logit: the same steps in other buffers


def install(job: Job) -> str:
    """PyTorch in the place of TensorRT-RTX, for this process; returns the card's compute capability."""
    import torch
    from lora_drop_runtime.engines.trt.cuda_device import device_compute_capability

    from tests.support import fake_library
    from tests.support.fake_gpu import BINDINGS
    from tests.support.torch_trt import TorchTrt

    cuda = cuda_runtime(job)
    if job.stand_in:
        sys.modules.update(dict.fromkeys(BINDINGS, cuda))
    elif not torch.cuda.is_available():
        raise Skip("the installed torch has no CUDA")
    fake_library.install(TARGET, TorchTrt(cuda))
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
        job.attempt(f"{dtype} times", partial(timed_windows, bundle, TARGET, None))

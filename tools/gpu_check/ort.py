"""Stage `ort`: a bundle on ONNX Runtime's CUDA provider. Where nodes and buffers lie, logits, time of a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.bundles import agreement, exported, need_exporter, same_tokens, small_checkpoint, timed_windows
from gpu_check.cuda import cuda_runtime
from gpu_check.job import Job, Skip

BUILT = "built"
# What computes; shapes and lengths may be the host's
COMPUTING = {"GroupQueryAttention", "Gemm", "MatMul", "MatMulNBits", "RMSNormalization", "RotaryEmbedding", "Softmax"}


def need_provider(job: Job, provider: str) -> None:
    """Raises Skip with the name of what is not here."""
    from lora_drop_runtime.engines.ort.providers import PROVIDERS

    cuda_runtime(job)
    try:
        import onnxruntime

        available = onnxruntime.get_available_providers()
    except (ImportError, AttributeError):
        raise Skip("onnxruntime-gpu is not installed") from None
    if PROVIDERS[provider] not in available:
        raise Skip(f"onnxruntime-gpu is not installed; onnxruntime {onnxruntime.__version__} is, without CUDA")


def placement(job: Job, bundle: Path, provider: str) -> dict[str, Any]:
    """Runs steps of two rows; which provider ran which nodes, and whether caches were updated where they lie."""
    import numpy as np
    import onnxruntime
    from lora_drop_runtime import Session
    from lora_drop_runtime.engines.ort.providers import PROVIDERS

    from tests.support.cuda_stub.worker import Watch, placed

    plain: Callable[..., Any] = onnxruntime.SessionOptions
    sessions: set[Any] = set()

    def profiled() -> Any:
        options = plain()
        options.enable_profiling, options.profile_file_prefix = True, str(job.work / "profile")
        return options

    onnxruntime.SessionOptions = profiled
    watch = Watch()
    watched = onnxruntime.InferenceSession.run_with_iobinding

    def running(session: Any, binding: Any, *arguments: Any) -> None:
        sessions.add(session)
        watched(session, binding, *arguments)

    onnxruntime.InferenceSession.run_with_iobinding = running
    with Session.open(bundle, provider=provider, k=3) as session:
        session.prefill(np.ones((2, 5), np.int64), np.array([5, 3]), max_new_tokens=20)
        for _ in range(8):
            session.step(np.array([3, 4]))
        found: dict[str, dict[str, int]] = {}
        for one in sessions:
            for name, counts in placed(Path(one.end_profiling())).items():
                own = found.setdefault(name, {})
                for op, count in counts.items():
                    own[op] = own.get(op, 0) + count
    elsewhere = {op for name, counts in found.items() if name != PROVIDERS[provider] for op in counts} & COMPUTING
    moved = [
        name
        for name, addresses in watch.addresses.items()
        if name.startswith("past_") and addresses != watch.addresses.get(name.replace("past_", "present_"))
    ]
    print(json.dumps(found))
    assert not elsewhere, f"not on {PROVIDERS[provider]}: {', '.join(sorted(elsewhere))}"
    assert not moved, f"caches are not updated in place: {', '.join(moved[:4])}"
    assert not watch.moved, f"outputs were moved: {', '.join(watch.moved[:4])}"
    return found


def refusal(bundle: Path, target: str, provider: str | None) -> str | None:
    """Why the runtime of today does not run a bundle on a provider; None where it does."""
    from lora_drop_runtime.bundle.bundle import Bundle
    from lora_drop_runtime.engines.open import check_engine
    from lora_drop_runtime.errors import LoraDropError

    try:
        check_engine(Bundle.open(bundle), target, provider)
    except LoraDropError as error:
        return f"{error.fact} {error.note}"
    return None


def built(job: Job, model: Path, name: str, provider: str | None, options: dict[str, Any]) -> str:
    """Export a bundle. Raises Skip where the runtime of today does not run it on the provider."""
    refused = refusal(exported(job, model, name, **options), options["targets"][0], provider)
    if refused is not None:
        raise Skip(refused)
    return BUILT


def run(job: Job) -> None:
    provider, dtype = ("cpu", "float32") if job.stand_in else ("cuda", "bfloat16")
    need_provider(job, provider)
    need_exporter()
    model = small_checkpoint(job)
    job.say("exporting")
    cases = {
        dtype: {"dtype": dtype},
        "int4": {"dtype": "int4", "activation_dtype": dtype},
        "int8 caches": {"dtype": dtype, "kv_dtype": "int8"},
    }
    for name, form in cases.items():
        bundle = f"ort.{name}"
        options = {"targets": ("ort",), "rank": 2, **form}
        job.attempt(f"{name} export", partial(built, job, model, bundle, provider, options))
        if job.numbers[f"{name} export"] != BUILT:
            continue
        root = job.work / bundle
        job.attempt(f"{name} logits", partial(agreement, root, "ort", provider))
        job.attempt(f"{name} tokens", partial(same_tokens, root, "ort", provider))
        job.attempt(f"{name} times", partial(timed_windows, job, root, "ort", provider))
    if job.numbers[f"{dtype} export"] == BUILT:  # last, since it changes onnxruntime in this process
        job.attempt("placement", partial(placement, job, job.work / f"ort.{dtype}", provider))

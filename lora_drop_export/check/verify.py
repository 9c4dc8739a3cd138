"""Comparing a bundle with eager PyTorch, every step of a teacher-forced run, through Polygraphy.

Enters: a bundle. Leaves: a `Verification` and a table; writes nothing. The run is a ragged batch with a prefill and two
whole cycles of the bundle's schedule, or what of them the bundle's limits allow. `SessionRunner` wraps the runtime's
session, whose buffers alias; `ReferenceRunner` wraps reference.py, fed from the bundle's own weight files by tensor
name, not by the graphs' offsets.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import QUANTIZED_DTYPES, OpenVinoEntry, OrtEntry
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.engine import Engine
from lora_drop_runtime.engines.open import check_engine
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.engines.ort.package import import_onnxruntime
from lora_drop_runtime.errors import InputError, NoDeviceError
from lora_drop_runtime.plan.policy import Policy, policy_named
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from lora_drop_export.console import Console

from .figures import (
    CACHES,
    TOLERANCES,
    StepResult,
    Tolerance,
    Verification,
    compare_logits,
    failure,
    print_table,
    row_cosines,
)
from .reference import reference_of
from .runners import ReferenceRunner, SessionRunner
from .sample import sample_feeds, steps_that_fit

_EXPERT_KERNELS = "ORT_QMOE_CPU_QNBIT_GEMM"  # moe_quantization_cpu.cc: 0, fp32 or int8


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs every array; the table says what matters."""
    severity = G_LOGGER.module_severity
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.module_severity = severity


def _all_logits(runner: SessionRunner, feeds: list[dict[str, Any]]) -> list[npt.NDArray[np.float32]]:
    with runner:
        return [runner.infer(feed)["logits"] for feed in feeds]


def _unrounded(bundle: Bundle, target: str) -> dict[str, bytes]:
    """The graphs of target ort with the kernels for quantized weights that compute in float32, exact and slow."""
    import onnx

    entry = bundle.target(target)[1]
    assert isinstance(entry, OrtEntry)
    changed = {}
    for file in (name for name in entry.files if name != entry.weights):
        model = onnx.load(bundle.root / file, load_external_data=False)
        graphs = [model.graph]
        for graph in graphs:
            for node in graph.node:
                graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
                for attribute in node.attribute:
                    if attribute.name == "accuracy_level":
                        attribute.i = 1  # float32, the most exact that MatMulNBits knows
        changed[file] = bytes(model.SerializeToString())
    return changed


@contextlib.contextmanager
def _experts_unrounded() -> Iterator[None]:
    """Sessions of ONNX Runtime that are opened meanwhile compute experts of 8 bits in float32: of QMoE's kernels for
    them all round activations, and a variable of the environment alone chooses none of these."""
    before = os.environ.get(_EXPERT_KERNELS)
    os.environ[_EXPERT_KERNELS] = "fp32"
    try:
        yield
    finally:
        del os.environ[_EXPERT_KERNELS]
        if before is not None:
            os.environ[_EXPERT_KERNELS] = before


def _open_exact(
    bundle: Bundle, schedule: PeriodicSchedule, policy: Policy, *, target: str, threads: int | None, **options: Any
) -> Session:
    """A session whose products of quantized weights are computed in float32, as is all of a mixture of experts on
    OpenVINO, and where the engine rounds caches by itself, without that."""
    engine: Engine
    if isinstance(bundle.target(target)[1], OpenVinoEntry):
        check_engine(bundle, target, options["provider"])
        engine = OpenVinoEngine(bundle, target, threads=threads, exact=True)
    else:
        with _experts_unrounded():
            engine = OrtEngine(bundle, target, graphs=_unrounded(bundle, target), threads=threads, **options)
    return Session(bundle, engine, schedule, policy.name)


def _judged(
    results: Any, kinds: Sequence[StepKind], rounded: Sequence[npt.NDArray[np.float32]], tolerance: Tolerance
) -> tuple[tuple[StepResult, ...], float | None]:
    """(what became of each step, median cosine of the rounded logits where there are some)."""
    steps: list[StepResult] = []
    cosines: list[float] = []

    def compare_step(ours: Any, theirs: Any) -> OrderedDict[str, StepResult]:
        index = len(steps)
        kind = "prefill" if not index else kinds[index - 1].value
        result = compare_logits(index, kind, ours["logits"], theirs["logits"], tolerance)
        steps.append(result)
        if rounded:
            cosines.extend(row_cosines(rounded[index], theirs["logits"]))
        return OrderedDict(logits=result)

    with _quiet():
        Comparator.compare_accuracy(results, compare_func=compare_step)
    return tuple(steps), float(np.median(cosines)) if rounded else None


def compare(
    bundle: Bundle,
    *,
    target: str | None = None,
    k: int | None = None,
    provider: str | None = None,
    threads: int | None = None,
    console: Console | None = None,
    trust_remote_code: bool = False,
    policy: str | None = None,
) -> Verification:
    """Run a bundle's target and the reference over the same steps.

    Args:
        policy: what refreshes do; the bundle's when None.
        k: the window to compare under; the bundle's, but at least 1 so that LoRA steps occur.
    """
    manifest = bundle.manifest
    name, entry = bundle.target(target)
    k = max(1, manifest.plan.k) if k is None else k
    chosen = policy_named(policy or manifest.plan.policy)
    manifest.plan.check_policy(chosen)
    schedule, refreshes = PeriodicSchedule(k), chosen.in_steps
    steps = steps_that_fit(manifest.limits, k)
    feeds = sample_feeds(bundle, steps)
    kinds = [schedule.kind(step) for step in range(1, steps + 1)]
    scaled = manifest.model.kv_dtype is not None and entry.takes_cache_scales
    computed = reference_of(bundle, trust_remote_code, rounds_caches=scaled)
    reference = ReferenceRunner(computed, feeds, kinds, refreshes, console or Console())
    engine: dict[str, Any] = {"target": name, "provider": provider, "threads": threads}
    rounded: list[npt.NDArray[np.float32]] = []
    open_session = functools.partial(Session.open, bundle.root, k=schedule.k, policy=refreshes.name)
    rounds_caches = manifest.model.kv_dtype is not None and not scaled
    # TensorRT dequantizes weights and rounds no activation
    rounds = manifest.model.weight_dtype in QUANTIZED_DTYPES and isinstance(entry, OrtEntry | OpenVinoEntry)
    # A router's choice falls the other way where half precision does not tell two experts apart
    in_halves = bool(manifest.model.expert_bytes) and manifest.model.dtype != "float32"
    flips = in_halves and isinstance(entry, OpenVinoEntry)
    if rounds or rounds_caches or flips:
        with open_session(**engine) as session, _quiet():  # it ends first: each session holds the weights
            rounded = _all_logits(SessionRunner(session, name, steps, k), feeds)
        open_session = functools.partial(_open_exact, bundle, schedule, refreshes)
    with open_session(**engine) as session, _quiet():
        runners = [SessionRunner(session, name, steps, k), reference]
        results = Comparator.run(runners, data_loader=feeds, warm_up=0)
    tolerance = TOLERANCES["float32" if flips else manifest.model.dtype]
    if scaled:
        tolerance = tolerance.or_looser(CACHES[str(manifest.model.kv_dtype)])
    judged, median = _judged(results, kinds, rounded, tolerance)
    lengths = tuple(int(length) for length in feeds[0]["lengths"])
    return Verification(
        name,
        k,
        lengths,
        tolerance,
        judged,
        median,
        refreshes.name,
        rounded_to="bfloat16" if flips else "8 bits",
        half_router=manifest.model.dtype if in_halves and not flips else None,
    )


def verify_target(
    bundle: Bundle,
    target: str,
    *,
    provider: str | None,
    runs_on_cpu: bool,
    console: Console,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], Verification | None]:
    """Compare a target with the reference and print the table.

    Args:
        provider: what runs it, as `Session.open` has it.
        runs_on_cpu: whether, where this machine lacks the device, its graphs (plain ONNX in that case) run on ONNX
            Runtime's CPU provider in its place. That is recorded apart, for it says nothing of the engines.

    Returns:
        What the manifest says of it, and the steps of what was run, if anything was.

    Raises:
        VerificationError: a step disagrees.
    """
    check = functools.partial(
        compare, bundle, target=target, console=console, threads=threads, trust_remote_code=trust_remote_code
    )
    not_run: dict[str, Any] = {}
    try:
        result = check(provider=provider)
    except NoDeviceError as error:
        not_run = {"status": "not run", "reason": error.note}
        console.say(f"{target}: not run on this machine: {error.note}")
        if not runs_on_cpu:
            return not_run, None
        try:
            import_onnxruntime()
        except InputError as missing:  # a TensorRT target was built without it, and the GPU's machine needs none
            console.say(f"{target}: its graphs are not compared on the CPU either: {missing.fact} {missing.note}")
            return not_run, None
        console.say(f"{target}: its graphs, on ONNX Runtime's CPU provider:")
        result = check(provider="cpu")
    print_table(result, console)
    if not result.passed:
        raise failure(result)
    return not_run | {"graphs_on_cpu": result.summary()} if not_run else result.summary(), result

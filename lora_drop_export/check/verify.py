"""Comparing a bundle with eager PyTorch, every step of a teacher-forced run, through Polygraphy.

Enters: a bundle. Leaves: a `Verification` (verify.json) and a table. The run is a ragged batch with a prefill and at
least two whole cycles of the bundle's schedule. `SessionRunner` wraps the runtime's session, whose buffers alias;
`ReferenceRunner` wraps reference.py, fed from the bundle's own weight files by tensor name, not by the graphs' offsets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle, record_file
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, QUANTIZED_DTYPES, VERIFY_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.engines.ort.engine import OrtEngine
from lora_drop_runtime.errors import InputError, LoraDropError, NoDeviceError, VerificationError, first_line
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind
from lora_drop_runtime.text import TextCodec
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from lora_drop_export.checkpoint.open import Checkpoint, open_checkpoint
from lora_drop_export.console import Console
from lora_drop_export.weights.store import ADAPTERS_NAME, KV_SCALES_NAME, read_arrays

from .reference import Reference, adapter_matrices

PROMPT_TOKENS = (24, 17)  # a ragged batch
SAMPLE_TEXT = "sample.txt"
PERPLEXITY_TOKENS = 1024  # at most, of the sample text


@dataclass(frozen=True)
class Tolerance:
    """Largest error accepted, as a fraction of the row's largest |logit|, and smallest cosine."""

    max_error: float
    min_cosine: float


# float32: both sides compute in float32 and sum in other orders; over 30 layers that was 3e-6 on the real models,
# while a swapped weight or cache, a wrong length or a missing base fails it (tests/export/test_verify.py).
# Halves: the reference computes in float32 with the same rounded weights. Eager PyTorch itself in that dtype was off by
# at most 0.0041 (float16, cosine 0.99997) and 0.030 (bfloat16, 0.9971) over 160 positions of SmolLM2-135M; twice that.
# Quantized weights are float32's case: the graph is run with kernels that compute in float32. The engine's own kernels
# round activations to 8 bits, and 30 layers of that are chaotic: a rounding that falls the other way is as large as
# the quantization itself. So of them only the median over rows and steps is judged: 0.9999 for SmolLM2-135M and
# Qwen2.5-Coder-1.5B in int4, while single LoRA steps without adapters were as low as 0.80.
TOLERANCES = {
    "float32": Tolerance(max_error=2e-4, min_cosine=0.999999),
    "float16": Tolerance(max_error=0.01, min_cosine=0.9999),
    "bfloat16": Tolerance(max_error=0.06, min_cosine=0.99),
}
MIN_ROUNDED_COSINE = 0.95
# int8 caches: the reference rounds them likewise; an entry that falls the other way is off by 1/127 of its channel. On
# SmolLM2-135M with 13 layers dropped that made at most 0.012 (cosine 0.99996); three times that.
INT8_CACHES = Tolerance(max_error=0.04, min_cosine=0.999)


@dataclass(frozen=True)
class StepResult:
    """One step of the run. A near-tie: the top-1 tokens differ, the reference's two best logits within the error."""

    step: int
    kind: str
    max_abs_error: float
    max_rel_error: float
    cosine: float
    top1_agreement: float
    near_ties: int
    passed: bool

    def __bool__(self) -> bool:
        return self.passed


@dataclass(frozen=True)
class Verification:
    target: str
    k: int
    prompt_lengths: tuple[int, ...]
    tolerance: Tolerance
    steps: tuple[StepResult, ...]
    rounded_cosine: float | None = None  # median, of kernels that round activations
    policy: str = "skip"

    @property
    def passed(self) -> bool:
        return all(self.steps) and (self.rounded_cosine is None or self.rounded_cosine >= MIN_ROUNDED_COSINE)

    def summary(self) -> dict[str, Any]:
        """What the manifest keeps."""
        summary = {
            "status": "passed" if self.passed else "failed",
            "steps": len(self.steps),
            "max_abs_error": max(s.max_abs_error for s in self.steps),
            "min_cosine": min(s.cosine for s in self.steps),
        }
        return summary if self.rounded_cosine is None else summary | {"rounded_cosine": self.rounded_cosine}


class SessionRunner(BaseRunner):  # type: ignore[misc]  # polygraphy ships no types
    """Polygraphy runner over a session: the first feed is the prefill, every other one a decode step."""

    def __init__(self, session: Session, target: str, steps: int, k: int) -> None:
        super().__init__(name=target)
        self._session = session
        self._steps, self._k = steps, k

    def activate_impl(self) -> None:
        self._begun = False

    def deactivate_impl(self) -> None:
        del self._begun

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _input_metadata()

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, Any]:
        ids, lengths = feed_dict["token_ids"], feed_dict["lengths"]
        begin = time.perf_counter()
        try:
            if not self._begun:
                logits = self._session.prefill(ids, lengths, max_new_tokens=self._steps + 1, k=self._k)
                self._begun = True
            else:
                logits = self._session.step(ids[:, 0])
        except LoraDropError:
            raise
        except Exception as error:  # each engine has exceptions of its own
            raise VerificationError(
                f"The bundle on {self.name} cannot be executed.",
                note=first_line(error),
                hint="This is a bug, or an engine older than the bundle needs.",
            ) from error
        self.inference_time = time.perf_counter() - begin
        return OrderedDict(logits=logits.copy())


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """Polygraphy runner over reference.py, which computes all steps when it is activated."""

    def __init__(
        self, reference: Reference, feeds: list[dict[str, Any]], kinds: list[StepKind], policy: str, console: Console
    ) -> None:
        super().__init__(name="reference")
        self._reference, self._feeds, self._kinds, self._console = reference, feeds, kinds, console
        self._policy = policy

    def activate_impl(self) -> None:
        first, rest = self._feeds[0], self._feeds[1:]
        tokens = np.stack([feed["token_ids"][:, 0] for feed in rest])
        with self._console.progress("reference (eager PyTorch)") as progress:
            self._outputs = iter(
                self._reference.run(
                    first["token_ids"],
                    first["lengths"],
                    tokens,
                    self._kinds,
                    lambda done, total: progress("reference (eager PyTorch)", done, total),
                    self._policy,
                )
            )

    def deactivate_impl(self) -> None:
        del self._outputs

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _input_metadata()

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, Any]:
        self.inference_time = 0.0  # all of it was spent when activated
        return OrderedDict(logits=next(self._outputs))


def _input_metadata() -> TensorMetadata:
    return (
        TensorMetadata()
        .add("token_ids", dtype=np.int64, shape=("batch", "tokens"))
        .add("lengths", dtype=np.int64, shape=("batch",))
    )


def verify(
    bundle: Bundle,
    *,
    console: Console,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Bundle:
    """Verify targets of a bundle that is being written, all when None; writes verify.json and the manifest's entries.

    A target that this machine cannot execute is recorded as `not run`, with the reason. Its graphs, which are plain
    ONNX in the native form, then run on ONNX Runtime's CPU provider in its place where their dtype lets them; that is
    recorded apart, for it says nothing of the engines.

    Raises:
        VerificationError: a step disagrees.
    """
    manifest = bundle.manifest
    entries: dict[str, dict[str, Any]] = dict(manifest.verification)
    results = []
    for target in manifest.targets if targets is None else targets:
        dtype = manifest.model.dtype
        check = functools.partial(
            compare,
            bundle,
            target=target,
            console=console,
            threads=threads,
            trust_remote_code=trust_remote_code,
        )
        entries[target] = {}
        try:
            result = check(provider="cuda" if target == "ort" and dtype != "float32" else None)
        except NoDeviceError as error:
            entries[target] = {"status": "not run", "reason": error.note}
            console.say(f"{target}: not run on this machine: {error.note}")
            if dtype == "bfloat16" or manifest.targets[target].get("form") == "plugin":
                continue  # there is nothing on a CPU that could
            console.say(f"{target}: its graphs, on ONNX Runtime's CPU provider:")
            result = check(provider="cpu")
        results.append(result)
        print_table(result, console)
        if not result.passed:
            raise failure(result)
        entries[target] |= {"graphs_on_cpu": result.summary()} if entries[target] else result.summary()
    path = bundle.root / VERIFY_NAME
    before = json.loads(path.read_bytes()) if path.exists() else []
    checked = set(manifest.targets if targets is None else targets)
    details = [result for result in before if result["target"] not in checked]
    details += [dataclasses.asdict(result) for result in results]
    path.write_text(json.dumps(details, indent=1) + "\n")
    manifest = dataclasses.replace(
        manifest,
        verification=entries,
        files=manifest.files | {VERIFY_NAME: record_file(path)},
    )
    (bundle.root / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle(bundle.root, manifest)


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
        policy: of the refreshes; the bundle's when None.
        k: the window to compare under; the bundle's, but at least 1 so that LoRA steps occur.
    """
    console = console or Console()
    manifest = bundle.manifest
    name, _ = bundle.target(target)
    k = max(1, manifest.plan.k) if k is None else k
    schedule, policy = PeriodicSchedule(k), policy or manifest.plan.policy
    steps = max(2 * (k + 1), 4) + 1
    feeds = _feeds(bundle, steps)
    kinds = [schedule.kind(step) for step in range(1, steps + 1)]
    reference = ReferenceRunner(_reference(bundle, trust_remote_code), feeds, kinds, policy, console)
    engine: dict[str, Any] = {"target": name, "provider": provider, "threads": threads}
    quantized = manifest.model.weight_dtype in QUANTIZED_DTYPES
    rounded: list[npt.NDArray[np.float32]] = []
    steps_graph = None
    if quantized:  # one after the other: each session holds the weights
        with Session.open(bundle.root, k=k, policy=policy, **engine) as session, _quiet():
            rounded = _all_logits(SessionRunner(session, name, steps, k), feeds)
        steps_graph = _unrounded(bundle, name)
    with _open(bundle, schedule, policy, steps_graph, **engine) as session, _quiet():
        runners = [SessionRunner(session, name, steps, k), reference]
        results = Comparator.run(runners, data_loader=feeds, warm_up=0)
    tolerance = INT8_CACHES if manifest.model.kv_dtype else TOLERANCES[manifest.model.dtype]
    step_results: list[StepResult] = []

    def compare_step(ours: Any, theirs: Any) -> OrderedDict[str, StepResult]:
        index = len(step_results)
        kind = "prefill" if not index else kinds[index - 1].value
        result = compare_logits(index, kind, ours["logits"], theirs["logits"], tolerance)
        step_results.append(result)
        if rounded:
            cosines.extend(_cosines(rounded[index], theirs["logits"]))
        return OrderedDict(logits=result)

    cosines: list[float] = []
    with _quiet():
        Comparator.compare_accuracy(results, compare_func=compare_step)
    lengths = tuple(int(length) for length in feeds[0]["lengths"])
    median = float(np.median(cosines)) if rounded else None
    return Verification(name, k, lengths, tolerance, tuple(step_results), median, policy)


def _open(
    bundle: Bundle, schedule: PeriodicSchedule, policy: str, steps: bytes | None, *, target: str, **options: Any
) -> Session:
    """A session over a target, or over another graph in its place."""
    if steps is None:
        return Session.open(bundle.root, k=schedule.k, policy=policy, target=target, **options)
    return Session(bundle, OrtEngine(bundle, target, steps=steps, **options), schedule, policy)


def _all_logits(runner: SessionRunner, feeds: list[dict[str, Any]]) -> list[npt.NDArray[np.float32]]:
    with runner:
        return [runner.infer(feed)["logits"] for feed in feeds]


def _unrounded(bundle: Bundle, target: str) -> bytes:
    """A target's graph with the kernels for quantized weights that compute in float32, exact and slow."""
    import onnx

    model = onnx.load(bundle.root / bundle.target(target)[1]["steps"], load_external_data=False)
    graphs = [model.graph]
    for graph in graphs:
        for node in graph.node:
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1  # float32, the most exact that MatMulNBits knows
    return bytes(model.SerializeToString())


def _cosines(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Of each row; both [B, V]."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    result: npt.NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(
        np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30
    )
    return result


def compare_logits(
    step: int,
    kind: str,
    ours: npt.NDArray[np.float32],
    theirs: npt.NDArray[np.float32],
    tolerance: Tolerance,
) -> StepResult:
    """One step's figures; `ours` and `theirs` are float32 [B, V], errors are relative to the row's largest |logit|."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    error = np.abs(a - b).max(axis=1)
    scale = np.abs(b).max(axis=1)
    relative = error / np.maximum(scale, 1e-30)
    cosine = _cosines(ours, theirs)
    same = a.argmax(axis=1) == b.argmax(axis=1)
    top2 = np.sort(b, axis=1)[:, -2:]
    near_tie = ~same & (top2[:, 1] - top2[:, 0] <= 2 * error)
    finite = bool(np.isfinite(a).all() and np.isfinite(b).all())
    passed = (
        finite
        and bool((relative <= tolerance.max_error).all())
        and bool((cosine >= tolerance.min_cosine).all())
        and bool((same | near_tie).all())
    )
    return StepResult(
        step=step,
        kind=kind,
        max_abs_error=float(error.max()),
        max_rel_error=float(relative.max()),
        cosine=float(cosine.min()),
        top1_agreement=float(same.mean()),
        near_ties=int(near_tie.sum()),
        passed=passed,
    )


def print_table(result: Verification, console: Console) -> None:
    """One line per step kind."""
    from rich.table import Table

    table = Table(title=f"{result.target} against eager PyTorch, k = {result.k}", title_justify="left")
    for column in ("step kind", "steps", "max abs error", "max rel error", "min cosine", "top-1 agreement"):
        table.add_column(column, justify="left" if column == "step kind" else "right")
    for kind in ("prefill", StepKind.LORA.value, StepKind.REFRESH.value):
        group = [s for s in result.steps if s.kind == kind]
        if group:
            ties = sum(s.near_ties for s in group)
            table.add_row(
                kind,
                str(len(group)),
                f"{max(s.max_abs_error for s in group):.1e}",
                f"{max(s.max_rel_error for s in group):.1e}",
                f"{min(s.cosine for s in group):.7f}",
                f"{np.mean([s.top1_agreement for s in group]):.0%}" + (f" ({ties} near-ties)" if ties else ""),
            )
    console.rich.print(table)
    if result.rounded_cosine is not None:
        console.say(
            f"the above with kernels that compute in float32; with those that round activations to 8 bits, which run, "
            f"the median cosine is {result.rounded_cosine:.4f}"
        )


def failure(result: Verification) -> VerificationError:
    """The error for a comparison that failed."""
    if all(result.steps):
        return VerificationError(
            f"The bundle on {result.target} disagrees with PyTorch.",
            note=f"Kernels that round activations: median cosine {result.rounded_cosine:.4f}, accepted is "
            f"{MIN_ROUNDED_COSINE}.",
            hint="Use --dtype int8 or fp32; if those pass, an engine's kernel for int4 computes wrongly here.",
        )
    worst = max((s for s in result.steps if not s.passed), key=lambda s: s.max_rel_error)
    return VerificationError(
        f"The bundle on {result.target} disagrees with PyTorch.",
        note=f"Step {worst.step} ({worst.kind}): relative error {worst.max_rel_error:.1e}, cosine {worst.cosine:.7f}; "
        f"accepted are {result.tolerance.max_error:.0e} and {result.tolerance.min_cosine}.",
        hint="This is a bug, or an engine that computes differently here; please report it with verify output.",
    )


def _reference(bundle: Bundle, trust_remote_code: bool) -> Reference:
    """The reference over the bundle's own weight files, looked up by tensor name."""
    checkpoint = open_checkpoint(
        str(bundle.root / "weights"), bundle.root / "scratch", trust_remote_code=trust_remote_code
    )
    plan = bundle.manifest.plan
    matrices = adapter_matrices(plan, read_arrays(bundle.root, ADAPTERS_NAME))
    return Reference(checkpoint, plan, matrices, kv_scales=read_arrays(bundle.root, KV_SCALES_NAME))


def calibrate_kv(checkpoint: Checkpoint, root: Path, vocab_size: int, context: int, console: Console) -> dict[str, Any]:
    """Scales for int8 caches: the largest magnitude of each channel of K and V over the sample text, over 127.

    Args:
        root: of the bundle, whose tokenizer is there already; random ids without one.

    Returns:
        `kv_scales.<layer>.key` and `.value`, float32 [Hkv, 1, D].
    """
    ids = _sample_ids(root, vocab_size)
    if ids is None or len(ids) < 2:
        console.say("int8 caches: calibrated on random tokens, the model brings no tokenizer")
        ids = np.random.default_rng(0).integers(0, vocab_size, PERPLEXITY_TOKENS)
    ids = ids[: min(PERPLEXITY_TOKENS, context)]
    everything = DropPlan(checkpoint.config.num_hidden_layers, ())
    with console.progress("calibrating the caches") as progress:
        largest = Reference(checkpoint, everything, {}).largest_kv(
            ids, functools.partial(progress, "calibrating the caches")
        )
    return {name: np.maximum(value, 1e-6) / np.float32(127) for name, value in largest.items()}


def report_perplexity(bundle: Bundle, checkpoint: Checkpoint, *, console: Console) -> Bundle:
    """What quantization costs: perplexity on the sample text, all layers in full, before and after.

    Args:
        checkpoint: the weights that the bundle's were made from.

    Returns:
        The bundle, whose manifest says it in `quantization`; as it was where there is no tokenizer.
    """
    manifest = bundle.manifest
    ids = _sample_ids(bundle.root, manifest.model.vocab_size)
    if ids is None:
        console.say("perplexity of the quantized weights: not measured, the model brings no tokenizer")
        return bundle
    ids = ids[: min(PERPLEXITY_TOKENS, manifest.model.context_length)]
    if len(ids) < 2:
        console.say("perplexity of the quantized weights: not measured, the sample text has no tokens of the model")
        return bundle
    stored = open_checkpoint(
        str(bundle.root / "weights"), bundle.root / "scratch", trust_remote_code=checkpoint.trust_remote_code
    )
    found = []
    for what, source in (("checkpoint", checkpoint), ("bundle", stored)):  # the bundle's as its engine computes
        with console.progress(f"perplexity of the {what}") as progress:
            reference = Reference(source, manifest.plan, {}, round_activations=True)
            found.append(reference.perplexity(ids, functools.partial(progress, f"perplexity of the {what}")))
    before, after = found
    dtype, change = manifest.model.weight_dtype, 100 * (after / before - 1)
    console.say(f"perplexity on {len(ids)} tokens: float {before:.2f} → {dtype} {after:.2f} ({change:+.1f} %)")
    perplexity = {"tokens": len(ids), "float": before, dtype: after}
    manifest = dataclasses.replace(manifest, quantization=manifest.quantization | {"perplexity": perplexity})
    (bundle.root / MANIFEST_NAME).write_text(manifest.to_json())
    return Bundle(bundle.root, manifest)


def _sample_ids(root: Path, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """The sample text in the model's tokens; None without a tokenizer."""
    if not (root / "tokenizer" / "tokenizer.json").is_file():
        return None
    text = resources.files(__package__).joinpath(SAMPLE_TEXT).read_text()
    ids = TextCodec.open(root / "tokenizer").encode(text)
    return ids[ids < vocab_size]


def _feeds(bundle: Bundle, steps: int) -> list[dict[str, Any]]:
    """Prompts and forced tokens: a sample text in the model's tokens, or random ids without a tokenizer."""
    limits, vocab_size = bundle.manifest.limits, bundle.manifest.model.vocab_size
    room = min(limits.max_prompt_len, limits.max_seq_len - steps - 1)
    if room < 1:
        raise InputError(
            "The bundle is too short to be verified.",
            note=f"Two cycles need {steps + 2} tokens, --max-seq-len is {limits.max_seq_len}.",
            hint="Raise --max-seq-len, lower --k, or use --no-verify.",
        )
    lengths = np.array([min(n, room) for n in PROMPT_TOKENS[: limits.max_batch]], np.int64)
    needed = (int(lengths.max()) + steps) * len(lengths)
    sample = _sample_ids(bundle.root, vocab_size)
    if sample is not None:
        ids = np.resize(sample, needed)
    else:
        ids = np.random.default_rng(0).integers(0, vocab_size, needed)
    rows = ids.reshape(len(lengths), -1)  # [B, prompt + steps]
    prompt = int(lengths.max())
    first = {"token_ids": np.ascontiguousarray(rows[:, :prompt]), "lengths": lengths}
    rest = [
        {"token_ids": np.ascontiguousarray(rows[:, prompt + j : prompt + j + 1]), "lengths": lengths}
        for j in range(steps)
    ]
    return [first, *rest]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs every array; the table says what matters."""
    severity = G_LOGGER.module_severity
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.module_severity = severity

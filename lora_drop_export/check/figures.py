"""How far two logits may lie apart, and how far they do.

Enters: logits of both sides. Leaves: a `Verification`, its table and its error. Runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.errors import InputError, LoraDropError, VerificationError, counted
from lora_drop_runtime.plan.policy import DEFAULT_POLICY
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.console import Console


@dataclass(frozen=True)
class Tolerance:
    """Largest error accepted, as a fraction of the row's largest |logit|, and smallest cosine."""

    max_error: float
    min_cosine: float

    def or_looser(self, other: Tolerance) -> Tolerance:
        """Where both are reasons for an error."""
        return Tolerance(max(self.max_error, other.max_error), min(self.min_cosine, other.min_cosine))


# float32: both sides compute in float32 and sum in other orders; over 30 layers that was 3e-6 on the real models,
# while a swapped weight or cache, a wrong length or a missing base fails it (tests/export/check/test_verify.py).
# Halves: the reference computes in float32 with the same rounded weights. Eager PyTorch itself in that dtype was off by
# at most 0.0041 (float16, cosine 0.99997) and 0.030 (bfloat16, 0.9971) over 160 positions of SmolLM2-135M; twice that.
# Quantized weights are float32's case: the graph is run with kernels that compute in float32. The engine's own kernels
# round activations to 8 bits, and 30 layers of that are chaotic: a rounding that falls the other way is as large as
# the quantization itself. So of them only the median over rows and steps is judged: 0.9999 for SmolLM2-135M and
# Qwen2.5-Coder-1.5B in int4, while single LoRA steps without adapters were as low as 0.80.
# So are mixtures of experts in bfloat16 on OpenVINO, which computes their graphs in float32, too: where two experts are
# nearly as good a router takes the other one. Tiny random models, which agree to 4e-5 in float32, were off by up to
# 0.98 (cosine 0.67) at such tokens.
TOLERANCES = {
    "float32": Tolerance(max_error=2e-4, min_cosine=0.999999),
    "float16": Tolerance(max_error=0.01, min_cosine=0.9999),
    "bfloat16": Tolerance(max_error=0.06, min_cosine=0.99),
}
MIN_ROUNDED_COSINE = 0.95
# 8-bit caches: the reference rounds them likewise; an int8 entry that falls the other way is off by 1/127 of its
# channel, one of fp8 by up to 1/8 of itself. On SmolLM2-135M with 13 layers dropped that made at most 0.012 (cosine
# 0.99996) and 0.021 (0.99993); three times that.
CACHES = {
    "int8": Tolerance(max_error=0.04, min_cosine=0.999),
    "float8_e4m3fn": Tolerance(max_error=0.06, min_cosine=0.999),
}


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
    reference_is_finite: bool = True

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
    policy: str = DEFAULT_POLICY
    rounded_to: str = "8 bits"
    half_router: str | None = None  # the dtype in which a mixture's routers choose, where it is no float32

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


def row_cosines(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
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
    cosine = row_cosines(ours, theirs)
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
        reference_is_finite=bool(np.isfinite(b).all()),
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
                f"{np.mean([s.top1_agreement for s in group]):.0%}"
                + (f" ({counted(ties, 'near-tie')})" if ties else ""),
            )
    console.rich.print(table)
    absent = [kind.value for kind in StepKind if all(step.kind != kind.value for step in result.steps)]
    if absent and result.k:
        console.say(
            f"{' and '.join(absent)} steps were not compared: in the longest request that the bundle allows, with a "
            "prompt of one token, there is none"
        )
    if result.rounded_cosine is not None:
        console.say(
            f"the above with kernels that compute in float32; with those that round activations to "
            f"{result.rounded_to}, which run, the median cosine is {result.rounded_cosine:.4f}"
        )


def failure(result: Verification) -> LoraDropError:
    """The error for a comparison that failed."""
    undefined = next((step for step in result.steps if not step.reference_is_finite), None)
    if undefined is not None:
        return InputError(
            "The model computes logits that are not numbers.",
            note=f"So does PyTorch with its weights: step {undefined.step} ({undefined.kind}) has NaN or infinity.",
            hint="Look for NaN, infinity or far too large values in the checkpoint and in the adapters.",
        )
    if all(result.steps):
        return VerificationError(
            f"The bundle on {result.target} disagrees with PyTorch.",
            note=f"Kernels that round activations: median cosine {result.rounded_cosine:.4f}, accepted is "
            f"{MIN_ROUNDED_COSINE}.",
            hint="Use --dtype int8 or fp32; if those pass, an engine's kernel for "
            f"{'int4' if result.rounded_to == '8 bits' else result.rounded_to} computes wrongly here.",
        )
    worst = max((s for s in result.steps if not s.passed), key=lambda s: s.max_rel_error)
    hint = "This is a bug, or an engine that computes differently here; please report it with verify output."
    if result.half_router:
        hint = (
            f"In {result.half_router} a router may choose another expert where two are nearly as good, and logits "
            "follow. Export with --dtype fp32; if that passes, this is why, and --no-verify leaves the comparison out."
        )
    return VerificationError(
        f"The bundle on {result.target} disagrees with PyTorch.",
        note=f"Step {worst.step} ({worst.kind}): relative error {worst.max_rel_error:.1e}, cosine {worst.cosine:.7f}; "
        f"accepted are {result.tolerance.max_error:.0e} and {result.tolerance.min_cosine}.",
        hint=hint,
    )

"""Whether a benchmark's figures can be true: the ceiling, the overhead, a busy machine."""

from __future__ import annotations

from lora_drop_runtime.errors import LoraDropError
from lora_drop_runtime.plan.schedule import PERIODIC, StepKind

from .result import BenchResult

OVERHEAD_TARGET = 0.03
FOREIGN_LIMIT = 0.1  # cores that others keep busy during the run
BOUND_BY_BYTES = 0.5  # share of the machine's bandwidth above which a step's time is taken to go with its bytes
MEMORY_LIMIT = 0.8  # share of the machine's memory that all arms together should take


class MeasurementError(LoraDropError):
    """A figure that cannot be true: something was measured wrongly, or the equations do not hold here."""

    exit_code = 1


def judge(result: BenchResult) -> None:
    """Warnings about the machine, and the figures that cannot be true."""
    if result.foreign_cores is not None and result.foreign_cores > FOREIGN_LIMIT:
        result.warnings.append(
            f"Other processes kept {result.foreign_cores:.2f} cores busy while it was measured: the figures are noisy."
        )
    held = {one.bundle: one.pss for one in result.memory} | {row.name: row.pss for row in result.peer_rows}
    total, memory = sum(pss["total"] for pss in held.values() if pss), result.machine["memory_bytes"]
    if memory and total > MEMORY_LIMIT * memory:
        result.warnings.append(
            f"Bundles and peers held {total / 1e9:.1f} GB together, of {memory / 1e9:.1f}: weights may have been read "
            "from disk. Measure fewer at a time."
        )
    full = {
        (row.bundle, row.context, row.rows): row.steps[StepKind.REFRESH.value].bandwidth_share
        for row in result.rows
        if not row.k
    }
    for row in result.rows:
        kind = "" if row.schedule == PERIODIC else f"{row.schedule}, "
        what = f"{row.bundle} (ρ {row.rho:.2f}, {kind}k = {row.k}, context {row.context}, batch {row.rows})"
        if row.overhead_share > OVERHEAD_TARGET:
            result.warnings.append(
                f"{what}: {row.overhead_share:.1%} of a step is not the engine's, more than {OVERHEAD_TARGET:.0%}."
            )
        if row.operations_ceiling is not None and row.operations_ceiling < 1:
            result.warnings.append(
                f"{what}: a refresh of k + 1 tokens of each row is bound by arithmetic, and operations allow "
                f"{row.operations_ceiling:.2f}×: this policy cannot pay at that batch on this machine."
            )
        if row.above_ceiling:
            said = (
                f"{what}: {row.speedup:.3f}× is above the ceiling of {row.ceiling:.3f}× by more than the repeats "
                f"differ by, {row.noise:.3f}."
            )
            share = full.get((row.bundle, row.context, row.rows))
            if share is not None and share < BOUND_BY_BYTES:
                result.warnings.append(
                    f"{said} The full schedule reads at {share:.0%} of the machine's bandwidth: its time does not go "
                    "with its bytes here, and the ceiling bounds nothing."
                )
            else:
                result.problems.append(said)

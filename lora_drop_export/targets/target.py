"""The table of targets: what executes the step graphs.

A target is a folder here, one among the runtime's engines, a class in the manifest, and a row in `TARGETS`. Nobody else
asks which target it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Manifest, TargetEntry
from lora_drop_runtime.dtypes import short_name
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.console import Console
from lora_drop_export.quantize.formats import BlockFormat
from lora_drop_export.targets.openvino.target import OpenVinoTarget
from lora_drop_export.targets.ort.target import OrtTarget
from lora_drop_export.targets.trt.options import TrtOptions
from lora_drop_export.targets.trt.target import TensorRt, TensorRtRtx


@dataclass(frozen=True)
class Caches:
    """What a target is asked of K/V caches of 8 bits.

    Attributes:
        dtype: of their entries.
        head_dims: values of a head, of the layers.
        fills: LoRA steps write the caches of dropped attentions (`--policy fill`).
        convolves: layers with short convolutions have caches, too.
    """

    dtype: str
    head_dims: frozenset[int]
    fills: bool
    convolves: bool


@dataclass(frozen=True)
class TargetOptions(TrtOptions):
    """The options of all targets; each reads its own."""


class Target(Protocol):
    """A row of the table.

    Attributes:
        name: as users and bundles say it; its folder in a bundle.
        what: it runs, for `--help`.
        quantized_weights: of the manifest's QUANTIZED_DTYPES those that its graphs may have.
        quantized_dtypes: of activations beside them.
        symmetric_weights: quantized weights without zero points are the better ones for it.
        channel_weights: its graphs may have integers with one scale for a whole row.
        cache_dtypes: of K/V caches of 8 bits → those of activations beside which it takes them.
        scales_per_head: those caches have a scale for each head; else one for each channel is the better for it.
        recurs: it runs layers with a recurrent state, in float32.
    """

    name: str
    what: str
    quantized_weights: tuple[str, ...]
    quantized_dtypes: tuple[str, ...]
    symmetric_weights: bool
    channel_weights: bool
    cache_dtypes: Mapping[str, tuple[str, ...]]
    scales_per_head: bool
    recurs: bool

    def check(self, options: TargetOptions, targets: Sequence[str]) -> None:
        """Refuse, before anything long begins, options that it cannot build with, or that it alone has where it is not
        among the targets that are built."""

    def check_dtype(self, dtype: str, weights: str, options: TargetOptions) -> None:
        """Refuse, before the trace, a dtype of activations that what is installed here cannot run, or that does not go
        with the options; `weights` is theirs."""

    def takes_kept(self, form: BlockFormat) -> bool:
        """Whether its graphs may have weights that a quantized checkpoint holds in this format."""

    def check_caches(self, caches: Caches, options: TargetOptions) -> None:
        """Refuse, before the trace where that is known, 8-bit caches that do not go with the options or the model."""

    def check_experts(
        self,
        dtype: str,
        formats: Collection[tuple[BlockFormat | None, BlockFormat | None]],
        activations: Collection[str],
    ) -> None:
        """Refuse, before weights are read, mixtures of experts that it cannot run.

        Args:
            dtype: of activations.
            formats: of gate and up and of down of some layers; None where they are in float.
            activations: of their gates.
        """

    def dtype(self, of_checkpoint: str) -> str:
        """Of activations, where the user names none; `of_checkpoint` is that of most of the weights."""

    def build(
        self,
        root: Path,
        manifest: Manifest,
        graphs: Mapping[StepKind, Any],
        options: TargetOptions,
        console: Console,
        earlier: Bundle | None,
    ) -> TargetEntry:
        """Lower the neutral graphs, build what it runs into `root/name`, and say in the manifest what that is.

        Args:
            root: of the bundle that is being written; the graphs' weights are there.
            graphs: step → its neutral graph, an onnx.ModelProto; left as it was.
            earlier: the bundle to which the target is added, which may have an older build of it.
        """

    def provider(self, dtype: str) -> str | None:
        """What a verification runs it on, as `Session.open` has it."""

    def runs_on_cpu(self, entry: TargetEntry, dtype: str) -> bool:
        """Whether ONNX Runtime can run its graphs on the CPU where there is no device for it."""


# In the order in which they choose the dtype of a bundle for several
TARGETS: dict[str, Target] = {
    target.name: target for target in (OrtTarget(), OpenVinoTarget(), TensorRt(), TensorRtRtx())
}


def check_recurrent(targets: Sequence[str], dtype: str, kv_dtype: str | None) -> None:
    """Refuse what does not go with layers that have a recurrent state.

    Args:
        dtype: of activations.
        kv_dtype: of caches of 8 bits.

    Raises:
        InputError: it does not.
    """
    able = [name for name, target in TARGETS.items() if target.recurs]
    for name in targets:
        if not TARGETS[name].recurs:
            raise InputError(
                f"Target {name} does not run layers with a recurrent state.",
                note=f"The model's linear attention has one; {', '.join(able)} runs it.",
                hint=f"Use --target {' or '.join(able)}.",
            )
    if dtype != "float32":
        raise InputError(
            "Layers with a recurrent state are computed in float32.",
            note=f"Activations would be {dtype}; the model's linear attention has such a state.",
            hint="Use --dtype fp32, int8 or int4.",
        )
    if kv_dtype is not None:
        raise InputError(
            "A model with recurrent states has no caches of 8 bits.",
            note=f"--kv-dtype is {short_name(kv_dtype)}; its linear attention keeps the last tokens in float32.",
            hint="Leave --kv-dtype out.",
        )


def build_target(
    name: str,
    root: Path,
    manifest: Manifest,
    graphs: Mapping[StepKind, Any],
    options: TargetOptions,
    console: Console,
    earlier: Bundle | None = None,
) -> TargetEntry:
    """`Target.build`, into a folder that it makes."""
    (root / name).mkdir()
    return TARGETS[name].build(root, manifest, graphs, options, console, earlier)

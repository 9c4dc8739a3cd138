"""OpenVINO on the CPU as a target: lowers both steps into one graph over paged caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Manifest, OpenVinoEntry, TargetEntry
from lora_drop_runtime.engines.openvino.package import import_openvino
from lora_drop_runtime.errors import InputError, ModelError
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.console import Console
from lora_drop_export.quantize.formats import BlockFormat

DTYPES = ("float32", "bfloat16")  # of activations


class OpenVinoTarget:
    """The row `openvino` of the table; it has no options of its own."""

    name = "openvino"
    what = "OpenVINO on the CPU, with paged caches"
    quantized_weights: tuple[str, ...] = ("int4", "int8")
    quantized_dtypes: tuple[str, ...] = ("float32",)
    symmetric_weights = False
    channel_weights = True
    cache_dtypes: Mapping[str, tuple[str, ...]] = MappingProxyType({"int8": ("float32",)})
    scales_per_head = False
    recurs = True

    def check(self, options: object, targets: Sequence[str]) -> None:
        """Nothing of the options is its own; verification runs on OpenVINO."""
        if self.name in targets:
            import_openvino()

    def check_dtype(self, dtype: str, weights: str, options: object) -> None:
        if dtype not in DTYPES:
            raise InputError(
                "Target openvino does not compute in that dtype.",
                note=f"Activations would be {dtype}; it computes in {' or '.join(DTYPES)}.",
                hint="Use --dtype fp32, bf16, int8 or int4.",
            )

    def takes_kept(self, form: BlockFormat) -> bool:
        return not form.floating

    def check_caches(self, caches: Any, options: object) -> None:
        """Entries of 8 bits lie there in a form of OpenVINO's own, which its attention alone reads."""
        if caches.convolves:
            raise ModelError(
                f"Target {self.name} has no {caches.dtype} caches for short convolutions.",
                note="What they keep of a token is read beside the attention, which alone knows their form.",
                hint="Export without --kv-dtype, or use --target ort.",
            )

    def check_experts(self, dtype: str, formats: object, activations: object) -> None:
        """It takes all."""

    def dtype(self, of_checkpoint: str) -> str:
        return "float32"

    def build(
        self,
        root: Path,
        manifest: Manifest,
        graphs: Mapping[StepKind, Any],
        options: object,
        console: Console,
        earlier: Bundle | None,
    ) -> OpenVinoEntry:
        from .lower import openvino_from_neutral

        entry = OpenVinoEntry(steps=f"{self.name}/steps.onnx")
        with console.phase("lowering to OpenVINO"):
            neutral = graphs[StepKind.REFRESH], graphs[StepKind.LORA]
            steps = openvino_from_neutral(*neutral, manifest.plan, manifest.model.recurrence)
            (root / entry.steps).write_bytes(steps.SerializeToString())
        return entry

    def provider(self, dtype: str) -> str | None:
        return None

    def runs_on_cpu(self, entry: TargetEntry, dtype: str) -> bool:
        return False  # OpenVINO itself runs it there

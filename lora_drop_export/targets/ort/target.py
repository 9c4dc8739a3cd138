"""ONNX Runtime as a target: lowers both steps, into one graph for the CPU, into two for a GPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import NO_HEADS
from lora_drop_runtime.bundle.manifest import Manifest, ModelFacts, OrtEntry, TargetEntry
from lora_drop_runtime.dtypes import MODEL_DTYPES
from lora_drop_runtime.engines.ort.package import import_onnxruntime
from lora_drop_runtime.engines.ort.providers import check_version, takes_ragged_rows
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.console import Console
from lora_drop_export.quantize.formats import BlockFormat

from .expert_formats import check_activation, check_alike


def _say_of_caches(model: ModelFacts, refresh: Any, console: Console) -> None:
    """Where the CUDA provider has no fast kernel for int8 caches (its group_query_attention.cc, of 1.31)."""
    if model.kv_dtype is None or model.dtype == "float32":
        return
    softcap = any(one.name == "softcap" and one.f for node in refresh.graph.node for one in node.attribute)
    heads = set(model.heads) - {NO_HEADS}
    fast = all(one.head_dim in (64, 128, 256) and one.num_heads / one.kv_heads in (4, 8, 16, 32) for one in heads)
    if softcap or any(model.windows) or not fast:
        console.say(
            "ort: int8 caches save memory on a GPU, and each step turns them back into halves here: the fast kernel is "
            "for heads of 64, 128 or 256 with 4, 8, 16 or 32 query heads to a K/V head, without window and softcap"
        )


class OrtTarget:
    """The row `ort` of the table; it has no options of its own."""

    name = "ort"
    what = "ONNX Runtime (default)"
    quantized_weights: tuple[str, ...] = ("int4", "int8")
    quantized_dtypes: tuple[str, ...] = MODEL_DTYPES
    symmetric_weights = False
    channel_weights = False  # its operator wants blocks of a power of two
    cache_dtypes: Mapping[str, tuple[str, ...]] = MappingProxyType({"int8": MODEL_DTYPES})
    scales_per_head = False
    recurs = True

    def check(self, options: object, targets: Sequence[str]) -> None:
        """Nothing of the options is its own; lowering computes with ONNX Runtime, and verification runs on it."""
        if self.name in targets:
            import_onnxruntime()

    def check_dtype(self, dtype: str, weights: str, options: object) -> None:
        check_version(import_onnxruntime().__version__, dtype)

    def takes_kept(self, form: BlockFormat) -> bool:
        return not form.floating

    def check_caches(self, caches: object, options: object) -> None:
        """It takes them with any model and policy."""

    def check_experts(
        self,
        dtype: str,
        formats: Collection[tuple[BlockFormat | None, BlockFormat | None]],
        activations: Collection[str],
    ) -> None:
        """Its operators take them in float32, or all in blocks of one kind, with gates of SiLU."""
        if dtype != "float32":
            is_float = all(form is None for pair in formats for form in pair)
            raise ModelError(
                "Target ort does not run experts in half precision.",
                note=f"Activations would be {dtype}; the model is a mixture of experts.",
                hint="Use --dtype fp32, int8 or int4; or --target openvino, which takes bf16, too."
                if is_float
                else "Leave --activation-dtype out.",
            )
        for activation in activations:
            check_activation(activation)
        for up, down in formats:
            check_alike(up, down)

    def dtype(self, of_checkpoint: str) -> str:
        return "float32"  # the one dtype that the CPU computes in

    def build(
        self,
        root: Path,
        manifest: Manifest,
        graphs: Mapping[StepKind, Any],
        options: object,
        console: Console,
        earlier: Bundle | None,
    ) -> OrtEntry:
        from lora_drop_export.graphs.weight_inputs import write_table

        from .lower import halves_from_neutral, ort_from_neutral

        _say_of_caches(manifest.model, graphs[StepKind.REFRESH], console)
        positions = manifest.limits.max_seq_len
        with console.phase("lowering to ONNX Runtime"):
            if takes_ragged_rows(manifest.model.dtype):
                file = f"{self.name}/steps.onnx"
                joined = ort_from_neutral(graphs[StepKind.REFRESH], graphs[StepKind.LORA], positions, ragged=True)
                (root / file).write_bytes(joined.SerializeToString())
                return OrtEntry(steps=file)
            lowered, weights = halves_from_neutral(graphs, positions)
            files, table = {kind: f"{self.name}/{kind.value}.onnx" for kind in lowered}, f"{self.name}/weights.json"
            for kind, proto in lowered.items():
                (root / files[kind]).write_bytes(proto.SerializeToString())
            write_table(root / table, weights)
        return OrtEntry(graphs={kind.value: file for kind, file in files.items()}, weights=table)

    def provider(self, dtype: str) -> str | None:
        return None if dtype == "float32" else "cuda"

    def runs_on_cpu(self, entry: TargetEntry, dtype: str) -> bool:
        return dtype != "bfloat16"

"""Which experts ONNX Runtime's operators run: asked before weights are rounded, and again of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_drop_runtime.errors import ModelError

from lora_drop_export.decoder.gates import SILU

if TYPE_CHECKING:
    from lora_drop_export.graphs.match import QuantizedBlocks
    from lora_drop_export.quantize.formats import BlockFormat

    _Blocks = BlockFormat | QuantizedBlocks


def check_activation(activation: str) -> None:
    """Refuse a gate that the operators on a CPU do not have. Raises ModelError."""
    if activation != SILU:
        raise ModelError(
            "Target ort does not run experts whose gate is GELU.",
            note=f"This model's is {activation}; ONNX Runtime's operators for a CPU have SiLU.",
            hint="Use --target openvino.",
        )


def check_alike(up: _Blocks | None, down: _Blocks | None) -> None:
    """Refuse matrices of experts in two formats: an operator has one for both. Raises ModelError."""
    kinds = [None if one is None else (one.bits, one.block_size) for one in (up, down)]
    if kinds[0] != kinds[1]:
        said = ["float" if one is None else f"{one[0]} bits in blocks of {one[1]}" for one in kinds]
        raise ModelError(
            "Target ort does not run experts whose matrices differ in their format.",
            note=f"Gate and up are in {said[0]}, down is in {said[1]}.",
            hint="Use --target openvino, or another checkpoint of the model.",
        )

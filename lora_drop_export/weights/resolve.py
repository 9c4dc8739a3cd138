"""Parameter names of a model → tensors of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_drop_runtime.dtypes import MODEL_DTYPES
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.checkpoint.experts import find_experts, made_of


def find_tensor(
    checkpoint: Checkpoint, name: str, others: Iterable[str] = (), experts: int | None = None
) -> TensorSource | None:
    """The checkpoint's tensor of a parameter or buffer, under its name or another one; None where there is none.

    Args:
        experts: how many matrices the parameter has, where they may be of experts.
    """
    for candidate in (name, *others):
        for spelling in (candidate, candidate.partition(".")[2], f"model.{candidate}"):
            found = checkpoint.tensors.get(checkpoint.renamed.get(spelling, spelling))
            if found is None:
                found = find_experts(checkpoint, spelling, experts)
            if found is not None:
                return found
    return None


def resolve_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> dict[str, TensorSource]:
    """For each parameter of the traced model, the checkpoint tensor that holds it.

    Raises:
        ModelError: a parameter is not in the checkpoint, or has another shape there.
    """
    partners: dict[str, list[str]] = {}
    for name, first in tied.items():
        partners.setdefault(name, []).append(first)
        partners.setdefault(first, []).append(name)
    refs = {}
    for name, shape in shapes.items():
        ref = find_tensor(checkpoint, name, partners.get(name, []), shape[0] if len(shape) == 3 else None)
        if ref is None or ref.shape != shape:
            raise ModelError(
                "The checkpoint does not hold the model that its config describes.",
                note=f"Parameter {name} {shape} is " + ("missing." if ref is None else f"{ref.shape} there."),
                hint="Fused checkpoints must be converted to plain tensors first.",
            )
        other = next((one for one in made_of(ref) if one.dtype not in MODEL_DTYPES), None)
        if other is not None:
            raise ModelError(
                "The checkpoint holds a weight in a dtype that is not taken.",
                note=f"{name if other is ref else other.name} is {other.dtype}; taken are {', '.join(MODEL_DTYPES)}.",
                hint="Convert it to one of these; if it is quantized, use the unquantized checkpoint.",
            )
        refs[name] = ref
    return refs

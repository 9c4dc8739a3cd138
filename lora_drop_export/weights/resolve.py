"""Parameter names of a model → tensors of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_drop_runtime.dtypes import MODEL_DTYPES
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.checkpoint.experts import find_experts, made_of, stored_name
from lora_drop_export.checkpoint.foreign import CHECKPOINT_HINT
from lora_drop_export.checkpoint.joined import JoinedRows, find_joined, missing_of_joined
from lora_drop_export.checkpoint.renamed import missing_of_experts
from lora_drop_export.checkpoint.text_part import own_names


def _spellings(name: str) -> tuple[str, ...]:
    return name, name.partition(".")[2], f"model.{name}"


def find_tensor(
    checkpoint: Checkpoint, name: str, others: Iterable[str] = (), experts: int | None = None
) -> TensorSource | None:
    """The checkpoint's tensor of a parameter or buffer, under its name or another one; None where there is none.

    Args:
        experts: how many matrices the parameter has, where they may be of experts.
    """
    for candidate in (name, *others):
        for spelling in _spellings(candidate):
            found = checkpoint.tensors.get(checkpoint.renamed.get(spelling, spelling))
            if found is None:
                found = find_experts(checkpoint, spelling, experts) or find_joined(checkpoint, spelling)
            if found is not None:
                return found
    return None


def _unfit(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], name: str, ref: TensorSource | None
) -> ModelError:
    """Of a parameter that is not in the checkpoint, or has another shape there."""
    wanted = f"{name} {shapes[name]}"
    hint = "Check that the config is that of these weights, or download the checkpoint again."
    if ref is not None:
        note = f"Parameter {wanted} is {ref.shape} there."
    else:
        note, own = f"Parameter {wanted} is missing.", own_names(checkpoint.tensors)
        names = {*own, *checkpoint.tensors} - set(own.values())
        stored = [stored_name(checkpoint, each) for each in _spellings(name)]
        lacking = [one for each in stored for one in missing_of_experts(names, checkpoint.config, each)]
        lacking += [one for each in _spellings(name) for one in missing_of_joined(checkpoint, each)]
        known = {checkpoint.renamed.get(one, one) for each in shapes for one in _spellings(each)}
        modules = {one.rsplit(".", 2)[0] for one in _spellings(name) if one.count(".") > 1}
        beside = sorted(one for one in checkpoint.tensors if one not in known and one.rsplit(".", 2)[0] in modules)
        if lacking:
            more = f" and {len(lacking) - 1} more are" if lacking[1:] else " is"
            note, hint = f"Of parameter {wanted} {lacking[0]}{more} missing.", CHECKPOINT_HINT
        elif beside:
            other = f"{beside[0]} {checkpoint.tensors[beside[0]].shape}"
            note = f"{note[:-1]}; beside it is {other}, which the model has not."
            hint = "Convert fused or renamed tensors to the names and shapes of transformers' own first."
    return ModelError("The checkpoint does not hold the model that its config describes.", note=note, hint=hint)


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
            raise _unfit(checkpoint, shapes, name, ref)
        apart = ref.parts if isinstance(ref, JoinedRows) else made_of(ref)
        other = next((one for one in apart if one.dtype not in MODEL_DTYPES), None)
        if other is not None:
            raise ModelError(
                "The checkpoint holds a weight in a dtype that is not taken.",
                note=f"{name if other is ref else other.name} is {other.dtype}; taken are {', '.join(MODEL_DTYPES)}.",
                hint="Convert it to one of these; if it is quantized, use the unquantized checkpoint.",
            )
        refs[name] = ref
    return refs

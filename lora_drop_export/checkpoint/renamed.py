"""Names that transformers gives a checkpoint's tensors when it loads them, where they are others than the file's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from lora_drop_runtime.errors import ModelError

from .experts import TURNED
from .foreign import CHECKPOINT_HINT


def _conversions(config: Any) -> list[Any]:
    """What transformers does to the tensors of this kind of model when it loads them, in its order."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    kinds = (*([model_class] if isinstance(model_class, str) else []), config.model_type, "legacy")
    if config.model_type in TURNED:  # of GGUF files: they have the experts apart as others do
        kinds = (*kinds, "qwen2_moe")
    return [step for kind in kinds for step in get_checkpoint_conversion_mapping(kind) or ()]


def renamed_tensors(names: Iterable[str], config: Any) -> dict[str, str]:
    """The model's name → the checkpoint's, of each tensor that transformers renames for this kind of model.

    Only renaming is looked at: a tensor that transformers would also cut or join does not fit the model's shapes.
    """
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [step for step in _conversions(config) if isinstance(step, WeightRenaming)]
    stored = set(names)
    renamed = {rename_source_key(name, renamings, [])[0]: name for name in sorted(stored)}
    return {new: old for new, old in renamed.items() if new not in stored}


def _matrices_of_experts(names: Iterable[str], config: Any) -> dict[str, dict[int, dict[int, str]]]:
    """The model's name → expert → place → the checkpoint's name, of matrices that transformers makes one tensor of: all
    experts one below the other, and of each expert gate above up.

    Raises:
        ModelError: a matrix is there twice, so that nothing says which one counts.
    """
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    steps = _conversions(config)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    joins = [
        step
        for step in steps
        if isinstance(step, WeightConverter)
        and [type(one) for one in step.operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
        and [one.dim for one in step.operations] in ([0], [0, 1])
    ]
    found: dict[str, dict[int, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    stored = set(names)
    for name in sorted(stored):
        number = re.search(r"\.experts\.(\d+)\.", name)
        if number is None:
            continue
        for step in joins:
            new, pattern = rename_source_key(name, renamings, [step])
            if pattern is not None:
                expert, part = found[new][int(number[1])], step.source_patterns.index(pattern)
                other = new if new in stored else expert.get(part)
                if other not in (None, name):  # a step may be there twice
                    raise ModelError(
                        "The checkpoint holds a matrix of an expert twice.",
                        note=f"{other} and {name} are the same one.",
                        hint=CHECKPOINT_HINT,
                    )
                expert[part] = name
    return {name: dict(experts) for name, experts in found.items()}


def joined_experts(names: Iterable[str], config: Any) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The model's name → the checkpoint's names of each expert's matrices, where transformers makes one tensor of those
    of all experts, and none of them is missing.

    Raises:
        ModelError: a matrix is there twice, so that nothing says which one counts.
    """
    return {
        name: tuple(tuple(one[part] for part in sorted(one)) for _, one in sorted(experts.items()))
        for name, experts in _matrices_of_experts(names, config).items()
        if sorted(experts) == [*range(len(experts))] and len({tuple(sorted(one)) for one in experts.values()}) == 1
    }


def missing_of_experts(names: Iterable[str], config: Any, parameter: str) -> list[str]:
    """What the checkpoint would call the matrices that it lacks of a parameter of which it has others."""
    experts = _matrices_of_experts(names, config).get(parameter, {})
    known = {place: name for one in experts.values() for place, name in one.items()}
    return [
        re.sub(r"\.experts\.\d+\.", f".experts.{number}.", known[place])
        for number in range(max(experts, default=-1) + 1)
        for place in sorted(known)
        if place not in experts.get(number, {})
    ]

"""Names that transformers gives a checkpoint's tensors when it loads them, where they are others than the file's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def renamed_tensors(names: Iterable[str], config: Any) -> dict[str, str]:
    """The model's name → the checkpoint's, of each tensor that transformers renames for this kind of model.

    Only renaming is looked at: a tensor that transformers would also cut or join does not fit the model's shapes.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    kinds = (*([model_class] if isinstance(model_class, str) else []), config.model_type, "legacy")
    found = [step for kind in kinds for step in get_checkpoint_conversion_mapping(kind) or ()]
    renamings = [step for step in found if isinstance(step, WeightRenaming)]
    stored = set(names)
    renamed = {rename_source_key(name, renamings, [])[0]: name for name in sorted(stored)}
    return {new: old for new, old in renamed.items() if new not in stored}

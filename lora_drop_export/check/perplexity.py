"""What quantization costs: perplexity on the sample text before and after."""

from __future__ import annotations

import functools

from lora_drop_runtime.bundle.bundle import Bundle

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.console import Console

from .reference import Reference
from .sample import PERPLEXITY_TOKENS, sample_ids


def report_perplexity(bundle: Bundle, checkpoint: Checkpoint, *, console: Console) -> dict[str, float] | None:
    """What quantization costs: perplexity on the sample text, all layers in full, before and after.

    Args:
        checkpoint: the weights that the bundle's were made from.

    Returns:
        `tokens`, and the perplexity as `float` and under the name of the weights' dtype; None where there is no
        tokenizer to measure with.
    """
    manifest = bundle.manifest
    ids = sample_ids(bundle.root, manifest.model.vocab_size)
    if ids is None:
        console.say("perplexity of the quantized weights: not measured, the model brings no tokenizer")
        return None
    ids = ids[: min(PERPLEXITY_TOKENS, manifest.model.context_length)]
    if len(ids) < 2:
        console.say("perplexity of the quantized weights: not measured, the sample text has no tokens of the model")
        return None
    stored = open_checkpoint(
        str(bundle.root / "weights"), bundle.root / "scratch", trust_remote_code=checkpoint.trust_remote_code
    )
    found = []
    for what, source in (("checkpoint", checkpoint), ("bundle", stored)):  # the bundle's as its engine computes
        with console.progress(f"perplexity of the {what}") as progress:
            reference = Reference(source, manifest.plan, {}, round_activations=True)
            found.append(reference.perplexity(ids, functools.partial(progress, f"perplexity of the {what}")))
    before, after = found
    dtype, change = manifest.model.weight_dtype, 100 * (after / before - 1)
    console.say(f"perplexity on {len(ids)} tokens: float {before:.2f} → {dtype} {after:.2f} ({change:+.1f} %)")
    return {"tokens": len(ids), "float": before, dtype: after}

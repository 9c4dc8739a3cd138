"""Calibrated rounding on the way of an export: which text, how it is shown, what is said of it."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_drop_export.check.calibration_text import calibration_windows
from lora_drop_export.check.gptq import round_model
from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.console import Console
from lora_drop_export.decoder.trace import TracedModel
from lora_drop_export.quantize.formats import BlockFormat
from lora_drop_export.quantize.rounding import has_native


@contextlib.contextmanager
def calibrated(
    refs: Mapping[str, TensorSource],
    formats: Mapping[str, BlockFormat],
    checkpoint: Checkpoint,
    traced: TracedModel,
    root: Path,
    context: int,
    text: Path | None,
    console: Console,
) -> Iterator[dict[str, TensorSource]]:
    """`refs` with the weights of linear layers rounded by a text; of a tied one under all of its names.

    What was found lies in `root` until the context ends. Weights that are left to `search` are named on the console.

    Args:
        refs: parameter name → tensor of the checkpoint.
        formats: of those that are quantized.
        root: of the bundle, whose tokenizer is there already.
        context: tokens that the model can see.
        text: the bundled one when None.

    Raises:
        InputError: the text cannot be used, or a weight is infinite or not a number.
    """
    windows, of_what = calibration_windows(root, traced.vocab_size, context, text)
    what = "rounding by the inputs"
    console.say(f"gptq: calibrated on {windows.size} tokens of {of_what}")
    with tempfile.TemporaryDirectory(prefix="rounded-", dir=root) as scratch:
        with console.progress(what) as progress:
            found = round_model(checkpoint, refs, formats, windows, Path(scratch), functools.partial(progress, what))
        rounded = {tensor.name: tensor for tensor in found.values()}
        left = [
            name
            for name, form in formats.items()
            if refs[name].name not in rounded and name not in traced.embedding_only and not has_native(refs[name], form)
        ]
        for name, count in Counter(re.sub(r"\.\d+\.", ".*.", name) for name in left).items():
            console.say(f"rounded by search, the calibration has no inputs of it: {name} ({count})")
        yield {name: rounded.get(ref.name, ref) for name, ref in refs.items()}

"""What quantization costs: the checkpoint in PyTorch and the bundle in its engine on one text."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.paged_slots import slots_for
from lora_drop_runtime.decoding.slots import Run
from lora_drop_runtime.dtypes import short_name
from lora_drop_runtime.engines.engine import Engine
from lora_drop_runtime.engines.open import open_engine
from lora_drop_runtime.errors import NoDeviceError, VerificationError
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.console import Console, Progress

from .reference import Reference
from .runners import execution
from .sample import PERPLEXITY_TOKENS, sample_ids

_CHUNK = 128  # tokens of a run, so that their logits take little memory


def _nats(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> float:
    """Negative log likelihood of each row's token, summed; of logits [n, V], which are overwritten, and tokens [n]."""
    with np.errstate(invalid="ignore"):  # the caller looks for NaN
        logits -= logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(tokens)), tokens]
    np.exp(logits, out=logits)
    return float((np.log(logits.sum(axis=1, dtype=np.float64)) - own).sum())


def logits_of_window(engine: Engine, bundle: Bundle, ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
    """Logits of each token of ids [T] but the first, by refreshes over some tokens each: [n, V] valid until the next
    ones, T − 1 rows in all."""
    needed = engine.slots({"slots_kept": len(ids), "slots_dropped": len(ids)})
    chunk = min(_CHUNK, engine.prefill_chunk or _CHUNK)
    slots = slots_for(bundle, engine, 1, needed, several=False, chunk=chunk)
    slots.admit(0, needed, None)
    for begin in range(0, len(ids) - 1, chunk):
        run = Run(StepKind.REFRESH, ids[begin : begin + chunk].tolist(), begin, begin, each=True)
        slots.run(StepKind.REFRESH, [run], (0,), once=True)
        yield slots.logits()[0, : len(ids) - 1 - begin]


def _window(
    engine: Engine, bundle: Bundle, ids: npt.NDArray[np.int64], progress: Progress
) -> tuple[float, list[npt.NDArray[np.int64]]]:
    """Of ids [T] the negative log likelihood of each token but the first, summed; the most likely tokens there."""
    nats, likeliest, done = 0.0, [], 0
    for logits in logits_of_window(engine, bundle, ids):
        following = ids[done + 1 : done + 1 + len(logits)]
        likeliest.append(logits.argmax(axis=1))
        nats += _nats(logits, following)
        done += len(logits)
        progress("perplexity of the bundle", done, len(ids) - 1)
    return nats, likeliest


def engine_on_text(
    bundle: Bundle,
    target: str,
    provider: str | None,
    threads: int | None,
    ids: npt.NDArray[np.int64],
    progress: Progress,
) -> tuple[float, npt.NDArray[np.int64]]:
    """A text with all layers in full: perplexity and most likely tokens, as `Reference.on_text` has them.

    Args:
        target, provider, threads: what runs the bundle, as `Session.open` has it.
        ids: int64 [B, T], windows of a text.

    Raises:
        NoDeviceError: this machine has no device for the target.
        VerificationError: the engine cannot execute the bundle, or the perplexity is not finite.
    """
    with execution(target):
        engine = open_engine(bundle, target, provider, threads)
        try:
            windows = [_window(engine, bundle, row, progress) for row in ids]
        finally:
            engine.close()
    nats = sum(found for found, _ in windows)
    with np.errstate(over="ignore", invalid="ignore"):
        perplexity = float(np.exp(nats / (len(ids) * (ids.shape[1] - 1))))
    if not np.isfinite(perplexity):
        raise VerificationError(
            "The bundle computes logits that are not numbers, or far from the text.",
            note=f"Its perplexity on {ids.size} tokens of a sample text is {perplexity}, target {target}.",
            hint="This is a bug, or a checkpoint with damaged weights; --dtype fp32 shows which.",
        )
    return perplexity, np.concatenate([part for _, parts in windows for part in parts])


def report_perplexity(
    bundle: Bundle,
    checkpoint: Checkpoint,
    target: str,
    *,
    provider: str | None,
    console: Console,
    threads: int | None = None,
) -> dict[str, float] | None:
    """What quantization costs: perplexity on the sample text, all layers in full, before and after, and in how many
    places the most likely token is another. Perplexity alone may fall where the weights only make the model less sure.

    Args:
        checkpoint: the weights that the bundle's were made from; they run in PyTorch, the bundle in its engine.
        target, provider: what runs the bundle, as `Session.open` has it.

    Returns:
        `tokens`, the perplexity as `float` and under the name of the weights' dtype, and `agreement`, the share of the
        places where both have the same most likely token; None where there is no tokenizer to measure with, or this
        machine cannot execute the target.

    Raises:
        VerificationError: the engine cannot execute the bundle, or a perplexity is not finite.
    """
    manifest = bundle.manifest

    def not_measured(why: str) -> None:
        console.say(f"perplexity of the quantized weights: not measured, {why}")

    ids = sample_ids(bundle.root, manifest.model.vocab_size)
    if ids is None:
        not_measured("the model brings no tokenizer")
        return None
    ids = ids[: min(PERPLEXITY_TOKENS, manifest.limits.max_seq_len)]
    if len(ids) < 2:
        not_measured("the sample text has no tokens of the model")
        return None
    try:
        with console.progress("perplexity of the bundle") as progress:
            after, ours = engine_on_text(bundle, target, provider, threads, ids[None], progress)
    except NoDeviceError as error:
        not_measured(f"{target} was not run on this machine: {error.note}")
        return None
    what = "perplexity of the checkpoint"
    with console.progress(what) as progress:
        before, theirs = Reference(checkpoint, manifest.plan, {}).on_text(ids, functools.partial(progress, what))
    dtype, change = manifest.model.weight_dtype, 100 * (after / before - 1)
    both = f"float {before:.2f} in PyTorch → {short_name(dtype)} {after:.2f} in {target}"
    agreement = float((ours == theirs).mean())
    same = f"the most likely token is float's in {100 * agreement:.1f} %"
    console.say(f"perplexity on {len(ids)} tokens: {both} ({change:+.1f} %); {same}")
    return {"tokens": len(ids), "float": before, dtype: after, "agreement": agreement}

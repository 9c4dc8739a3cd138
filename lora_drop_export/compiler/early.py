"""What is refused before the model is traced: all that options, config.json and the headers of files tell.

Enters: options, then a checkpoint. Leaves: nothing, or an error; warnings are printed. Trace and weights
of a large model take minutes. What only the trace tells is checked again after it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.adapters import read_adapters
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import MOST_PENDING
from lora_drop_runtime.bundle.manifest import CHANNEL, INTEGER_DTYPES, VERIFY_NAME, too_many_lora_steps
from lora_drop_runtime.dtypes import MODEL_DTYPES, short_name
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.files import is_utf8
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.checkpoint.drop_list import check_drop_list
from lora_drop_export.checkpoint.experts import ExpertRows
from lora_drop_export.checkpoint.joined import JoinedRows
from lora_drop_export.checkpoint.packed import Kept
from lora_drop_export.console import Console
from lora_drop_export.decoder.anatomy import kv_sources
from lora_drop_export.decoder.context import (
    CONVOLUTION,
    RECURRENT,
    convolution_window,
    is_recurrent,
    recurrence_window,
    window_within,
)
from lora_drop_export.decoder.refusals import refuse_by_config
from lora_drop_export.quantize.choice import Quantization, block_formats
from lora_drop_export.quantize.formats import FLOAT8, BlockFormat
from lora_drop_export.quantize.rounding import has_native
from lora_drop_export.targets.target import TARGETS, Caches, check_recurrent
from lora_drop_export.weights.store import check_linkable, weights_bytes

from .facts import (
    head_formats,
    is_of_a_layer,
    kept_formats,
    kept_quantization,
    kept_weights,
    make_limits,
    make_plan,
    native_formats,
    quantization_of,
)
from .files import check_disk
from .forms import check_device, forms_of
from .options import AUTO, NO_TARGET, ExportOptions, quantized_shorts


def check_names(model: str, out: Path) -> None:
    """Refuse places whose names the tokenizer's library cannot take. Raises InputError."""
    for option, place in (("--model", model), ("--out", out)):
        path = os.path.abspath(place)
        if (locale := sys.getfilesystemencoding()) != "utf-8" and os.fsdecode(path.encode(errors="replace")) != path:
            raise InputError(
                f"The path at {option} is not read as UTF-8.",
                note=f"It is {path!a:.300} in the locale's {locale}; tokenizers take their paths as UTF-8.",
                hint="Set PYTHONUTF8=1 or a locale of UTF-8, or choose another.",
            )
        if not is_utf8(path):
            raise InputError(
                f"The path at {option} is not UTF-8.",
                note=f"It is {path!a:.300}, in which tokenizers cannot be read or written.",
                hint="Rename what it names, or choose another.",
            )


def windows_of_config(config: Any) -> tuple[int, ...] | None:
    """The sliding window of each layer, 0 for none, as far as a config tells; None where it does not say its layers.

    transformers has two ways to say it: `layer_types` for each layer, or one `sliding_window` for all. GPT-Neo has a
    third.
    """
    layers, size = getattr(config, "num_hidden_layers", None), getattr(config, "sliding_window", None)
    if type(layers) is not int or layers < 1:
        return None
    used = type(size) is int and size > 0 and getattr(config, "use_sliding_window", None) is not False
    size = window_within(config, size) if used else 0
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if isinstance(types, list | tuple) and len(types) == layers:
        local = window_within(config, getattr(config, "window_size", None))
        sizes = {"sliding_attention": size, "local": local, CONVOLUTION: convolution_window(config)}
        sizes |= dict.fromkeys(RECURRENT, recurrence_window(config))
        return tuple(sizes.get(kind, 0) for kind in types)
    # Code that a model brings may mean something else by it
    return (size if type(config).__module__.startswith("transformers.") else 0,) * layers


def _head_dims(config: Any, width: int) -> frozenset[int]:
    """Values of a head's caches in each layer; where layers differ transformers gives them by a layer's own config.

    In latent attention `head_dim` is that part of a key which RoPE turns.
    """

    def width_of(layer: Any) -> int:
        key = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
        key = key or width // (getattr(layer, "num_attention_heads", None) or 1)
        return max(key, getattr(layer, "v_head_dim", None) or 0)

    return frozenset(width_of(layer) for layer in getattr(config, "per_layer_config", (config,)))


def _check_calibration(
    refs: Mapping[str, TensorSource], formats: Mapping[str, BlockFormat], options: ExportOptions
) -> None:
    """Refuse to round what has its integers already."""
    layers = [name for name in formats if is_of_a_layer(name)]
    if (
        options.calibrated
        and options.block_size != AUTO
        and layers
        and all(has_native(refs[name], formats[name]) for name in layers)
    ):
        raise InputError(
            "There is nothing to round by a text.",
            note=f"The checkpoint's layers have int{formats[layers[0]].bits} blocks of "
            f"{formats[layers[0]].block_size} already, which are taken as they are.",
            hint="Leave --quantization out, or take a checkpoint in float.",
        )


def _check_disk(checkpoint: Checkpoint, dtype: str, options: ExportOptions, root: Path) -> None:
    """As if every tensor were used, and every matrix quantized where that was asked for."""
    refs = {name: ref for name, ref in checkpoint.tensors.items() if ref.dtype in MODEL_DTYPES}
    shapes = {name: ref.shape for name, ref in refs.items() if len(ref.shape) == 2}
    vocab_size = getattr(checkpoint.config, "vocab_size", 0)
    given = head_formats(shapes, vocab_size, options) | kept_formats(refs)
    formats = block_formats(shapes, native_formats(refs), (), options.weights_format, given)
    _check_calibration(refs, formats, options)
    matrices = [ref for ref in refs.values() if len(ref.shape) > 1]  # a float32 table of RoPE may lie beside them
    quantization = quantization_of(refs, options)
    stored = quantization.dtype if quantization else dtype
    check_linkable(matrices, root, stored, options.weights, owned=checkpoint.owned, quantized=bool(quantization))
    needed = weights_bytes(refs, dtype, options.weights, owned=checkpoint.owned, formats=formats)
    bundles = len(forms_of(options)) if options.block_size == AUTO else 0  # that lie side by side to be timed
    check_disk(root, needed * max(bundles, 2 if options.calibrated else 1))


def _warn_of_plan(plan: DropPlan, console: Console) -> None:
    """Say so when no layer is dropped."""
    if plan.sites:
        return
    windowed = (
        f", {len(plan.windowed_layers)} have a sliding window, a short convolution or a recurrent state"
        if plan.windowed_layers
        else ""
    )
    sources = f", other layers take the K and V of {len(plan.kv_sources)}" if plan.kv_sources else ""
    console.say(
        f"warning: no layer is dropped: of {plan.num_layers} the first {plan.always_first} and the last "
        f"{plan.always_last} are always kept{windowed}{sources}. Every step will run the whole model"
    )


_LAYER = re.compile(r"\b(?:layers|h|blocks)\.(\d+)\.")


def warn_of_tensors(checkpoint: Checkpoint, taken: Mapping[str, TensorSource], layers: int, console: Console) -> None:
    """Say so when the model's layers have no place for weights or biases of the checkpoint: its config is of another
    model, such as one without biases. transformers leaves them out as well, and so does the verification."""
    used = set(map(id, taken.values()))
    used |= {id(tensor) for ref in taken.values() if isinstance(ref, ExpertRows) for tensor in ref.tensors}
    used |= {id(tensor) for ref in taken.values() if isinstance(ref, JoinedRows) for tensor in ref.parts}
    left = [
        name
        for name, tensor in checkpoint.tensors.items()
        if id(tensor) not in used and name.endswith((".weight", ".bias")) and 0 < len(tensor.shape) <= 2
        if (match := _LAYER.search(name)) and int(match[1]) < layers
    ]
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        console.say(f"warning: by its config the model has no {min(left)}{more}: what the checkpoint has is left out")


def warn_of_layers(checkpoint: Checkpoint, layers: int, console: Console) -> None:
    """Say so when the checkpoint holds layers that its config does not tell of, such as those that predict further."""
    found = (_LAYER.search(name) for name in checkpoint.tensors)
    count = 1 + max((int(match[1]) for match in found if match), default=-1)
    if count > layers:
        console.say(
            f"warning: the checkpoint holds {count} layers and config.json says {layers}: the others are left out"
        )


def check_bundle(bundle: Bundle, console: Console) -> None:
    """Refuse a bundle whose files have changed, and say what becomes of its weights.

    Raises:
        BundleError: they have.
    """
    bundle.check_unchanged((VERIFY_NAME, *(f"{target}/" for target in bundle.manifest.targets)))
    if how := bundle.manifest.quantization:
        held = short_name(bundle.manifest.model.weight_dtype)
        console.say(f"the bundle's weights are taken as they are ({held}, {how['method']})")


def _refuse_rounding(checkpoint: Checkpoint, kept: Quantization, options: ExportOptions) -> None:
    """Refuse what would round a quantized bundle's weights again, or those that it has in float."""
    in_float = any(one["block_size"] is None for one in checkpoint.quantization.get("departures", ()))
    asked = {
        "--dtype": options.dtype not in (None, "float32", *(() if in_float else (kept.dtype,))),
        "--block-size": options.block_size is not None,
        "--quantization": options.quantization is not None,
        "--symmetric": options.symmetric,
        "--head-dtype": options.head_dtype is not None,
    }
    if any(asked.values()):
        raise InputError(
            "The weights of a bundle stay as they are.",
            note=f"It has {short_name(kept.dtype)} weights ({kept.method}); given is "
            f"{', '.join(filter(asked.get, asked))}.",
            hint="Leave that out, or export the model again. For a GPU use --activation-dtype fp16 or bf16.",
        )


def check_kept(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Refuse what a quantized checkpoint, whose integers are stored as they are, does not allow.

    Raises:
        InputError: a target takes no quantized weights, or the options are for float ones.
    """
    kept = kept_quantization(checkpoint.tensors)
    if kept is None:
        if options.activation_dtype is not None and options.dtype is None:
            raise InputError(
                "--activation-dtype applies only to quantized weights.",
                note=f"It is {options.activation_dtype}; {checkpoint.name} is in float and --dtype is not given.",
                hint=f"Leave it out, or add --dtype {quantized_shorts()}.",
            )
        return
    weights = str(short_name(kept.dtype))
    packed = list(kept_weights(checkpoint.tensors).values())
    by_channel = kept.block_size == CHANNEL

    def takes(name: str, ref: Kept) -> bool:
        return TARGETS[name].takes_kept(ref.native) and (TARGETS[name].channel_weights or not by_channel)

    for target in (name for name in options.targets if name != NO_TARGET):
        other = next((ref for ref in packed if not takes(target, ref)), None)
        if other is not None:
            points = "no zero points" if other.native.symmetric else "zero points"
            blocks = "rows" if by_channel else "blocks"
            held = "fp8 values" if other.native.floating else f"int{other.native.bits} {blocks} with {points}"
            able = [name for name in TARGETS if all(takes(name, ref) for ref in packed)]
            raise InputError(
                "The target cannot take the checkpoint's weights as they are.",
                note=f"{other.name} of {checkpoint.name} has {held}; {target} was asked for.",
                hint=f"Use --target {' or '.join(able)}, or the model's float checkpoint.",
            )
    if checkpoint.bundle is not None:
        _refuse_rounding(checkpoint, kept, options)
    alike = (kept.dtype,) if kept.dtype == FLOAT8 else INTEGER_DTYPES  # what the rest may be
    if options.dtype not in (None, "float32", *alike):
        raise InputError(
            "The weights of a quantized checkpoint stay as they are.",
            note=f"{checkpoint.name} has {weights} weights; --dtype is {short_name(options.dtype)}.",
            hint=f"Leave --dtype out; {' or '.join(str(short_name(each)) for each in reversed(alike))} quantizes the "
            "rest too, the embedding and the head. For a GPU add --activation-dtype fp16 or bf16.",
        )


def check_before_trace(
    checkpoint: Checkpoint, dtype: str, options: ExportOptions, root: Path, console: Console
) -> None:
    """Refuse what will not fit the model.

    Args:
        dtype: of activations.
        root: of the bundle that is being written.

    Raises:
        InputError, PlanError, ModelError, BundleError: it does not.
    """
    quantized = quantization_of(checkpoint.tensors, options)
    for target in options.targets:
        if target != NO_TARGET:
            TARGETS[target].check_dtype(dtype, quantized.dtype if quantized else dtype, options)
    if options.block_size == AUTO:
        check_device(options)
    config = checkpoint.config
    refuse_by_config(config)
    make_limits(config, options)
    fingerprint = checkpoint.fingerprint()
    check_drop_list(options.drop_list_fingerprint, checkpoint.name, fingerprint)
    if is_recurrent(config):
        targets = [name for name in options.targets if name != NO_TARGET]
        check_recurrent(targets, dtype, options.kv_dtype)
        if options.k > MOST_PENDING:
            raise too_many_lora_steps(options.k)
    windows, width = windows_of_config(config), getattr(config, "hidden_size", None)
    if windows is not None and type(width) is int:
        plan = make_plan(windows, width, options, kv_sources(config))
        if options.kv_dtype is not None:
            convolves = CONVOLUTION in (getattr(config, "layer_types", None) or ())
            caches = Caches(options.kv_dtype, _head_dims(config, width), plan.refresh_policy.fills, convolves)
            for target in set(options.targets) & set(TARGETS):
                TARGETS[target].check_caches(caches, options)
        if options.adapters is not None:
            read_adapters(options.adapters, plan, width, fingerprint)
        _warn_of_plan(plan, console)
    _check_disk(checkpoint, dtype, options, root)

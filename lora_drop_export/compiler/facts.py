"""What the manifest says of a model: plan, limits, formats, facts, special tokens.

Enters: options, checkpoint and trace. Leaves: frozen parts of the manifest. Writes nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.bundle.adapters import AdapterConfig, folded, read_adapter_config, read_adapters, weight_shapes
from lora_drop_runtime.bundle.graph_io import NO_HEADS
from lora_drop_runtime.bundle.manifest import QUANTIZED_DTYPES, Limits, ModelFacts, SpecialTokens
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.dtypes import BY_NAME, MODEL_DTYPES
from lora_drop_runtime.errors import InputError, PlanError, one_line
from lora_drop_runtime.files import is_file
from lora_drop_runtime.plan.drop_plan import DropPlan, eligible_layers, spread_layers
from lora_drop_runtime.plan.policy import DEFAULT_POLICY
from lora_drop_runtime.plan.sites import INJECTIONS, half_of, injected
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE

from lora_drop_export.checkpoint.checkpoint import Checkpoint, TensorSource
from lora_drop_export.checkpoint.experts import APART, DOWN, ROWS, KeptExpertRows, gate_up_of
from lora_drop_export.checkpoint.float8 import Float8Tensor, SmallFloats
from lora_drop_export.checkpoint.foreign import refused
from lora_drop_export.checkpoint.gguf import GgufTensor
from lora_drop_export.checkpoint.mxfp4 import Mxfp4Rows
from lora_drop_export.checkpoint.packed import Kept
from lora_drop_export.console import Console
from lora_drop_export.decoder.context import context_in_words, context_length
from lora_drop_export.decoder.trace import TracedModel
from lora_drop_export.graphs.match import quantizable
from lora_drop_export.graphs.refresh import half_parameters
from lora_drop_export.quantize.choice import Quantization, block_formats, common_format, departures
from lora_drop_export.quantize.formats import FLOAT8, BlockFormat
from lora_drop_export.targets.target import TARGETS

from .options import NO_TARGET, BuildOptions, PlanOptions, always_kept


def kept_weights(refs: Mapping[str, TensorSource]) -> dict[str, Kept]:
    """The weights that a quantized checkpoint or a bundle holds: they are stored as they are."""
    return {name: ref for name, ref in refs.items() if isinstance(ref, Kept) and ref.quantization is not None}


def native_formats(refs: Mapping[str, TensorSource]) -> dict[str, BlockFormat]:
    """The block formats that weights of a GGUF file, or experts in MXFP4, have or can be had in as they are."""
    kinds = GgufTensor | KeptExpertRows | Mxfp4Rows
    kept = kept_weights(refs)
    return {
        name: ref.native for name, ref in refs.items() if isinstance(ref, kinds) and ref.native and name not in kept
    }


def kept_formats(refs: Mapping[str, TensorSource]) -> dict[str, BlockFormat]:
    """Their block formats."""
    return {name: ref.native for name, ref in kept_weights(refs).items()}


def with_small_floats(checkpoint: Checkpoint, options: BuildOptions, console: Console) -> Checkpoint:
    """The checkpoint with weights in fp8 that are taken as they are, where each target takes them and no other dtype
    is asked for; else, and in NVFP4, as floats."""
    values = [ref for ref in checkpoint.tensors.values() if isinstance(ref, SmallFloats)]
    if not values:
        return checkpoint
    kept = [ref for ref in values if isinstance(ref, Float8Tensor)]
    targets = [TARGETS[name] for name in options.targets if name != NO_TARGET]
    if kept and options.dtype in (None, FLOAT8) and all(one.takes_kept(kept[0].native) for one in targets):
        console.say(f"the checkpoint's fp8 weights are taken as they are ({kept[0].method})")
        return checkpoint
    hint = (
        ""
        if options.dtype in QUANTIZED_DTYPES
        else ", which take more bytes; a --dtype of fewer bits rounds them again"
    )
    console.say(f"the checkpoint's {values[0].what} weights are read as floats{hint}")
    tensors = {name: ref.widened if isinstance(ref, Float8Tensor) else ref for name, ref in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors)


def is_of_a_layer(name: str) -> bool:
    """Whether a weight is one layer's, by the number in its name."""
    return re.search(r"\.\d+\.", name) is not None


def head_formats(
    shapes: Mapping[str, tuple[int, ...]], vocab_size: int, options: BuildOptions
) -> dict[str, BlockFormat]:
    """The block formats of the head and the embedding, where they have one of their own: of the matrices outside of
    layers that have a row per token.
    """
    form = options.head_format
    rows = [name for name, shape in shapes.items() if shape[0] == vocab_size and not is_of_a_layer(name)]
    found = {name: form.format_of(shapes[name]) for name in rows if form}
    return {name: one for name, one in found.items() if one is not None}


def kept_quantization(refs: Mapping[str, TensorSource]) -> Quantization | None:
    """How most of a quantized checkpoint's weights, or of a bundle's, are stored; None for another checkpoint."""
    kinds = Counter(ref.quantization for ref in kept_weights(refs).values())
    return next((kind for kind, _ in kinds.most_common(1)), None)


def quantization_of(refs: Mapping[str, TensorSource], options: BuildOptions) -> Quantization | None:
    """As the checkpoint has it, else as asked for; None for weights in float."""
    return kept_quantization(refs) or options.weights_format


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Gate and up, and down, of the experts of each layer."""
    end, known = f".{DOWN}{ROWS}", dict.fromkeys(names)
    return [(gate_up_of(name.removesuffix(end), known), name) for name in known if name.endswith(end)]


def expert_formats(
    refs: Mapping[str, TensorSource], formats: Mapping[str, BlockFormat]
) -> set[tuple[BlockFormat | None, BlockFormat | None]]:
    """How the experts of layers are stored: gate and up, and down."""
    return {(formats.get(up), formats.get(down)) for up, down in _pairs(refs)}


def with_experts_alike(
    formats: Mapping[str, BlockFormat], shapes: Mapping[str, tuple[int, ...]], given: Collection[str]
) -> dict[str, BlockFormat]:
    """The formats of experts, where a kernel that reads both of their matrices wants one: a layer's get it, or none;
    but for those that are given, and where gate and up lie apart: those kernels read one matrix each."""
    found = dict(formats)
    for pair in _pairs(shapes):
        forms = {name: formats[name] for name in pair if name in formats}
        if forms.keys() & set(given) or pair[0].endswith(APART):
            continue
        if len(forms) == 1:
            found.pop(*forms)
        elif len(set(forms.values())) > 1 and not all(form.floating for form in forms.values()):  # E4M3's are rows
            form = common_format([*forms.values()], [shapes[name][1] for name in pair])
            assert form is not None  # each has blocks, and 16 divides what any of them does
            found |= dict.fromkeys(pair, form)
    return found


def chosen_formats(
    refs: Mapping[str, TensorSource],
    traced: TracedModel,
    groups: Sequence[tuple[str, ...]],
    options: BuildOptions,
) -> dict[str, BlockFormat]:
    """The block format of each quantized weight; of a tied one under all of its names."""
    weights = quantizable(traced.graph.graph)
    others = {ref.name for name, ref in refs.items() if name not in weights}
    chosen = {name: ref for name, ref in refs.items() if ref.name not in others}
    shapes = {name: ref.shape for name, ref in chosen.items()}
    given = head_formats(shapes, traced.vocab_size, options) | kept_formats(chosen)
    return with_experts_alike(
        block_formats(shapes, native_formats(chosen), groups, options.weights_format, given), shapes, given
    )


def quantization_facts(
    refs: Mapping[str, TensorSource],
    formats: Mapping[str, BlockFormat],
    quantization: Quantization | None,
    before: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """What the manifest says of quantized weights; weights that are stored otherwise are named on the console, too.

    Args:
        before: what the manifest of a bundle says of them that holds them.
    """
    if quantization is None:
        return {}
    found = dict(before)
    if not found:
        shapes = {name: ref.shape for name, ref in refs.items()}
        departed = departures(shapes, formats, native_formats(refs) | kept_formats(refs), quantization)
        found = dataclasses.asdict(quantization) | ({"departures": departed} if departed else {})
    for one in found.get("departures", ()):
        what = f"{one['weights']} ({one['count']})"
        if one["block_size"] is None:
            console.say(f"left in float: {what}")
        else:
            zero_points = "symmetric" if one["symmetric"] else "with zero points"
            bits = f"to {one['bits']} bits " if "bits" in one else ""
            console.say(f"quantized {bits}in blocks of {one['block_size']}, {zero_points}: {what}")
    return found


def _check_plan(options: PlanOptions, plan: DropPlan, hidden_size: int) -> None:
    """Refuse what can only be a mistake."""
    if not plan.sites and not plan.eligible_layers and not plan.windowed_layers:
        given = [options.always_first, options.always_last] != [None, None]
        if given:
            raise PlanError(
                "No layer of the model may be dropped.",
                note=f"Of {plan.num_layers} the first {plan.always_first} and the last {plan.always_last} are always "
                "kept.",
                hint="Lower --always-first or --always-last; for the full model alone use --drop-ratio 0.",
            )
    if options.rank:
        Bounds(0, hidden_size).whole("--rank", options.rank, why="the model's hidden size", error=PlanError)
        if not plan.sites:
            raise PlanError(
                "--rank leaves room for the adapters of dropped layers.",
                note=f"It is {options.rank}, and no layer is dropped.",
                hint="Leave it out, or drop layers with --drop-ratio 0.5.",
            )


def _chosen_sites(options: PlanOptions, config: AdapterConfig | None, eligible: Sequence[int]) -> tuple[str, ...]:
    """The drop list that the options ask for, or the one that the adapters were fitted for."""
    fitted = () if config is None or config.sites is None else config.sites
    sites: Sequence[int | str]
    if options.drop_layers is not None:
        sites = options.drop_layers
    elif fitted and options.drop_ratio is None:
        sites = fitted
    else:
        sites = spread_layers(eligible, 0.5 if options.drop_ratio is None else options.drop_ratio)
    in_halves = bool(fitted) and all(map(half_of, fitted))  # as the adapters are
    return injected(sites, options.injection or (INJECTIONS[1] if in_halves else None))


def make_plan(
    windows: Sequence[int], hidden_size: int, options: PlanOptions, kv_sources: tuple[int, ...] = ()
) -> DropPlan:
    """The drop plan that the options ask for, on this model.

    Requires: a drop list's file is read (`with_files_read`).

    Args:
        windows: sliding window of each layer in positions, 0 for none.
        hidden_size: of the model.
        kv_sources: layers whose K and V others take.

    Raises:
        PlanError, BundleError: it does not fit the model, or the adapters.
    """
    assert options.drop_list is None
    config = None if options.adapters is None else read_adapter_config(options.adapters)
    first, last = always_kept(options, config)
    windowed = tuple(i for i, window in enumerate(windows) if window)
    policy = options.policy or (None if config is None else config.policy) or DEFAULT_POLICY
    rank, surrogate = options.rank or 0, options.surrogate
    sites = _chosen_sites(options, config, eligible_layers(len(windows), first, last, windowed, policy, kv_sources))
    if config is not None:
        surrogate = surrogate or config.surrogate
        if options.rank not in (None, config.rank):
            raise PlanError(
                "The adapters have another rank.",
                note=f"--rank is {options.rank}, {options.adapters} has rank {config.rank}.",
                hint="Leave --rank out when --adapters is given.",
            )
        rank = config.rank
    plan = DropPlan(
        num_layers=len(windows),
        sites=sites,
        k=options.k,
        surrogate=surrogate or DEFAULT_SURROGATE,
        rank=rank if sites else 0,
        bare_sites=() if config is None else tuple(site for site in config.bare_sites if site in sites),
        policy=policy,
        always_first=first,
        always_last=last,
        windowed_layers=windowed,
        kv_sources=kv_sources,
    )
    _check_plan(options, plan, hidden_size)
    return plan


def make_limits(config: Any, options: BuildOptions) -> Limits:
    """Capacities: 2048 tokens unless told otherwise, never more than the model's context."""
    context = context_length(config)
    max_seq_len = options.max_seq_len or min(2048, context)
    max_prompt_len = options.max_prompt_len or max(1, max_seq_len - 1)
    most = max_seq_len - 1
    for option, value, bound, what in (
        ("--max-seq-len", max_seq_len, context, f"the model's context is {context_in_words(config)}"),
        ("--max-prompt-len", max_prompt_len, most, f"--max-seq-len less one new token is {most}"),
    ):
        if value > bound:
            raise InputError(f"{option} is too large.", note=f"It is {value}, {what}.", hint="Lower it.")
    return Limits(max_seq_len, max_prompt_len, options.max_batch)


def activations_dtype(checkpoint: Checkpoint, options: BuildOptions, *, quantized: bool) -> str:
    """As asked for, else what the first of the targets wants, and what most of the checkpoint has where there is none.

    Args:
        quantized: weights will be; without a target activations are float32 then, which any can be added for that
            takes integers.
    """
    chosen = options.activation_dtype if quantized and options.activation_dtype else options.dtype
    if chosen in MODEL_DTYPES:
        return chosen
    if quantized and not set(options.targets) & set(TARGETS) and options.dtype != FLOAT8:
        return "float32"
    size: dict[str, int] = {}
    for ref in checkpoint.tensors.values():
        size[ref.dtype] = size.get(ref.dtype, 0) + ref.size_bytes
    most = max(size, key=lambda name: size[name])
    dtype = most if most in MODEL_DTYPES else "float32"
    return next((target.dtype(dtype) for name, target in TARGETS.items() if name in options.targets), dtype)


def surrogate_weights(
    plan: DropPlan, width: int, fingerprint: str, options: PlanOptions
) -> dict[str, npt.NDArray[np.float32]]:
    """Of fitted adapters, or zeros that leave room for some, or none; `width` is the model's hidden size."""
    if options.adapters is not None:
        return folded(read_adapters(options.adapters, plan, width, fingerprint), plan, width)
    return {name: np.zeros(shape, np.float32) for name, shape in weight_shapes(plan, width).items()}


def model_facts(
    checkpoint: Checkpoint,
    traced: TracedModel,
    dtype: str,
    fingerprint: str,
    stored: Mapping[str, TensorPlace],
) -> ModelFacts:
    prefix = f"{traced.layers_prefix}."
    layer_bytes, expert_bytes = [0] * len(traced.windows), [0] * len(traced.windows)
    head_bytes = 0
    for name, tensor in stored.items():
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).partition(".")[0])
            layer_bytes[layer] += tensor.bytes_read
            expert_bytes[layer] += tensor.bytes_read if name in traced.expert_shares else 0
        elif name not in traced.embedding_only:
            head_bytes += tensor.bytes_read
    attention_bytes, kv_bytes = (
        tuple(sum(stored[name].bytes_read for name in names if name in stored) for names in half)
        for half in zip(*half_parameters(traced), strict=True)
    )
    rows = [t for name, t in stored.items() if not name.startswith(prefix) and t.shape[1:] == (traced.hidden_size,)]
    tables = [t.bytes_read // t.shape[0] for t in rows if t.shape[0] >= traced.vocab_size]
    embedding_row_bytes = tables[0] if tables else traced.hidden_size * BY_NAME[dtype].size_bytes
    heads = next(one for one in traced.heads if one != NO_HEADS)
    return ModelFacts(
        name=one_line(checkpoint.name),  # which a directory's need not be
        model_type=checkpoint.config.model_type,
        fingerprint=fingerprint,
        num_layers=len(traced.windows),
        hidden_size=traced.hidden_size,
        vocab_size=traced.vocab_size,
        num_heads=heads.num_heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        context_length=context_length(checkpoint.config),
        dtype=dtype,
        windows=traced.windows,
        layer_bytes=tuple(layer_bytes),
        attention_bytes=attention_bytes,
        kv_bytes=kv_bytes,
        head_bytes=head_bytes,
        embedding_row_bytes=embedding_row_bytes,
        weight_dtype=dtype,
        layer_heads=traced.heads if len(set(traced.heads)) > 1 else (),
        expert_bytes=tuple(expert_bytes) if traced.expert_shares else (),
        expert_share=float(max(traced.expert_shares.values(), default=1.0)),
        recurrence=traced.recurrence,
        recurrent_layers=traced.recurrent_layers,
    )


def special_tokens(checkpoint: Checkpoint) -> SpecialTokens:
    """End and padding tokens: the generation config's, else the model config's."""
    from transformers import GenerationConfig

    generation: Any = checkpoint.config
    file = checkpoint.directory / "generation_config.json"
    if is_file(file):
        with refused("The checkpoint's generation config cannot be read.", file):
            generation = GenerationConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(checkpoint.config, "eos_token_id", None)
    pad = getattr(generation, "pad_token_id", None)
    ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    for name, value in (("eos_token_id", ids), ("pad_token_id", () if pad is None else (pad,))):
        if not all(type(token) is int for token in value):
            raise InputError(
                "The checkpoint's special tokens are no token ids.",
                note=f"{name} is {value!r:.80} in {checkpoint.directory}.",
                hint="Give whole numbers in generation_config.json and config.json.",
            )
    return SpecialTokens(eos=tuple(token for token in ids if token >= 0), pad=0 if pad is None or pad < 0 else pad)

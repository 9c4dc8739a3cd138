"""Where a transformers decoder keeps its layers, halves, buffers and tied weights, whatever the family."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from lora_drop_runtime.dtypes import MODEL_DTYPES
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.weights.resolve import find_tensor


@contextlib.contextmanager
def head_replaced(model: Any, forward: Callable[[Any], Any]) -> Iterator[None]:
    """The head, which is not loaded, as another function."""
    head = model.get_output_embeddings()
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def name_of(model: Any, wanted: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def first_output(output: Any) -> Any:
    """The hidden states that a layer gives: layers return them alone, or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


_AFTER_ATTENTION = (  # the first that a layer has; Gemma's `post_attention_layernorm` norms an output
    "pre_feedforward_layernorm",
    "feedforward_layernorm",
    "pre_ff_layernorm",
    "post_attention_layernorm",
    "mlp_norm",
    "ffn_norm",
    "ln_2",
    "layernorm2",
    "final_layer_norm",
    "mlp",
)


def between_halves(layer: Any) -> Any:
    """The module whose input is the residual stream after attention."""
    # OLMo 2 and EXAONE 4 norm what the halves give, not what they are given
    norms_outputs = hasattr(layer, "post_feedforward_layernorm") and not hasattr(layer, "pre_feedforward_layernorm")
    for name in ("mlp",) if norms_outputs else _AFTER_ATTENTION:
        if getattr(layer, name, None) is not None:  # StableLM has a None where halves run in parallel
            return getattr(layer, name)
    return layer


@functools.cache
def _values_beside(layer: Any) -> int | None:
    """How many values the forward of a class of layers gives beside the hidden states, as its last line says; None
    where it gives those alone, in no tuple."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(layer.forward))))
    except (OSError, TypeError, SyntaxError):  # no file has it, or not as a function of its own
        return None
    last = code.body[0].body[-1] if isinstance(code.body[0], ast.FunctionDef) else None
    given = last.value if isinstance(last, ast.Return) else None
    return len(given.elts) - 1 if isinstance(given, ast.Tuple) else None


class Recorder:
    """Replaces every layer by one that notes its arguments and passes the hidden states on.

    With `result`, the last layer returns that instead: the model then goes on to its norm and head.
    """

    def __init__(self, layers: Any, result: Any = None) -> None:
        self.layers = layers
        self.inputs: list[Any] = []
        self.arguments: list[tuple[Any, Any]] = []
        for index, layer in enumerate(layers):
            kind: Any = type(layer)
            final = result if index == len(layers) - 1 else None
            layer.forward = self._stand_in(final, _values_beside(kind))

    def _stand_in(self, result: Any, beside: int | None) -> Callable[..., Any]:
        def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            self.inputs.append(hidden_states)
            self.arguments.append((args, kwargs))
            output = hidden_states if result is None else result
            return output if beside is None else (output, *[None] * beside)

        return forward

    def restore(self) -> None:
        for layer in self.layers:
            del layer.forward


def decoder_layers(model: Any) -> Any:
    """The ModuleList of decoder blocks, wherever the family keeps it."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count > 0
    ]
    # A layer may have lists of its own that are as long, such as StableLM's norms per head
    found = [module for name, module in lists if not any(name.startswith(f"{outer}.") for outer, _ in lists)]
    if len(found) != 1:
        raise ModelError(
            "The model's decoder layers were not found.",
            note=f"{len(found)} module lists have {count} entries (config.num_hidden_layers).",
            hint="A causal language model with one list of decoder layers is needed.",
        )
    return found[0]


def kv_sources(config: Any) -> tuple[int, ...]:
    """Layers whose K and V others take: of the last `num_kv_shared_layers` each takes those of the last layer of its
    type before them, as in Gemma 4."""
    shared, types = getattr(config, "num_kv_shared_layers", None), getattr(config, "layer_types", None)
    if type(shared) is not int or shared < 1 or not isinstance(types, list | tuple):
        return ()
    own, others = types[:-shared], types[-shared:]
    return tuple(sorted(len(own) - 1 - own[::-1].index(kind) for kind in {*others} & {*own}))


def buffer_values(model: Any) -> dict[str, Any]:
    """Buffers that no checkpoint holds (RoPE frequencies, embedding scales), filled by transformers' own init.

    Raises:
        ModelError: of frequencies some are infinite or no numbers.
    """
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    values: dict[str, Any] = {}
    with unset_fake_temporarily(), torch.no_grad():
        for prefix, module in model.named_modules():
            names = [n for n in module._buffers if n in module._non_persistent_buffers_set]
            if not names:
                continue
            for name in names:
                fake = module._buffers[name]
                fill = torch.nan if fake.is_floating_point() else 0
                module._buffers[name] = torch.full(tuple(fake.shape), fill, dtype=fake.dtype)
            model._init_weights(module)
            for name in names:
                values[f"{prefix}.{name}" if prefix else name] = module._buffers[name]
    for name, value in values.items():
        if name.endswith("inv_freq") and not value.isfinite().all() and not value.isnan().all():
            raise ModelError(
                "The model's config cannot be used.",
                note=f"Its RoPE has frequencies that are not numbers, or infinite ({name}).",
                hint="Check rope_parameters in config.json.",
            )
    return values


def stored_tensors(module: Any, checkpoint: Checkpoint, prefix: str = "", recurse: bool = True) -> dict[str, Any]:
    """Parameters, and those buffers that the checkpoint holds, such as the constants of an activation function.

    Args:
        prefix: of the module's names in the model, with its dot.
    """
    found = dict(module.named_parameters(recurse=recurse))
    for name, buffer in module.named_buffers(recurse=recurse):
        owner, _, leaf = name.rpartition(".")
        if leaf not in module.get_submodule(owner)._non_persistent_buffers_set:
            source = find_tensor(checkpoint, f"{prefix}{name}")
            if source is not None and source.dtype in MODEL_DTYPES:
                found[name] = buffer
    return found


def put_tensor(module: Any, name: str, values: Any) -> None:
    """Put a tensor that learns nothing in the place of a parameter or buffer."""
    import torch

    owner, _, leaf = name.rpartition(".")
    target = module.get_submodule(owner)
    if leaf in target._buffers:
        target._buffers[leaf] = values
    else:
        target._parameters[leaf] = torch.nn.Parameter(values, False)


def tied_names(model: Any) -> dict[str, str]:
    """Parameters that are another one under a second name, as the config says or as the module is built."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is not embedding and model.config.get_text_config().tie_word_embeddings:  # not on fake tensors everywhere
        tied[first[id(head)]] = first[id(embedding)]
    return tied

"""A graph's inputs and outputs, as OpenVINO has read it, against the bundle's manifest.

A manifest that says other sizes, another dtype or another plan than the graph has is refused when the bundle is opened.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lora_drop_runtime.bundle.graph_io import GATED_DELTA, NO_HEADS
from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.bundle.paged_io import (
    BLOCK,
    GROUPS,
    LAST_TOKENS,
    LORA_STEP,
    PAST_STATES,
    POSITIONS,
    PRESENT_STATES,
    RECURRENCE_TABLES,
    cache_names,
    paged_steps_name,
    recurrence_names,
    recurrence_tables,
    table_names,
)
from lora_drop_runtime.errors import BundleError


def _differs(note: str) -> BundleError:
    return BundleError(
        "A graph does not fit the bundle's manifest.",
        note=note,
        hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
    )


def _shapes(ports: Any) -> dict[str, list[int | None]]:
    """By name; None where a size is not fixed."""
    return {
        name: [size.get_length() if size.is_static else None for size in port.partial_shape]
        for port in ports
        for name in port.names
    }


def layers_with_tables(manifest: Manifest, names: Collection[str]) -> dict[tuple[str, int], list[int]]:
    """The layers that have tables in common, by group and window, 0 for those without one; in order.

    Args:
        names: of the graph's inputs: where it was lowered by an earlier version, all layers read one group's tables.
    """
    plan, found = manifest.plan, dict[tuple[str, int], list[int]]()
    for group, layers in zip(GROUPS, (plan.kept_attentions, plan.dropped_attentions), strict=True):
        of = {
            layer: 0 if layer in manifest.model.recurrent_layers else manifest.model.windows[layer]
            for layer in layers
            if manifest.model.heads[layer] != NO_HEADS
        }
        if not any(name in names for window in of.values() if window for name in table_names(group, window)):
            of = dict.fromkeys(of, 0)
        for window in sorted(set(of.values())):
            found[group, window] = [layer for layer, own in of.items() if own == window]
    return found


def _wanted(
    manifest: Manifest, names: Collection[str]
) -> tuple[dict[str, list[int | None]], dict[str, list[int | None]]]:
    """Names and fixed sizes of inputs and outputs; None for any size."""
    model, plan, heads = manifest.model, manifest.plan, manifest.model.heads
    inputs: dict[str, list[int | None]] = {"input_ids": [1, None], POSITIONS: [1, None], "logits_index": [None]}
    if plan.sites:
        inputs[LORA_STEP] = []
    for (group, window), layers in layers_with_tables(manifest, names).items():
        past_lens, begins, blocks, block_begins, longest = table_names(group, window)
        inputs[longest] = []
        for name in (past_lens, begins, blocks, block_begins):
            inputs[name] = [None]
        for layer in layers:
            cache: list[int | None] = [None, heads[layer].kv_heads, BLOCK, heads[layer].head_dim]
            inputs |= dict.fromkeys(cache_names([layer]), cache)
    outputs: dict[str, list[int | None]] = {"logits": [1, None, model.vocab_size]}
    form = model.recurrence
    if form is not None:
        is_delta, recurrent, dropped = form.rule == GATED_DELTA, {*model.recurrent_layers}, {*plan.dropped_attentions}
        sizes = (form.key_dim, form.value_dim) if is_delta else (form.value_dim, form.key_dim)
        for layer in recurrent:
            recent, state, present_recent, present_state = recurrence_names(layer)
            inputs |= {recent: [None, form.entry], state: [None, form.heads, *sizes]}
            outputs[present_recent] = [1, None, form.entry]
            if is_delta:
                outputs[present_state] = [None, form.heads, *sizes]
        tables = recurrence_tables(form.rule, bool(recurrent - dropped), bool(recurrent & dropped))
        for name, port in tables.items():
            inputs[port] = [None] * RECURRENCE_TABLES[form.rule][name][1]
        inputs[tables["mixed"]][0] = form.taps
    if plan.has_state:
        inputs |= {PAST_STATES: [len(plan.states), None, model.hidden_size], LAST_TOKENS: [None]}
        outputs[PRESENT_STATES] = [None, None, model.hidden_size]
    return inputs, outputs


def check_io(model: Any, dtypes: Collection[str], manifest: Manifest, file: str) -> None:
    """Refuse a graph that lacks an input or output, has it with another shape, or has more inputs; one of another plan
    or dtype.

    Args:
        model: an openvino.Model as its frontend read it.
        dtypes: of the weights that it names.
        file: for the message.

    Raises:
        BundleError: it differs.
    """
    plan = manifest.plan
    name = paged_steps_name(plan.sites, plan.surrogate, plan.refresh_policy.fills)
    if model.get_friendly_name() != name:
        raise _differs(f"{file} is called {model.get_friendly_name()!r:.200}, the manifest's plan needs {name!r:.200}.")
    ports = _shapes(model.inputs), _shapes(model.outputs)
    needed = _wanted(manifest, ports[0])
    for wanted, found in zip(needed, ports, strict=True):
        for port, shape in wanted.items():
            if port == POSITIONS and port not in found:  # the model makes no use of any
                continue
            has = found.get(port)
            fits = has is not None and len(has) == len(shape)
            if has is None or not fits or any(None not in (a, b) and a != b for a, b in zip(has, shape, strict=True)):
                state = "is missing" if has is None else f"is {has}"
                raise _differs(f"{file}: {port} {state}, needed is {shape}.")
    unknown = [name for name in ports[0] if name not in needed[0]]
    if unknown:  # nothing would be bound there
        raise _differs(f"{file} has an input {unknown[0]}, the manifest's model needs none.")
    if ("bfloat16" in dtypes) != (manifest.model.dtype == "bfloat16"):
        raise _differs(f"{file} names weights in {', '.join(sorted(dtypes))}; the dtype is {manifest.model.dtype}.")

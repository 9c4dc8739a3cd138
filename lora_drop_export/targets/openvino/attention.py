"""Cache writes and Attention → PagedAttention; a short convolution → PagedAttention, Earlier and Convolution."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import BLOCK, DOMAIN, cache_names, table_names
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.graphs.convolutions import Convolution, convolutions
from lora_drop_export.graphs.match import cache_write, mask_window
from lora_drop_export.graphs.nodes import HEADS_FIRST, Ops, rank, replace_node


def _without_factor(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """x and a number c of a value that is c·x; the value and None of any other."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Mul":
        for x, factor in (node.inputs, node.inputs[::-1]):
            number = None if factor is None else ir.convenience.get_const_tensor(factor)
            if number is not None and number.size == 1:
                return x, factor
    return value, None


def tokens_first(ops: Ops, value: ir.Value | None) -> ir.Value:
    """[B, H, S, D] as [B, S, H, D]; RoPE, which treats heads alike, goes behind the transpose."""
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == HEADS_FIRST:
        assert node.inputs[0] is not None
        return node.inputs[0]
    if node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3 and rank(value) == 4:
        # Where a number times x is turned, the plugin takes that number for one of its own (2026.4)
        unscaled, factor = _without_factor(node.inputs[0])
        x = tokens_first(ops, unscaled)
        head_dim = int(value.shape[3])  # type: ignore[index, arg-type]
        rotary = node.attributes["rotary_embedding_dim"].as_int() if "rotary_embedding_dim" in node.attributes else 0
        interleaved = node.attributes["interleaved"].as_int() if "interleaved" in node.attributes else 0
        turned = ops(
            "Rotary", x, *node.inputs[1:], domain=DOMAIN, rotary_dim=rotary or head_dim, interleaved=interleaved
        )
        turned.type, turned.shape = value.type, x.shape
        if factor is not None:
            turned = ops("Mul", turned, factor)
            turned.type, turned.shape = value.type, x.shape
        return turned
    assert value.shape is not None
    swapped = ops("Transpose", value, perm=list(HEADS_FIRST))
    swapped.type, swapped.shape = value.type, ir.Shape([value.shape[n] for n in HEADS_FIRST])
    return swapped


def _packed(ops: Ops, value: ir.Value | None) -> ir.Value:
    """[1, H, T, D] as [T, H·D]."""
    split = tokens_first(ops, value)
    heads, head_dim = (int(size) for size in list(split.shape)[2:])  # type: ignore[arg-type]
    packed = ops("Reshape", split, ops.ints([-1, heads * head_dim]))
    packed.type, packed.shape = split.type, ir.Shape(["tokens", heads * head_dim])
    return packed


def _cache(name: str, like: ir.Value | None) -> ir.Value:
    heads, head_dim = (int(like.shape[n]) for n in (1, 3))  # type: ignore[union-attr, index, arg-type]
    return ir.val(name, ir.DataType.FLOAT, ["blocks", heads, BLOCK, head_dim])


class _Tables:
    """The tables of each group and window, made when first asked for."""

    def __init__(self, graph: ir.Graph, plan: DropPlan) -> None:
        self._graph, self._dropped = graph, set(plan.dropped_attentions)
        self._made: dict[tuple[str, int], list[ir.Value]] = {}

    def of(self, layer: int, window: int) -> list[ir.Value]:
        group = "dropped" if layer in self._dropped else "kept"
        if (group, window) not in self._made:
            rows, ends = [f"{group}.rows"], [f"{group}.ends"]
            shapes: tuple[list[str], ...] = (rows, ends, [f"{group}.{window}.blocks"], ends, [])
            named = zip(table_names(group, window), shapes, strict=True)
            self._made[group, window] = [ir.val(name, ir.DataType.INT32, shape) for name, shape in named]
            self._graph.inputs.extend(self._made[group, window])
        return self._made[group, window]


def _not_capped(what: str, hint: str, layer: int, softcap: float) -> ModelError:
    return ModelError(
        f"Target openvino has no {what} for attention with a soft cap.",
        note=f"Layer {layer} caps its scores at {softcap:g}.",
        hint=hint,
    )


def _capped(ops: Ops, attended: ir.Value, softcap: float) -> ir.Value:
    """Attention with a soft cap on its scores, which PagedAttention does not know: that writes the caches all the same,
    and the entries of earlier steps are read from them."""
    node = attended.producer()
    assert node is not None
    query, key, value, key_cache, value_cache, past_lens, begins, blocks, block_begins, _ = node.inputs
    past = [ops("Gather", cache, blocks, axis=0) for cache in (key_cache, value_cache)]
    attributes = {name: node.attributes[name].value for name in ("scale", "window", "heads")}
    tables = (past_lens, begins, block_begins)
    result = ops("Capped", query, key, value, *past, *tables, attended, domain=DOMAIN, softcap=softcap, **attributes)
    result.type, result.shape = attended.type, attended.shape
    return result


def _lower_one(graph: ir.Graph, node: ir.Node, layer: int, tables: _Tables, sinks: ir.Value | None) -> None:
    window = mask_window(node)
    writes = [cache_write(value) for value in node.inputs[1:3]]
    caches = [_cache(name, write.inputs[0]) for name, (write, _, _) in zip(cache_names([layer]), writes, strict=True)]
    graph.inputs.extend(caches)
    ops = Ops()
    query, key, value = (_packed(ops, new) for new in (node.inputs[0], *(entry for _, entry, _ in writes)))
    (heads_last,) = (use.node for use in node.outputs[0].uses())
    assert heads_last.op_type == "Transpose"
    heads, head_dim = (int(size) for size in list(heads_last.outputs[0].shape)[2:])  # type: ignore[arg-type]
    scale = node.attributes["scale"].as_float()
    attended = ops(
        "PagedAttention",
        *(query, key, value, *caches, *tables.of(layer, window), *(() if sinks is None else (sinks,))),
        domain=DOMAIN,
        scale=scale,
        window=window,
        heads=heads,
    )
    attended.name = f"attended.{layer}"
    attended.type, attended.shape = query.type, ir.Shape(["tokens", heads * head_dim])
    if "softcap" in node.attributes:
        softcap = node.attributes["softcap"].as_float()
        if sinks is not None:
            raise _not_capped("sinks", "Use --target ort.", layer, softcap)
        if any(scale is not None for _, _, scale in writes):
            raise _not_capped("int8 caches", "Leave --kv-dtype out, or use --target ort.", layer, softcap)
        attended = _capped(ops, attended, softcap)
    replace_node(graph, heads_last, ops, ops("Reshape", attended, ops.ints([1, -1, heads, head_dim])))


def _lower_convolution(graph: ir.Graph, one: Convolution, groups: _Tables) -> None:
    """PagedAttention writes the caches, Earlier reads the few tokens before, Convolution mixes them with the new ones.

    The gate is in the place of the queries, two heads of them, and is made where they are. Of a dropped layer
    Convolution lies in an If: where OpenVINO computes without tokens (2026.4), what comes behind is lost.
    """
    x = one.join.inputs[1]
    assert x is not None
    width, size = int(x.shape[2]), int(one.taps.shape[2])  # type: ignore[index, arg-type]
    pasts = {str(value.name): value for value in graph.inputs}
    caches = [
        _cache(name, pasts[f"past_{part}.{one.layer}"])
        for name, part in zip(cache_names([one.layer]), ("key", "value"), strict=True)
    ]
    graph.inputs.extend(caches)
    gate, ops = one.gated.inputs[0], Ops()
    split = ir.node("Split", [x], {"axis": 2, "num_outputs": 2}, num_outputs=2)
    ops.nodes.append(split)
    for half in split.outputs:
        half.type, half.shape = x.type, ir.Shape([*x.shape[:2], width // 2])  # type: ignore[index]
    rows = []
    for value, columns in ((gate, width), *((half, width // 2) for half in split.outputs)):
        packed = ops("Reshape", value, ops.ints([-1, columns]))
        packed.type, packed.shape = x.type, ir.Shape(["tokens", columns])
        rows.append(packed)
    tables = groups.of(one.layer, size)
    attended = ops("PagedAttention", *rows, *caches, *tables, domain=DOMAIN, scale=1.0, window=size, heads=2)
    attended.name = f"attended.{one.layer}"
    before = ir.node("Before", tables, {"count": size - 1}, domain=DOMAIN, num_outputs=2)  # one for all layers, by CSE
    ops.nodes.append(before)
    found, slots = before.outputs
    found.shape, slots.shape = ir.Shape(["tokens", size - 1]), ir.Shape(["tokens", size - 1, 3])
    found.type = slots.type = ir.TensorType(ir.DataType.INT64)
    earlier = ops("Earlier", *caches, slots, domain=DOMAIN)
    bias = () if one.bias is None else (one.bias,)
    mixed = ops("Convolution", *rows, attended, earlier, found, one.taps, *bias, domain=DOMAIN)
    for value in (attended, mixed):
        value.type, value.shape = x.type, ir.Shape(["tokens", width])
    earlier.type, earlier.shape = x.type, ir.Shape(["tokens", size - 1, width])
    replace_node(graph, one.gated, ops, ops("Reshape", mixed, ops.ints([1, -1, width])))


def lower_attention(graph: ir.Graph, plan: DropPlan, sinks: Mapping[ir.Node, ir.Value]) -> None:
    """Every attention and convolution, and the inputs that they need.

    Args:
        sinks: of the attentions that have some.
    """
    tables = _Tables(graph, plan)
    for one in convolutions(graph):
        _lower_convolution(graph, one, tables)
    for node in list(graph):
        if node.op_type != "Attention":
            continue
        past = cache_write(node.inputs[1])[0].inputs[0]
        layer = int(str(past.name).rpartition(".")[2])  # type: ignore[union-attr]
        _lower_one(graph, node, layer, tables, sinks.get(node))


def rotate_tokens_first(graph: ir.Graph) -> None:
    """RoPE that no attention reads directly, as of a part of a head, likewise."""
    for node in list(graph):
        if node.op_type == "RotaryEmbedding" and rank(node.outputs[0]) == 4 and len(node.inputs) == 3:
            ops = Ops()
            turned = tokens_first(ops, node.outputs[0])
            replace_node(graph, node, ops, ops("Transpose", turned, perm=list(HEADS_FIRST)))

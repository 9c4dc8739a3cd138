"""The nodes of the domain `lora_drop`, built out of what the installed OpenVINO has.

Enters: a node of the lowered graph (bundle/paged_io.py), as OpenVINO's ONNX frontend gives it. Leaves: OpenVINO's own
nodes, in the forms that its CPU plugin makes one kernel of.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as op

from lora_drop_runtime.bundle.paged_io import DOMAIN, TABLES
from lora_drop_runtime.dtypes import BY_NAME

from .capped import capped_attention, ints
from .convolution import before, convolution, earlier
from .recurrence import delta_rule, directions, selective_rule

_NEARLY_NOTHING, _NEARLY_ALL = 1e-37, 3e38
_PLAIN_GATE = (("alpha", 1.0), ("added", 0.0), ("limit", 0.0))  # that an Experts node of SiLU may leave out
_SILU = "silu"
_GELU = {"gelu": "erf", "gelu_tanh": "tanh"}  # activation → how OpenVINO calls its approximation
_LARGEST_GROUP, _LEAST_GROUP = 128, 16  # of activations with one scale
_SINKS_RANK = 4  # of the sinks among what comes behind that; nothing else there has more than one dimension
_LONGEST = 12  # the place of the longest row's length among paged attention's inputs
Node = Any  # what OpenVINO hands a conversion
Output = Any
_TYPES = {
    "float32": ov.Type.f32,
    "bfloat16": ov.Type.bf16,
    "int64": ov.Type.i64,
    "uint8": ov.Type.u8,
    "uint4": ov.Type.u4,
}


def _as_output(value: Any) -> Output:
    return value if isinstance(value, ov.Output) else value.output(0)


def _widened(weight: Output) -> Output:
    """Weights as float32, which stay in memory as they are."""
    if weight.get_element_type() == ov.Type.f32:
        return weight
    wide = op.convert(weight, "f32")
    wide.get_rt_info()["decompression_0"] = ""
    return wide


def _dequantized(inputs: list[Output], quantized: int) -> tuple[Output, list[Output]]:
    """A weight [.., N, K] as float32, and the inputs that are left. Blocks: (q − zero point) · scale."""
    weight, *rest = inputs
    if not quantized:
        return _widened(weight), rest
    scales, *rest = rest
    *rows, count, block = weight.get_partial_shape().to_shape()
    if quantized == 1:
        middle = np.array(8 if weight.get_element_type() == ov.Type.u4 else 128, np.uint8)
        zero = op.constant(middle, dtype=weight.get_element_type())
    else:
        zero, *rest = rest
    values = op.subtract(op.convert(weight, "f32"), op.convert(zero, "f32"))
    scaled = op.multiply(values, scales)
    return op.reshape(scaled, ints([*rows, count * block]), False), rest


def _wide_zero_points(zero: Output) -> Output:
    """Zero points [N, K / block, 1] as float32."""
    points: npt.NDArray[Any] = np.asarray(zero.get_node().data)
    if zero.get_element_type() == ov.Type.u4:
        packed = points.reshape(-1).view(np.uint8)
        points = np.stack([packed & 15, packed >> 4], axis=-1)
    return op.constant(points.reshape(zero.get_partial_shape().to_shape()).astype(np.float32)).output(0)


def _lookup(node: Node) -> list[Output]:
    inputs = [node.get_input(n) for n in range(node.get_input_size())]
    quantized = node.get_attribute("quantized")
    if quantized == 2:
        # The plugin widens the zero points of a look-up, and where the table is the head too it would widen the head's:
        # with wide ones its product takes three times as long (2026.4). So these are constants of their own
        inputs[3] = _wide_zero_points(inputs[3])
    table, _ = _dequantized(inputs[1:], quantized)
    return [op.gather(table, inputs[0], op.constant(np.int64(0))).output(0)]


def _rms_norm(node: Node) -> list[Output]:
    x, weight = node.get_input(0), node.get_input(1)
    epsilon = op.constant(np.float32(node.get_attribute("epsilon")))
    mean = op.reduce_mean(op.power(x, op.constant(np.float32(2))), ints([-1]), True)
    scale = op.divide(op.constant(np.float32(1)), op.sqrt(op.add(mean, epsilon)))
    return [op.multiply(op.multiply(x, scale), _widened(weight)).output(0)]


def _rotated_pairs(x: Output, cos: Output, sin: Output, width: int) -> Any:
    """Neighbours are turned: x [1, T, H, R] as R / 2 pairs."""
    heads = x.get_partial_shape()[2].get_length()
    pairs = op.reshape(x, ints([1, -1, heads, width // 2, 2]), False)
    parts = op.split(pairs, ints(4), 2)
    cos, sin = (op.unsqueeze(table, ints(4)) for table in (cos, sin))
    a, b = parts.output(0), parts.output(1)
    first = op.subtract(op.multiply(a, cos), op.multiply(b, sin))
    second = op.add(op.multiply(b, cos), op.multiply(a, sin))
    return op.reshape(op.concat([first, second], 4), ints([1, -1, heads, width]), False)


def _rotary(node: Node) -> list[Output]:
    x, cos, sin = (node.get_input(n) for n in range(3))
    width, interleaved = node.get_attribute("rotary_dim"), node.get_attribute("interleaved")
    head_dim = x.get_partial_shape()[3].get_length()
    cos, sin = (op.unsqueeze(table, ints(2)) for table in (cos, sin))  # [1, T, 1, R / 2]
    turned, rest = x, None
    if width < head_dim:
        parts = op.variadic_split(x, ints(3), ints([width, head_dim - width]))
        turned, rest = parts.output(0), parts.output(1)
    if interleaved:
        result = _rotated_pairs(turned, cos, sin, width)
    else:
        halves = op.variadic_split(turned, ints(3), ints([width // 2, width // 2]))
        low, high = halves.output(0), halves.output(1)
        swapped = op.concat([op.multiply(high, op.constant(np.float32(-1))), low], -1)
        whole_cos, whole_sin = (op.concat([table, table], -1) for table in (cos, sin))
        result = op.add(op.multiply(turned, whole_cos), op.multiply(swapped, whole_sin))
    if rest is not None:
        result = op.concat([result, rest], -1)
    return [result.output(0)]


def _one_layer() -> Any:
    """A model of one attention with a cache, as OpenVINO's transformation wants it."""
    from openvino.op.util import Variable, VariableInfo

    heads, head_dim = 1, 32

    def parameter(name: str, shape: list[int], dtype: Any) -> Any:
        made = op.parameter(shape, dtype, name=name)
        made.output(0).set_names({name})
        return made

    ids = parameter("input_ids", [-1, -1], np.int64)
    mask = parameter("attention_mask", [-1, -1], np.int64)
    positions = parameter("position_ids", [-1, -1], np.int64)
    beams = parameter("beam_idx", [-1], np.int32)
    table = op.constant(np.zeros((2, heads * head_dim), np.float32))
    hidden = op.gather(table, op.convert(ids, "i32"), op.constant(np.int64(0)))

    def projected() -> Any:
        weight = op.constant(np.zeros((heads * head_dim, heads * head_dim), np.float32))
        split = op.reshape(op.matmul(hidden, weight, False, True), ints([0, 0, heads, head_dim]), True)
        return op.transpose(split, ints([0, 2, 1, 3]))

    query, caches, sinks = projected(), [], []
    for name in ("key", "value"):
        info = VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, heads, -1, head_dim]), ov.Type.f32
        info.variable_id = name
        variable = Variable(info)
        batch = op.gather(op.shape_of(ids), ints([0]), op.constant(np.int64(0)))
        empty = op.broadcast(op.constant(np.float32(0)), op.concat([batch, ints([heads, 0, head_dim])], 0))
        past = op.gather(op.read_value(empty, variable), beams, op.constant(np.int64(0)))
        caches.append(op.concat([past, projected()], 2))
        sinks.append(op.assign(caches[-1], variable))
    wide_mask = op.convert(op.unsqueeze(mask, ints([1, 2])), "f32")
    attended = op.scaled_dot_product_attention(query, *caches, wide_mask, None, False)
    merged = op.reshape(op.transpose(attended, ints([0, 2, 1, 3])), ints([0, 0, heads * head_dim]), True)
    return ov.Model([op.result(merged)], sinks, [ids, mask, positions, beams], "one_layer")


@functools.cache
def _tail() -> tuple[npt.NDArray[Any], ...]:
    """What the installed version's paged attention takes behind the length of the longest row, switched off.

    OpenVINO's own transformation of a model with one layer says it.
    """
    from openvino._offline_transformations import paged_attention_transformation

    model = _one_layer()
    paged_attention_transformation(model)
    (node,) = (one for one in model.get_ops() if one.get_type_name() == "PagedAttentionExtension")
    found = []
    for place in range(_LONGEST + 1, node.get_input_size()):
        source = node.input_value(place).get_node()
        assert source.get_type_name() == "Constant", source.get_type_name()
        found.append(np.array(source.data))
    return tuple(found)


def _paged_attention(node: Node) -> list[Output]:
    from openvino.op import _PagedAttentionExtension

    query, key, value, key_cache, value_cache, *tables = (node.get_input(n) for n in range(node.get_input_size()))
    kv_heads, head_dim = (key_cache.get_partial_shape()[n].get_length() for n in (1, 3))
    scale = op.constant(np.float32(node.get_attribute("scale")))
    window = op.constant(np.int32(node.get_attribute("window")))
    slopes = op.constant(np.zeros(0, np.float32))
    inputs = [query, key, value, key_cache, value_cache, *tables[:4], scale, window, slopes, tables[4]]
    assert len(inputs) == _LONGEST + 1
    tail = [op.constant(array) for array in _tail()]
    if len(tables) > len(TABLES):
        (place,) = (n for n, array in enumerate(_tail()) if array.ndim == _SINKS_RANK)
        tail[place] = op.reshape(_widened(tables[-1]), ints([1, -1, 1, 1]), False)
    inputs += tail
    made = _PagedAttentionExtension([_as_output(value) for value in inputs])
    facts = made.get_rt_info()
    facts["num_k_heads"] = facts["num_v_heads"] = kv_heads
    facts["k_head_size"] = facts["v_head_size"] = head_dim
    return [made.output(0)]


def _of_each(inputs: list[Output], quantized: int, experts: int, stacks: int = 1) -> tuple[list[Output], list[Output]]:
    """The matrices [E, N, K] of experts that lie one below the other in [E·N, K], and the inputs that are left.

    Args:
        stacks: so many of these one behind the other, of which each is told.
    """
    parts = list[list[Output]]([] for _ in range(stacks))
    for one in inputs[: 1 + quantized]:
        rows, *sizes = one.get_partial_shape().to_shape()
        data: npt.NDArray[Any] = np.asarray(one.get_node().data).reshape(-1).view(np.uint8)  # that _weight holds
        shape = ov.Shape([experts, rows // experts // stacks, *sizes])
        for found, piece in zip(parts, np.split(data, stacks), strict=True):
            found.append(ov.op.Constant(ov.Tensor(piece, shape, one.get_element_type())).output(0))
    return [_as_output(_dequantized(found, quantized)[0]) for found in parts], inputs[1 + quantized :]


def _silu_experts(each: Output, count: int, node: Node, matrices: list[Output]) -> Any:
    """What each expert makes of all tokens [E, T, d].

    The form is that of a model whose experts have biases and limits. Without them ours are next to nothing and next to
    infinite, since what is nothing would be left out and the form not be found; so of a model that has zeros there.
    """
    (gate_up,), rest = _of_each(matrices, node.get_attribute("quantized"), count)
    (down,), biases = _of_each(rest, node.get_attribute("quantized_down"), count)
    height, width = (one.get_partial_shape()[1].get_length() for one in (gate_up, down))
    alpha, added, limit = (node.get_attribute(name, default) for name, default in _PLAIN_GATE)
    wide = limit or _NEARLY_ALL

    def with_bias(product: Any, place: int, size: int) -> Any:
        found = np.zeros((count, 1, size), np.float32)
        if biases:
            constant = biases[place].get_node()
            while constant.get_type_name() == "Convert":  # of bfloat16
                constant = constant.input_value(0).get_node()
            found = constant.get_data(dtype=np.float32).reshape(found.shape)
        return op.add(product, op.constant(np.where(found == 0, np.float32(_NEARLY_NOTHING), found)))

    both = with_bias(op.matmul(each, gate_up, False, True), 0, height)
    gate, up = (op.slice(both, ints([turn]), ints([height]), ints([2]), ints([2])) for turn in (0, 1))
    gated = op.swish(op.minimum(gate, op.constant(np.float32(wide))), op.constant(np.float32(alpha)))
    inner = op.multiply(op.add(op.clamp(up, -wide, wide), op.constant(np.float32(added or _NEARLY_NOTHING))), gated)
    return with_bias(op.matmul(inner, down, False, True), 1, width)


def _gelu_experts(each: Output, count: int, node: Node, matrices: list[Output]) -> Any:
    """What each expert makes of all tokens [E, T, d]. The form of GELU has a product for gate and one for up."""
    (gate, up), rest = _of_each(matrices, node.get_attribute("quantized"), count, stacks=2)
    (down,), _ = _of_each(rest, node.get_attribute("quantized_down"), count)
    gated = op.gelu(op.matmul(each, gate, False, True), _GELU[node.get_attribute("activation")])
    return op.matmul(op.multiply(gated, op.matmul(each, up, False, True)), down, False, True)


def _experts(node: Node) -> list[Output]:
    """All experts over all tokens, in a form of which OpenVINO makes GatherMatmul, which reads the matrices of the
    chosen ones alone (2026.4, convert_tiled_moe_block_to_gather_matmuls.cpp). `x` has to be a Reshape's."""
    x, index, weights, *matrices = (node.get_input(n) for n in range(node.get_input_size()))
    count, width = node.get_attribute("experts"), x.get_partial_shape()[1].get_length()
    each = op.reshape(op.tile(x, ints([count, 1])), ints([count, -1, width]), False).output(0)
    if node.get_attribute("activation", _SILU) == _SILU:
        made = _silu_experts(each, count, node, matrices)
    else:
        made = _gelu_experts(each, count, node, matrices)
    products = op.reshape(made, ints([count, 1, -1, width]), False)
    tokens = op.gather(op.shape_of(x), ints([0]), op.constant(np.int64(0)))
    nothing = op.broadcast(op.constant(np.float32(0)), op.concat([tokens, ints([count])], 0))
    dense = op.scatter_elements_update(nothing, index, weights, op.constant(np.int64(1)))
    shares = op.unsqueeze(op.reshape(op.transpose(dense, ints([1, 0])), ints([count, 1, -1]), False), ints(-1))
    total = op.reduce_sum(op.multiply(products, shares), ints([0]), False)
    return [op.reshape(total, ints([-1, width]), False).output(0)]


class Conversions:
    """What OpenVINO's frontend is given for the nodes of a graph.

    Args:
        part: name, location, offset and size of a weight → its bytes, or another matrix in its place.
        held: takes what constants lie in, which has to outlive them.
        threads: of a step.

    Attributes:
        group: activations that may share a scale beside the quantized weights seen; None before the first.
        dtypes: of the weights seen.
    """

    def __init__(
        self, part: Callable[[str, str, int, int], npt.NDArray[Any]], held: list[npt.NDArray[Any]], threads: int
    ) -> None:
        self._part, self._held, self._threads = part, held, threads
        self.group: int | None = None
        self.dtypes: set[str] = set()

    def extensions(self) -> list[Any]:
        """For `Core.add_extension`."""
        from openvino.frontend.onnx import ConversionExtension

        functions: dict[str, Callable[[Node], list[Output]]] = {
            "Weight": self._weight,
            "Linear": self._linear,
            "Experts": _experts,
            "Lookup": _lookup,
            "RMSNorm": _rms_norm,
            "Rotary": _rotary,
            "PagedAttention": _paged_attention,
            "Capped": capped_attention,
            "Before": before,
            "Earlier": earlier,
            "Convolution": lambda node: convolution(node, _widened),
            "Directions": lambda node: directions(node, _widened),
            "DeltaRule": delta_rule,
            "SelectiveRule": selective_rule,
        }
        return [ConversionExtension(name, DOMAIN, function) for name, function in functions.items()]

    def _weight(self, node: Node) -> list[Output]:
        name, location, dtype = (node.get_attribute(key) for key in ("name", "location", "dtype"))
        offset, size = (int(node.get_attribute(key)) for key in ("offset", "size"))
        shape = [int(n) for n in node.get_attribute("shape")]
        array = np.ascontiguousarray(self._part(name, location, offset, size)).reshape(-1).view(np.uint8)
        if min(shape, default=0) < 0 or -(-math.prod(shape) * BY_NAME[dtype].bits // 8) != array.size:
            raise ValueError(f"{name} is {dtype} {shape} of {array.size} bytes")  # OpenVINO would read on behind them
        self._held.append(array)
        self.dtypes.add(dtype)
        constant = ov.op.Constant(ov.Tensor(array, ov.Shape(shape), _TYPES[dtype]))
        return [constant.output(0)]

    def _linear(self, node: Node) -> list[Output]:
        inputs = [node.get_input(n) for n in range(node.get_input_size())]
        quantized = node.get_attribute("quantized")
        if quantized:
            block = inputs[1].get_partial_shape()[2].get_length()
            if block > _LARGEST_GROUP:  # a whole row; its activations with one scale would cost quality
                block = max(_LEAST_GROUP, math.gcd(block, _LARGEST_GROUP))
            self.group = min(block, self.group or block)
        weight, rest = _dequantized(inputs[1:], quantized)
        x = inputs[0]
        if self._threads == 1 and node.get_attribute("gated"):
            # In bfloat16 the plugin makes one kernel of a gated MLP, which divides by half the number of threads
            # (2026.4): with one thread that ends the process. An addition of nearly nothing keeps the kernel away
            x = op.add(x, op.constant(np.float32(_NEARLY_NOTHING)))
        product = op.matmul(x, weight, False, True)
        if rest:
            product = op.add(product, _widened(rest[0]))
        return [product.output(0)]

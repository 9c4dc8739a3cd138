"""External initializers → Weight nodes: the engine maps their bytes itself, so that no path depends on a folder."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import DOMAIN
from lora_drop_runtime.dtypes import BY_NAME

_NAMES = {dtype.onnx: name for name, dtype in BY_NAME.items()}


def graphs_in(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph, and those in it."""
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from graphs_in(attribute.as_graph())


def weights_as_nodes(graph: ir.Graph) -> None:
    for inner in list(graphs_in(graph)):
        for name, value in list(inner.initializers.items()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or not value.uses():
                continue
            node = ir.node(
                "Weight",
                [],
                {
                    "name": name.rpartition("/")[2],
                    "location": str(tensor.location),
                    "offset": int(tensor.offset or 0),
                    "size": int(tensor.length or 0),
                    "dtype": _NAMES[int(tensor.dtype)],
                    "shape": [int(size) for size in tensor.shape.numpy()],
                },
                domain=DOMAIN,
            )
            made = node.outputs[0]
            made.type, made.shape = value.type, value.shape
            value.replace_all_uses_with(made)
            inner.insert_before(inner[0], node)
            del inner.initializers[name]
            made.name = name

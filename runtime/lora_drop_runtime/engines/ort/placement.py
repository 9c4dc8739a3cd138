"""Where ONNX Runtime has placed the nodes of a graph: `enable_fallback=0` speaks of providers, not of nodes."""

from __future__ import annotations

from typing import Any

from lora_drop_runtime.errors import NoDeviceError

RECORD = "session.record_ep_graph_assignment_info"  # a session's option, without which it does not tell
# What makes shapes, which the host needs in order to launch anything; ONNX Runtime keeps it there on purpose
SHAPE_NODES = frozenset({"Concat", "Squeeze"})


def check_placement(session: Any, provider: str, file: str) -> None:
    """Refuse a graph of which more runs elsewhere than what makes shapes.

    Args:
        session: opened with the option `RECORD`.
        file: for the message.

    Raises:
        NoDeviceError: a node runs on another provider.
    """
    elsewhere = {
        f"{node.op_type} {node.name!r}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.domain or node.op_type not in SHAPE_NODES
    }
    if elsewhere:
        raise NoDeviceError(
            "The execution provider cannot run all of a graph.",
            note=f"{file}: {provider} leaves {len(elsewhere)} nodes to the CPU, among them {min(elsewhere)}.",
            hint="Export with another --policy or --dtype, or for another --target.",
        )

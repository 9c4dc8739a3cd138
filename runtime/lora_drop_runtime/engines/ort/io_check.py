"""A graph's inputs and outputs, as ONNX Runtime has loaded it, against the table of its step.

A manifest that says other sizes than the graph has is refused when the bundle is opened, not by a kernel in a step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lora_drop_runtime.bundle.graph_io import GraphIO
from lora_drop_runtime.errors import BundleError

_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}  # of the others the name is in the brackets


def _dtype(value: Any) -> str:
    return _DTYPES.get(value.type, str(value.type).removeprefix("tensor(").removesuffix(")"))


def _shapes_fit(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether numbers that stand at the same place are the same; a symbol takes any size."""
    return len(found) == len(wanted) and all(
        has == wants
        for has, wants in zip(found, wanted, strict=True)
        if isinstance(has, int) and isinstance(wants, int)
    )


def check_name(session: Any, name: str, file: str) -> None:
    """Refuse a graph with both steps whose LoRA step writes other caches than the plan says.

    Raises:
        BundleError: it does.
    """
    found = str(session.get_modelmeta().graph_name)
    if found != name:
        raise BundleError(
            "A graph does not fit the bundle's manifest.",
            note=f"{file} is called {found!r:.200}, the manifest's plan needs {name!r:.200}.",
            hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
        )


def check_beside(session: Any, names: Collection[str], file: str) -> None:
    """Refuse a graph without the inputs that the engine sets beside those of the table.

    Raises:
        BundleError: it lacks one.
    """
    missing = sorted(set(names) - {value.name for value in session.get_inputs()})
    if missing:
        raise BundleError(
            "A graph of the bundle is not of the form that this version runs.",
            note=f"{file} has no input {', '.join(missing)}.",
            hint="Export the model again.",
        )


def check_io(session: Any, io: GraphIO, file: str) -> None:
    """Refuse a graph that lacks an input or output of the table, or has it with another dtype or shape.

    Args:
        session: an onnxruntime.InferenceSession.
        file: for the message.

    Raises:
        BundleError: it differs.
    """
    for specs, values in ((io.inputs, session.get_inputs()), (io.outputs, session.get_outputs())):
        found = {value.name: value for value in values}
        for spec in specs:
            value = found.get(spec.name)
            if value is not None and _dtype(value) == spec.dtype and _shapes_fit(value.shape, spec.shape):
                continue
            has = "is missing" if value is None else f"is {_dtype(value)} {list(value.shape)}"
            raise BundleError(
                "A graph does not fit the bundle's manifest.",
                note=f"{file}: {spec.name} {has}, needed is {spec.dtype} {list(spec.shape)}.",
                hint="Check the bundle with: lora-drop inspect --check; or export the model again.",
            )

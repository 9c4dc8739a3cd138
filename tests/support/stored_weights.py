"""Exports of the tiny Llama's first three layers and where their weights lie."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from safetensors.torch import load_file, save_file

from lora_drop_export.cli import main
from tests.support.bundles import Family, first_layers

GRAPHS = ("refresh.onnx", "lora.onnx", "ort/steps.onnx")
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Place = tuple[str, int, int]
PLAN = {"always_first": 0, "always_last": 0}


def short(name: str = "llama", dtype: str = "float32") -> Family:
    return first_layers(name, 3, dtype)


def export(model: object, out: Path, *arguments: object) -> Bundle:
    options = ("--always-first", 0, "--always-last", 0, "--max-seq-len", 64, *arguments)
    assert main([str(a) for a in ("--model", model, "--out", out, *options)]) == 0
    return Bundle.open(out)


def tokens(bundle: Bundle | Path) -> list[list[int]]:
    with Session.open(bundle if isinstance(bundle, Path) else bundle.root) as session:
        return [row.tolist() for row in session.generate([[7, 3, 11, 19], [5]], 11)]


def save(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def cast(model: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Stores a checkpoint in another dtype and returns its tensors."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    save(tensors, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return tensors


def external(graph: Path) -> dict[str, Place]:
    """Initializer → (location, offset, length) of a graph's external tensors."""
    proto = onnx.load(graph, load_external_data=False)
    places = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            places[tensor.name] = entry["location"], int(entry["offset"]), int(entry["length"])
    return places


def inline_bytes(graph: Path) -> int:
    proto = onnx.load(graph, load_external_data=False)
    tensors = [a.t for node in proto.graph.node for a in node.attribute if a.HasField("t")]
    tensors += [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    return sum(tensor.ByteSize() for tensor in tensors)


def stored_bytes(bundle: Bundle) -> int:
    return sum(f.stat().st_size for f in bundle.root.glob("weights/*.safetensors"))

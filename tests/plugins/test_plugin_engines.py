"""Bundles of target tensorrt in the plugin form, from the export to logits: int4 weights as inputs, caches of 8 bits.

TensorRT's place is taken by PyTorch over the graph that its builder gets (tests/support/torch_trt.py), in which the
plugins' nodes call the kernels' own source on the host. The runtime is the real one, on a stand-in for CUDA.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime import BundleError, Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.errors import InputError
from lora_drop_tools.inspect import describe
from lora_drop_tools.shared import costs

from lora_drop_export.check.verify import compare
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.targets.trt import build
from plugins.kernels.binding import load_library
from tests.support import fake_library
from tests.support.bundles import Family, make_bundle, traced_family
from tests.support.fake_gpu import BINDINGS, FakeGpu
from tests.support.kernel_build import KERNELS, build_for_host
from tests.support.models import llama
from tests.support.torch_trt import TorchTrt

TARGET = "tensorrt"
LAYERS = 8
MATRICES = 7 * LAYERS + 1  # of llama: those of its layers, and the head


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_library(build_for_host(KERNELS, tmp_path_factory.mktemp("kernel") / "host.so"))


@pytest.fixture(scope="module")
def library(kernels: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchTrt]:
    """TensorRT with the plugins, and CUDA, for the exporter and the runtime."""
    plugin = tmp_path_factory.mktemp("plugin") / "liblora_drop_plugin.so"
    plugin.write_bytes(b"a plugin library")
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeGpu()
        trt = TorchTrt(cuda, kernels, rtx=False)
        patch.setenv("LORA_DROP_PLUGIN_LIB", str(plugin))
        for name in BINDINGS:
            patch.setitem(sys.modules, name, cuda)
        patch.setitem(sys.modules, "tensorrt", trt)
        patch.setattr(build, "EngineBuilder", fake_library.FakeBuilder)
        yield trt


@functools.cache
def source(dtype: str) -> Family:
    """A Llama whose weights are a quarter of the other tests': theirs are chaotic in half precision."""
    model = llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.25)
    return traced_family("llama.quarter", model, dtype)


@pytest.fixture(scope="module")
def made(library: TorchTrt, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle of target tensorrt, made once for each set of options."""

    @functools.cache
    def make(activations: str, /, **options: Any) -> Bundle:
        root = tmp_path_factory.mktemp("engines") / "bundle"
        fake_library.engines_of(root)
        options = {"targets": (TARGET,), "max_seq_len": 64, "max_prompt_len": 40, "rank": 2, "k": 2} | options
        return make_bundle(source(activations), root, **options)

    return make


def graph_of(bundle: Bundle, kind: StepKind) -> onnx.GraphProto:
    entry = bundle.target(TARGET)[1]
    assert isinstance(entry, TrtEntry)
    return onnx.load(bundle.root / entry.graphs[kind.value], load_external_data=False).graph


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


INT4 = {"dtype": "int4", "quantization": "rtn"}


def test_int4_weights_are_inputs_of_the_plugin(made: Callable[..., Bundle]) -> None:
    """Nothing is dequantized, joined layers are one product, and both steps read the same inputs."""
    bundle = made("bfloat16", **INT4)
    entry = bundle.target(TARGET)[1]
    assert (entry.form, entry.weight_sharing) == ("plugin", "inputs")
    table = bundle.weight_inputs(TARGET)
    dropped = len(bundle.manifest.plan.dropped_layers)
    for kind, layers in ((StepKind.REFRESH, LAYERS), (StepKind.LORA, LAYERS - dropped)):
        graph = graph_of(bundle, kind)
        counts = Counter(node.op_type for node in graph.node)
        assert counts["Int4Gemm"] == 4 * layers + 1  # q, k, v; o; gate, up; down; and the head
        assert not {"DequantizeLinear", "MatMul"} & set(counts)
        inputs = {value.name: value.type.tensor_type for value in graph.input}
        for node in graph.node:
            if node.op_type == "Int4Gemm":
                given = attributes(node)
                assert (given["plugin_version"], given["plugin_namespace"]) == (b"1", b"lora_drop")
                assert (given["block"], given["has_zero_points"]) == (32, 0)
                _, weights, scales = node.input
                assert inputs[weights].elem_type == onnx.TensorProto.INT8
                assert inputs[scales].elem_type == onnx.TensorProto.BFLOAT16
                rows, columns = (dim.dim_value for dim in inputs[weights].shape.dim)
                assert [dim.dim_value for dim in inputs[scales].shape.dim] == [rows, columns // 16]
        assert {name for name in inputs if name in table} == set(inputs) - {s.name for s in bundle.manifest.io(kind).inputs}
    packed = [weight for weight in table.values() if weight.dtype == "int8"]
    assert sum(len(weight.parts) for weight in packed) == MATRICES + 1  # and the embedding
    assert entry.weight_bytes == sum(weight.size_bytes for weight in table.values())
    assert any("weights once, as inputs of both engines" in line for line in describe(bundle))


def forced_steps(bundle: Bundle) -> list[np.ndarray]:
    with Session.open(bundle.root, target=TARGET) as session:
        prompts = np.array([[7, 3, 11, 19, 2], [5, 23, 29, 0, 0]])
        found = [session.prefill(prompts, lengths=[5, 3], max_new_tokens=9).copy()]
        return found + [session.step(np.array([3 + step, 40 + step])).copy() for step in range(8)]


CASES = {
    "int4": ("bfloat16", INT4),
    "int8 caches": ("float16", {"kv_dtype": "int8"}),
    "fp8 caches": ("float16", {"kv_dtype": "float8_e4m3fn"}),
    "int4, fp8 caches": ("bfloat16", INT4 | {"kv_dtype": "float8_e4m3fn"}),
    "int8 caches, float32": ("float32", {"kv_dtype": "int8"}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_pytorch(case: str, made: Callable[..., Bundle]) -> None:
    """A ragged prefill and two cycles of both steps, against PyTorch over the bundle's own weights and scales."""
    dtype, options = CASES[case]
    result = compare(made(dtype, **options), target=TARGET)
    assert result.passed, result.summary()
    print(case, max(step.max_rel_error for step in result.steps), min(step.cosine for step in result.steps))

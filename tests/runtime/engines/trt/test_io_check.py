"""The engines' inputs and outputs against the bundle's tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lora_drop_runtime import StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import TrtEntry
from lora_drop_runtime.dtypes import BY_TENSORRT
from lora_drop_runtime.engines.trt.io_check import EngineTensor, io_problems

from tests.support.device_steps import REFRESH
from tests.support.fake_trt import TARGET


def test_what_io_problems_finds(bundle: Bundle) -> None:
    manifest = bundle.manifest
    weights = bundle.weight_inputs(TARGET)
    slots = {"slots_kept": 63, "slots_dropped": 51}
    io = manifest.io(REFRESH, TARGET)

    def tensors() -> Iterator[EngineTensor]:
        for specs, is_input in ((io.inputs, True), (io.outputs, False)):
            for spec in specs:
                shape = tuple(slots.get(d, -1) if isinstance(d, str) else d for d in spec.shape)
                yield EngineTensor(spec.name, spec.dtype, shape, is_input)
        yield EngineTensor("model.norm.weight", "float32", (64,), True)

    whole = {tensor.name: tensor for tensor in tensors()}
    assert io_problems(whole.values(), io, weights, slots) == []
    for name, change, expected in (
        ("len_kept", None, "len_kept is missing"),
        ("x", EngineTensor("x", "float32", (1,), True), "x is in no table"),
        ("logits", EngineTensor("logits", "float16", (-1, -1, 131), False), "logits has dtype float16 where float32"),
        ("past_key.0", EngineTensor("past_key.0", "float32", (-1, 2, 64, 16), True), "past_key.0 has shape"),
        ("model.norm.weight", EngineTensor("model.norm.weight", "float32", (65,), True), "model.norm.weight has shape"),
        ("next_token", EngineTensor("next_token", "int64", (-1, -1), True), "next_token has is_input True"),
    ):
        changed = {k: v for k, v in {**whole, name: change}.items() if v is not None}
        (problem,) = io_problems(changed.values(), io, weights, slots)
        assert expected in problem


@pytest.mark.parametrize("name", ["residual", "recurrent, attn_mlp", "nothing dropped"])
def test_networks_that_tensorrt_rtx_parses_have_the_tables_inputs_and_outputs(bundles, name: str) -> None:
    """No GPU is needed to parse; dtypes and shapes are those that the session binds."""
    import onnx

    from lora_drop_export.console import Console
    from lora_drop_export.targets.trt.build import EngineBuilder
    from lora_drop_export.targets.trt.options import BuilderOptions

    pytest.importorskip("tensorrt_rtx")
    made = bundles(name)
    builder = EngineBuilder(TARGET, made.root, BuilderOptions(), Console())
    entry = made.manifest.targets[TARGET]
    assert isinstance(entry, TrtEntry)
    for kind in StepKind:
        proto = onnx.load(made.root / entry.graphs[kind.value], load_external_data=False)
        _, network = builder.parse(proto)
        tensors = [
            EngineTensor(tensor.name, BY_TENSORRT[tensor.dtype.name].name, tuple(tensor.shape), is_input)
            for get, count, is_input in (
                (network.get_input, network.num_inputs, True),
                (network.get_output, network.num_outputs, False),
            )
            for tensor in map(get, range(count))
        ]
        slots = {f"slots_{group}": size for group, size in entry.slots.items()}
        assert io_problems(tensors, made.manifest.io(kind, TARGET), made.weight_inputs(TARGET), slots) == []
        assert len(tensors) > 40

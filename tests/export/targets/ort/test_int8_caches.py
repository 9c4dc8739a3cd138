"""int8 caches in half precision: attention has one scale of 1, and activations are divided by those of the channels.

That is for the CUDA provider, whose fast kernel knows one scale for K and V together. Its graphs run on the CPU here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lora_drop_runtime.decoding.session import Session
from safetensors.torch import load_file

from lora_drop_export.check.verify import compare
from tests.support import oracle
from tests.support.bundles import Family, make_bundle, oracle_plan, traced_family
from tests.support.models import llama, quartered

PLAN = {"drop_layers": (1,), "always_first": 1, "k": 2}


@pytest.fixture(scope="module", params=[(64, 1), (20, 2)], ids=str)
def model(request: pytest.FixtureRequest) -> Family:
    """A Llama whose four query heads share K and V, or two each, with padding."""
    head_dim, kv_heads = request.param
    made = llama(head_dim=head_dim, num_key_value_heads=kv_heads, num_hidden_layers=3)
    return traced_family(f"quarter.{kv_heads}_heads_of_{head_dim}", quartered(made), "float16")


@pytest.fixture(scope="module", params=["skip", "fill"])
def bundle(request: pytest.FixtureRequest, model: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("int8") / "b"
    return make_bundle(model, root, kv_dtype="int8", policy=request.param, **PLAN)


def test_against_pytorch(bundle: Any) -> None:
    result = compare(bundle, provider="cpu", threads=1)
    assert result.passed, result


def test_against_the_oracle(model: Family, bundle: Any) -> None:
    """In float32 with the channels' own scales; caches that were not rounded are further away."""
    prompt, tokens = [5, 9, 2, 77], [11, 3, 60, 41, 7]
    plan, scales = oracle_plan(bundle), load_file(bundle.root / "weights/kv_scales.safetensors")
    exact = oracle.decode_row(model.model, plan, prompt, tokens, 2)
    plan.kv_scales = {
        layer: (scales[f"kv_scales.{layer}.key"][:, 0], scales[f"kv_scales.{layer}.value"][:, 0]) for layer in range(3)
    }
    rounded = oracle.decode_row(model.model, plan, prompt, tokens, 2)
    with Session.open(bundle.root, provider="cpu", threads=1) as session:
        found = [session.prefill([prompt], max_new_tokens=6)[0].copy()]
        found += [session.step([token])[0].copy() for token in tokens]
    for ours, theirs in zip(found, rounded, strict=True):
        assert np.abs(ours - theirs.numpy()).max() < 0.02 * theirs.abs().max()
    errors = [
        np.mean([np.square(a - b.numpy()).mean() for a, b in zip(found, side, strict=True)])
        for side in (rounded, exact)
    ]
    assert errors[0] < errors[1]


def test_one_scale_of_one_for_k_and_v(bundle: Any) -> None:
    """The same tensor: by its address the provider sees that its kernel may run. Scales of channels are constants."""
    graphs = bundle.target("ort")[1].graphs
    assert not [name for name in bundle.weight_inputs("ort") if name.startswith("kv_scales.")]
    for file in graphs.values():
        graph = onnx.load(bundle.root / file, load_external_data=False).graph
        constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
        stored = {tensor.name for tensor in graph.initializer}
        assert any(name.startswith("kv_scales.") for name in stored)
        attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        assert attentions
        for node in attentions:
            kinds = {one.name: one.s for one in node.attribute if one.name.endswith("quant_type")}
            assert kinds == {"k_quant_type": b"PER_TENSOR", "v_quant_type": b"PER_TENSOR"}
            assert node.input[12] == node.input[13]
            (value,) = constants[node.input[12]].attribute
            assert onnx.numpy_helper.to_array(value.t).tolist() == [1.0]


def test_the_export_says_where_the_fast_kernel_is_not(
    model: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four query heads to a K/V head, and 64 wide, it is there."""
    make_bundle(model, tmp_path / "b", kv_dtype="int8", **PLAN)
    said = capsys.readouterr()
    assert ("each step turns them back into halves" in said.out + said.err) == (model.model.config.head_dim != 64)

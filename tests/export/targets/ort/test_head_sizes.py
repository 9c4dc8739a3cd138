"""Heads of any size against eager PyTorch: GroupQueryAttention takes multiples of 8, and turns multiples of 16."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from lora_drop_runtime.decoding.session import Session

from lora_drop_export.check.verify import compare
from tests.support import oracle
from tests.support.bundles import Family, heads_of, make_bundle, oracle_plan
from tests.support.export_array import model_with
from tests.support.export_array import source as source_of_array

FORMS = {"int8": {"dtype": "int8"}, "int4": {"dtype": "int4"}, "int8 caches": {"kv_dtype": "int8"}}
PLAN = {"drop_layers": (1,), "always_first": 1, "k": 2, "rank": 2}


@pytest.fixture(scope="module", params=[(4, 2), (40, 1), (100, 1), (40, 2), (16, 2)], ids=str)
def model(request: pytest.FixtureRequest) -> Family:
    """With one K/V head to four query heads, which are folded, or with two."""
    head_dim, kv_heads = request.param
    if head_dim in (40, 100):
        source = source_of_array(model_with(head_dim=head_dim, kv_heads=kv_heads), "float32", "float32")
    else:
        source = heads_of(head_dim, kv_heads)
    return dataclasses.replace(source, checkpoint=dataclasses.replace(source.checkpoint, owned=True))


def operators(path: Path) -> list[onnx.NodeProto]:
    graphs = [onnx.load(path, load_external_data=False).graph]
    found = []
    for graph in graphs:
        for node in graph.node:
            found.append(node)
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_against_pytorch(model: Family, form: str, tmp_path: Path) -> None:
    """Caches of 8 bits under `fill` where two query heads share K and V, under `skip` where four do."""
    policy = "fill" if form == "int8 caches" and model.traced.heads[0].kv_heads == 2 else "skip"
    bundle = make_bundle(model, tmp_path / "b", policy=policy, **PLAN, **FORMS[form])
    result = compare(bundle, threads=1)
    assert result.passed, result
    rotated = [
        any(attribute.name == "do_rotary" and attribute.i for attribute in node.attribute)
        for node in operators(bundle.root / "ort/steps.onnx")
        if node.op_type == "GroupQueryAttention"
    ]
    assert rotated
    if form != "int8 caches":  # q, k and v are one product
        assert all(rotated) if bundle.manifest.model.head_dim == 16 else not any(rotated)


def test_against_the_oracle(model: Family, tmp_path: Path) -> None:
    policy = "backfill"  # its refreshes take several tokens at once
    bundle = make_bundle(model, tmp_path / "b", **PLAN)
    prompts, tokens = [[5, 9, 2, 77], [8]], [11, 3, 60, 41, 7]
    with Session.open(bundle.root, threads=1, policy=policy) as session:
        ids = np.array([prompts[0], [8, 0, 0, 0]])
        ours = [session.prefill(ids, np.array([4, 1]), max_new_tokens=6).copy()]
        ours += [session.step(np.array([token, token])).copy() for token in tokens]
    for row, prompt in enumerate(prompts):
        theirs = oracle.decode_row(model.model, oracle_plan(bundle), prompt, tokens, 2, policy)
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(a[row] - b.numpy()).max() < 3e-5 * b.abs().max()

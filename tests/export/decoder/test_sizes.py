"""Sizes that a trace knows are constants."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from tests.support.bundles import more_family


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_places_of_latent_keys_are_constants(name):
    """Else a GPU's graph would compute them of shapes, which ONNX Runtime does on the host."""
    graph = more_family(name).traced.graph.graph
    places = [node.inputs[1] for node in graph if node.op_type == "ScatterND"]
    assert places
    assert all(ir.convenience.get_const_tensor(value) is not None for value in places)

"""Shared by the tests of TensorRT's targets."""

from __future__ import annotations

import pytest

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.decoder.trace import TracedModel
from tests.support.bundles import traced_once


@pytest.fixture
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantized checkpoints are of one model, that of tests/export/checkpoint/test_packed.py, whatever is packed:
    its trace knows no weights."""

    def traced(checkpoint: Checkpoint, dtype: str) -> TracedModel:
        config = checkpoint.config
        sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
        assert (config.model_type, sizes) == ("llama", (64, 96, 2, 40))
        return traced_once("packed", checkpoint, dtype)

    monkeypatch.setattr("lora_drop_export.compiler.export.trace", traced)

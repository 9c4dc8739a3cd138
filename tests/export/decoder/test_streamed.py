"""A model whose layers have weights one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.decoder.build import build_model
from lora_drop_export.decoder.streamed import StreamedModel
from tests.support.models import gemma4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constants_are_rounded_as_in_a_model_of_the_dtype(dtype, tmp_path):
    """Gemma 4's embeddings have factors, which transformers keeps in the dtype of the model; √8 is rounded."""
    gemma4().save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"), tmp_path / "scratch")
    ours = dict(StreamedModel(checkpoint, np.array([1]), lambda call: call.query, dtype).model.named_buffers())
    theirs = dict(build_model(checkpoint, dtype).named_buffers())
    scale = "model.embed_tokens_per_layer.embed_scale"
    assert theirs[scale].dtype == getattr(torch, dtype)
    for name in [scale, *(one for one in theirs if one.endswith("inv_freq"))]:
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], theirs[name].float())

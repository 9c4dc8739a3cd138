"""The reference where it does not find a layer's halves."""

from __future__ import annotations

import pytest
from lora_drop_runtime.errors import ModelError

from lora_drop_export.check.verify import compare
from tests.support.bundles import first_layers, make_bundle


@pytest.mark.parametrize("names", [(), ("mlp",)], ids=["none", "behind-the-norm"])
@pytest.mark.parametrize(
    ("sites", "surrogate", "found"),
    [
        (("1.attn",), "residual", False),
        (("1.mlp",), "residual", False),
        (("1.attn", "1.mlp"), "recurrent", False),
        (("1.attn", "1.mlp"), "residual", True),  # nothing begins or ends there
        (("1",), "recurrent", True),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else str(value),
)
def test_halves_that_are_not_found_are_said(sites, surrogate, found, names, tmp_path, monkeypatch):
    """As in a model of a hub whose modules have names of their own; else its bundle is said to disagree."""
    monkeypatch.setattr("lora_drop_export.decoder.anatomy._AFTER_ATTENTION", names)
    options = {"drop_layers": sites, "surrogate": surrogate, "rank": 2, "always_first": 0}
    bundle = make_bundle(first_layers("llama", 3), tmp_path / "b", **options)
    if found:
        assert compare(bundle).passed
    else:
        with pytest.raises(ModelError, match=r"(?s)layer 1, a LlamaDecoderLayer.*--injection block"):
            compare(bundle)

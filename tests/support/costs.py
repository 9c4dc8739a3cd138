"""The manifest of the paper's example."""

from __future__ import annotations

from lora_drop_runtime.bundle.manifest import Limits, Manifest, ModelFacts, SpecialTokens
from lora_drop_runtime.plan.drop_plan import DropPlan, eligible_layers, spread_layers
from lora_drop_runtime.plan.sites import in_halves, sorted_sites
from lora_drop_tools.shared import costs

D, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 4096, 32, 8, 128, 14336, 128256  # LLaMA3-8B
KV_WEIGHTS = D * KV_HEADS * HEAD_DIM * 2 + D  # with the norm before them
ATTENTION_WEIGHTS = D * HEADS * HEAD_DIM * 2 + KV_WEIGHTS
LAYER_WEIGHTS = D * HEADS * HEAD_DIM * 2 + D * KV_HEADS * HEAD_DIM * 2 + 3 * D * FFN + 2 * D
HEAD_WEIGHTS = VOCAB * D + D  # lm_head and the last norm


def llama3_8b(ratio: float = 0.5, dtype: str = "bfloat16", injection: str = "block", **plan: object) -> Manifest:
    size = {"bfloat16": 2, "float32": 4}[dtype]
    model = ModelFacts(
        name="llama3-8b",
        model_type="llama",
        fingerprint="",
        num_layers=32,
        hidden_size=D,
        vocab_size=VOCAB,
        num_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        context_length=8192,
        dtype=dtype,
        windows=(0,) * 32,
        layer_bytes=(size * LAYER_WEIGHTS,) * 32,
        attention_bytes=(size * ATTENTION_WEIGHTS,) * 32,
        kv_bytes=(size * KV_WEIGHTS,) * 32,
        head_bytes=size * HEAD_WEIGHTS,
        embedding_row_bytes=size * D,
    )
    layers = spread_layers(eligible_layers(32), ratio)
    sites = in_halves(layers) if injection == "attn_mlp" else sorted_sites(layers)
    drop_plan = DropPlan(num_layers=32, **{"sites": sites, **plan})
    return Manifest(model, drop_plan, Limits(8192, 8000, 8), SpecialTokens())


def request_ceiling(manifest: Manifest, prompt: int, steps: int, k: int, rows: int = 1) -> float:
    """Of the periodic schedule under `skip`."""
    return costs.request_ceiling(manifest, prompt, steps, costs.request_bytes(manifest, prompt, steps, k, rows), rows)

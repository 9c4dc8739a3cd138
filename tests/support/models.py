"""Tiny random models, one function per family: eval, fp32, eager attention, the same weights every time.

All have 8 layers (those of `MORE_FAMILIES` 2), hidden size 64, 131 tokens, and no stop token; `FAMILIES` maps a name
to its builder.
Weights are large enough that every layer matters and that two logits are rarely close; norm weights lie
around 1 (so Gemma, which adds 1 to them, multiplies by about 2), biases are not zero: forgetting one shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

GEMMA2_WINDOW = 5  # positions, the token itself included; layers 0, 2, 4, 6 are windowed

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def skip_without(name: str) -> None:
    """Skip a test of a model that an older transformers does not have, by the name of its config."""
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")


def build(model_class: type, config_class: type, seed: int, **options: Any) -> transformers.PreTrainedModel:
    """The model with every parameter drawn from its own generator, whatever `transformers` initialises."""
    config = config_class(**{**SIZES, **options}, attn_implementation="eager")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def quartered(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same model with a quarter of each weight but norms', for half precision.

    In bfloat16 one of the full size is off by 0.3 of its largest logit in PyTorch itself, and this one by 0.01.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.25)
    return model


def llama(**options: Any) -> transformers.PreTrainedModel:
    return build(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, **{"seed": 1, "tie_word_embeddings": False, **options}
    )


def llama_tied() -> transformers.PreTrainedModel:
    return llama(seed=2, tie_word_embeddings=True)


def llama_mqa() -> transformers.PreTrainedModel:
    """One head of keys and values; positions at half the distance."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    return llama(seed=26, num_key_value_heads=1, rope_parameters=rope)


def llama_mha() -> transformers.PreTrainedModel:
    """As many heads of keys and values as of queries; RoPE has a factor of its own."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return llama(seed=7, num_key_value_heads=4, rope_parameters=rope)


def llama_bias() -> transformers.PreTrainedModel:
    """Biases of all products; frequencies by wavelength."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return llama(seed=8, attention_bias=True, mlp_bias=True, rope_parameters=rope)


def qwen2() -> transformers.PreTrainedModel:
    """Biases on q, k and v; tied."""
    return build(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, seed=9, tie_word_embeddings=True)


def qwen3() -> transformers.PreTrainedModel:
    """Norms on q and k; head_dim is not hidden_size / heads."""
    return build(
        transformers.Qwen3ForCausalLM, transformers.Qwen3Config, seed=20, head_dim=32, tie_word_embeddings=False
    )


def mistral() -> transformers.PreTrainedModel:
    return build(transformers.MistralForCausalLM, transformers.MistralConfig, seed=11, sliding_window=None)


def gemma2(**options: Any) -> transformers.PreTrainedModel:
    """Soft caps on scores and logits, every other layer windowed, four norms, scaled and tied embeddings."""
    return build(
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        seed=12,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=GEMMA2_WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
        tie_word_embeddings=True,
        **options,
    )


def phi3() -> transformers.PreTrainedModel:
    """Fused qkv and gate-up; RoPE on half of each head."""
    return build(
        transformers.Phi3ForCausalLM,
        transformers.Phi3Config,
        seed=13,
        sliding_window=None,
        original_max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    builder.__name__: builder
    for builder in (
        llama,
        llama_tied,
        llama_mqa,
        llama_mha,
        llama_bias,
        qwen2,
        qwen3,
        mistral,
        gemma2,
        phi3,
    )
}


FEW = {"num_hidden_layers": 2, "tie_word_embeddings": False}


def apertus() -> transformers.PreTrainedModel:
    """An activation function with learned numbers, and with buffers that checkpoints hold."""
    return build(transformers.ApertusForCausalLM, transformers.ApertusConfig, seed=41, **FEW)


def stablelm_parallel() -> transformers.PreTrainedModel:
    """Attention and MLP read one input, so the norm between them is None; as many norms of heads as layers."""
    options = FEW | {"num_attention_heads": 2, "use_parallel_residual": True, "qk_layernorm": True}
    return build(transformers.StableLmForCausalLM, transformers.StableLmConfig, seed=42, **options)


def phi3_longrope() -> transformers.PreTrainedModel:
    """Phi-3.5 and Phi-4-mini: frequencies by long factors behind 128 tokens; windows as wide as the context."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0}
    rope |= {f"{name}_factor": [start + 0.2 * n for n in range(8)] for name, start in (("short", 1.0), ("long", 3.0))}
    options = FEW | {"original_max_position_embeddings": 128, "sliding_window": 128, "rope_parameters": rope}
    return build(transformers.Phi3ForCausalLM, transformers.Phi3Config, seed=50, **options)


def exaone() -> transformers.PreTrainedModel:
    """A Llama whose checkpoint has other names, which transformers changes; frequencies change behind the context."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return build(transformers.LlamaForCausalLM, transformers.ExaoneConfig, seed=43, **FEW, rope_parameters=rope)


def gptj() -> transformers.PreTrainedModel:
    """Interleaved RoPE on half of each head; attention and MLP read one norm."""
    return build(transformers.GPTJForCausalLM, transformers.GPTJConfig, seed=44, **FEW, rotary_dim=8)


def codegen() -> transformers.PreTrainedModel:
    """q, k and v in one product, in another order than GPT-J's."""
    return build(transformers.CodeGenForCausalLM, transformers.CodeGenConfig, seed=45, **FEW, rotary_dim=8)


def gpt_neo() -> transformers.PreTrainedModel:
    """Attention in code of its own: scores that are not scaled, a window in one of two layers."""
    options = FEW | {"attention_types": [[["local", "global"], 1]], "window_size": 4}
    return build(transformers.GPTNeoForCausalLM, transformers.GPTNeoConfig, seed=46, **options)


def _falcon(seed: int, **options: Any) -> transformers.PreTrainedModel:
    options |= FEW | {"ffn_hidden_size": 96, "alibi": False}
    return build(transformers.FalconForCausalLM, transformers.FalconConfig, seed, **options)


def falcon() -> transformers.PreTrainedModel:
    """Attention in code of its own: one head of keys and values, in one product with the queries of all."""
    return _falcon(47, multi_query=True, parallel_attn=True)


def falcon_grouped() -> transformers.PreTrainedModel:
    """The product has queries, a key and a value for each group of heads; attention and MLP have a norm each."""
    return _falcon(48, new_decoder_architecture=True, num_kv_heads=2)


def falcon_heads() -> transformers.PreTrainedModel:
    """A key and a value for each head, attention and MLP one behind the other, biases."""
    return _falcon(49, multi_query=False, parallel_attn=False, bias=True, num_kv_heads=4)


_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
_WIDER_KEYS = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


def deepseek_v2() -> transformers.PreTrainedModel:
    """Latent attention that rotates in complex numbers, keys wider than values, experts in the second layer."""
    routed = {"q_lora_rank": None, "routed_scaling_factor": 2.0}
    options = FEW | _WIDER_KEYS | _EXPERTS | routed | {"num_key_value_heads": 4}
    return build(transformers.DeepseekV2ForCausalLM, transformers.DeepseekV2Config, seed=64, **options)


def deepseek_v3() -> transformers.PreTrainedModel:
    """Latent attention with keys wider than values; experts in the second layer, chosen from groups of them."""
    routed = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    options = FEW | _WIDER_KEYS | _EXPERTS | routed | {"q_lora_rank": 32, "num_key_value_heads": 4}
    return build(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config, seed=47, **options)


def minicpm3() -> transformers.PreTrainedModel:
    """Latent attention with values wider than keys: RoPE is on one head of these that all share, and on a part of the
    queries'.
    """
    latent = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 24}
    options = FEW | latent | {"num_key_value_heads": 4}
    return build(transformers.MiniCPM3ForCausalLM, transformers.MiniCPM3Config, seed=51, **options)


def modernbert_decoder() -> transformers.PreTrainedModel:
    """Its weights are drawn by code that fake tensors cannot run; a first layer without a norm, and with a window."""
    options = {"num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "local_attention": 5}
    options["layer_types"] = ["sliding_attention", "full_attention"]
    return build(transformers.ModernBertDecoderForCausalLM, transformers.ModernBertDecoderConfig, seed=49, **options)


def gemma3(**options: Any) -> transformers.PreTrainedModel:
    """Norms on q and k after the heads are put first; RoPE of its own in windowed layers."""
    own = FEW | {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    return build(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, seed=48, **own | options)


def gemma4(**options: Any) -> transformers.PreTrainedModel:
    """2 heads of 16 in windowed layers and 1 of 32 in the others, whose values are their keys; the last two layers take
    the K and V of the first and the third. An input of each layer's own."""
    own = FEW | {"head_dim": 16, "global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    windowed, full = "sliding_attention", "full_attention"
    own |= {"num_hidden_layers": 5, "layer_types": [windowed, full, full, windowed, full], "sliding_window": 5}
    own |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 131, "num_kv_shared_layers": 2}
    own |= {"tie_word_embeddings": True}
    model = build(transformers.Gemma4ForCausalLM, transformers.Gemma4TextConfig, 60, **own | options)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.layer_scalar.fill_(0.7)
            layer.self_attn.q_norm.weight.mul_(0.3)  # its scores have no factor, and softmax would hide all but one
    return model


def gemma4_experts(activation: str = "gelu_pytorch_tanh") -> transformers.PreTrainedModel:
    """Experts with a gate of GELU beside a dense MLP."""
    own = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32}
    own |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0}
    model = gemma4(**own, hidden_size_per_layer_input=0, hidden_activation=activation)
    with torch.no_grad():
        for layer in model.model.layers:
            for scale in (layer.router.scale, layer.router.per_expert_scale):
                scale.copy_(torch.linspace(0.5, 1.5, len(scale)))
    return model


def qwen2_moe() -> transformers.PreTrainedModel:
    """A dense layer, and one of experts that lie apart in the checkpoint, beside a shared one with a gate."""
    options = FEW | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    options |= {"shared_expert_intermediate_size": 48, "norm_topk_prob": False}
    return build(transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig, seed=61, **options)


def granitemoe() -> transformers.PreTrainedModel:
    """Experts that are one tensor in the checkpoint, whose weights in the sum are a softmax over the chosen ones."""
    options = FEW | {"num_local_experts": 4, "num_experts_per_tok": 3, "logits_scaling": 2.0}
    return build(transformers.GraniteMoeForCausalLM, transformers.GraniteMoeConfig, seed=62, **options)


def gpt_oss() -> transformers.PreTrainedModel:
    """Attention sinks, a window in one of two layers; experts with biases, a gate with limits, and what transformers
    has transposed."""
    options = FEW | {"num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 16, "swiglu_limit": 0.6}
    options |= {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return build(
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        seed=66,
        **options,
        rope_parameters=rope | {"truncate": False},
    )


def remembering(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same model with gated delta rules that forget half within 3 to 20 tokens."""
    generator = torch.Generator().manual_seed(71)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(-3.5 + 2 * torch.rand(parameter.shape, generator=generator))
    return model


def qwen3_5(**options: Any) -> transformers.PreTrainedModel:
    """Gated delta rules around an attention that has a gate; a quarter of a head turns."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    sizes |= {"linear_value_head_dim": 24, "head_dim": 16, "num_hidden_layers": 3, "tie_word_embeddings": True}
    sizes |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    config = transformers.Qwen3_5TextConfig
    return remembering(build(transformers.Qwen3_5ForCausalLM, config, seed=70, **sizes | options))


def lfm2(**options: Any) -> transformers.PreTrainedModel:
    """Short convolutions in two of three layers, one of them the last; an epsilon of its norms that matters."""
    own = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True}
    own |= {"block_auto_adjust_ff_dim": False, "norm_eps": 2.0}
    return build(transformers.Lfm2ForCausalLM, transformers.Lfm2Config, seed=67, **own | options)


# Of fewer layers and tested in fewer ways: what each of them adds to those above
MORE_FAMILIES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    builder.__name__: builder
    for builder in (
        apertus,
        stablelm_parallel,
        phi3_longrope,
        exaone,
        gptj,
        codegen,
        gpt_neo,
        falcon,
        falcon_grouped,
        falcon_heads,
        deepseek_v2,
        deepseek_v3,
        minicpm3,
        modernbert_decoder,
        gemma4,
        gemma4_experts,
        qwen2_moe,
        granitemoe,
        gpt_oss,
        lfm2,
        qwen3_5,
    )
}

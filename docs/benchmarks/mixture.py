"""Writes a mixture of experts with random weights, or a model with recurrent states.

python docs/benchmarks/mixture.py TOKENIZER_DIR OUT [--like NAME]    # gpt-oss, gemma-4, …

Built as OLMoE, 0.9 billion, of which a token is sent to 4 of 32 experts a layer; or four layers at their own width of
GPT-OSS-20B (4 of 32, 3.5 billion) or of Gemma 4 26B-A4B (8 of 128, 3.7 billion): 7 GB, in memory and on disk. Or of
DeepSeek-V2-Lite (6 of 64 and 2 for all, 2.2 billion). Or, without experts, 24 layers of Qwen3.5 or 36 of Falcon H1,
half a billion each, or 34 of Nemotron H, which are as many halves of others, 0.4 billion.
"""

from __future__ import annotations

import argparse
from typing import Any

LIKE = ("olmoe", "gpt-oss", "gemma-4", "deepseek-v2-lite", "qwen3.5", "falcon-h1", "nemotron-h")


def _config(like: str, **shared: Any) -> Any:
    from transformers import DeepseekV2Config, Gemma4TextConfig, GptOssConfig, OlmoeConfig

    if like == "gpt-oss":
        return GptOssConfig(num_hidden_layers=4, num_local_experts=32, **shared)
    if like == "gemma-4":
        return Gemma4TextConfig(
            hidden_size=2816,
            intermediate_size=2112,
            num_hidden_layers=4,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
            sliding_window=1024,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_global_key_value_heads=2,
            head_dim=256,
            global_head_dim=512,
            attention_k_eq_v=True,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            enable_moe_block=True,
            moe_intermediate_size=704,
            num_experts=128,
            top_k_experts=8,
            **shared,
        )
    if like == "deepseek-v2-lite":
        return DeepseekV2Config(
            hidden_size=2048,
            intermediate_size=10944,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=64,
            num_experts_per_tok=6,
            n_shared_experts=2,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            **shared,
        )
    if like == "qwen3.5":
        from transformers import Qwen3_5TextConfig

        return Qwen3_5TextConfig(
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            tie_word_embeddings=True,
            **shared,
        )
    if like == "falcon-h1":
        from transformers import FalconH1Config

        return FalconH1Config(
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=36,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            mamba_d_ssm=1536,
            mamba_n_heads=24,
            mamba_d_head=64,
            mamba_d_state=128,
            mamba_n_groups=1,
            mamba_rms_norm=False,
            tie_word_embeddings=True,
            **shared,
        )
    if like == "nemotron-h":
        from transformers import NemotronHConfig

        pairs = ["linear_attention", "mlp"] * 3
        return NemotronHConfig(
            hidden_size=1024,
            intermediate_size=4096,
            layers_block_type=[*pairs, "linear_attention", "full_attention", "mlp", *pairs, "full_attention", "mlp"]
            * 2,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            mamba_num_heads=32,
            mamba_head_dim=64,
            ssm_state_size=128,
            n_groups=8,
            tie_word_embeddings=True,
            **shared,
        )
    return OlmoeConfig(
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=32,
        num_experts_per_tok=4,
        tie_word_embeddings=True,
        **shared,
    )


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="a model's directory, whose tokenizer is taken")
    parser.add_argument("out")
    parser.add_argument("--like", choices=LIKE, default=LIKE[0])
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    config = _config(given.like, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()

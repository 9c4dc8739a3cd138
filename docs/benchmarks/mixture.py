"""Writes a mixture of experts with random weights, built as OLMoE: 0.9 billion, of which a token reads a quarter.

python docs/benchmarks/mixture.py TOKENIZER_DIR OUT
"""

from __future__ import annotations

import argparse


def main() -> None:
    import torch
    from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="a model's directory, whose tokenizer is taken")
    parser.add_argument("out")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=32,
        num_experts_per_tok=4,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()

"""Eight golden cases, computed by hand: 4 surrogates x 2 injections on a Llama whose arithmetic fits on paper.

Exports `golden_model()` and `GOLDEN`, a list of `GoldenCase` with the expected logits of every step. This
module does not run the algorithm: every expected number is written out, with the arithmetic that leads to it.

The model: 2 layers, hidden size 2, one head of width 16, 25 tokens. Its weights turn a layer into arithmetic.

* Each RMSNorm is the identity, exactly: eps = 2^40 swallows the mean square (below 2^16 it is under half an
  ulp) and the weight 2^20 undoes 1 / sqrt(2^40). So no root mean square may reach 256; none reaches 131.
* q and k are zero, so every visible slot gets the same weight and RoPE turns nothing: attention is the plain
  mean of the visible slots, so a hole, or a slot too many, changes it. v copies the 2 values in, o out.
* The gate is its bias alone, silu(32) = 32; up divides by 32, down multiplies by -1/2: mlp(h) = -h / 2.
* The embedding of token i is (i, 1); the head gives y1, y2, y1 + y2, y1 - y2, 2 y1 + y2, then zeros.

So a layer with input x and M = the mean of the visible inputs, its own included, computes

    h = x + M          (post-attention residual stream)
    y = h - h / 2 = (x + M) / 2

Prompt 18, 2; forced tokens 4, 0, 1, 17, 14, 24; k = 2, so the decode steps are LoRA, LoRA, refresh, twice.

Layer 0 is kept and sees every position. The second component is 1 everywhere: mean 1, y2 = (1 + 1) / 2 = 1.

    position  step       token  mean of the tokens so far         layer 0's y1 = layer 1's input x1
    0         prompt     18     18 / 1                     = 18   (18 + 18) / 2 = 18
    1         prompt      2     (18 + 2) / 2               = 10   ( 2 + 10) / 2 =  6
    2         LoRA        4     (18 + 2 + 4) / 3           =  8   ( 4 +  8) / 2 =  6
    3         LoRA        0     (24 + 0) / 4               =  6   ( 0 +  6) / 2 =  3
    4         refresh     1     (24 + 1) / 5               =  5   ( 1 +  5) / 2 =  3
    5         LoRA       17     (25 + 17) / 6              =  7   (17 +  7) / 2 = 12
    6         LoRA       14     (42 + 14) / 7              =  8   (14 +  8) / 2 = 11
    7         refresh    24     (56 + 24) / 8              = 10   (24 + 10) / 2 = 17

Layer 1 is dropped: it sees the prompt and the refreshes only. In full steps, whatever the surrogate:

    position  visible slots (positions)  M1                                   h                   y
    1         0, 1                       (18 + 6) / 2           = 12          ( 6 + 12, 2) = (18, 2)  ( 9, 1)
    4         0, 1, 4                    (18 + 6 + 3) / 3       =  9          ( 3 +  9, 2) = (12, 2)  ( 6, 1)
    7         0, 1, 4, 7                 (18 + 6 + 3 + 17) / 4  = 11          (17 + 11, 2) = (28, 2)  (14, 1)

(Without the holes M1 would be (18 + 6 + 6 + 3 + 3) / 5 = 36/5 at position 4 and 76/8 = 19/2 at position 7.)

The adapters have rank 1 and scale 1/2:

    block and attn:  A = [1, -1], B = [4, 2],  so s B A x = (x1 - x2) (2, 1)
    mlp:             A = [1, 1],  B = [2, -2], so s B A h = (h1 + h2) (1, -1)

    position 2: x = ( 6, 1)   (x1 - x2) (2, 1) =  5 (2, 1) = (10,  5)
    position 3: x = ( 3, 1)   (x1 - x2) (2, 1) =  2 (2, 1) = ( 4,  2)
    position 5: x = (12, 1)   (x1 - x2) (2, 1) = 11 (2, 1) = (22, 11)
    position 6: x = (11, 1)   (x1 - x2) (2, 1) = 10 (2, 1) = (20, 10)

Those of residual-delta read c = y - x at the anchor, too: (9, 1) - (6, 1) = (3, 0) at 1, (6, 1) - (3, 1) = (3, 0) at 4.

    block and attn:  A = [1, -1, 2, 1], so s B A (x, c) = (x1 - x2 + 6) (2, 1)
    mlp:             A = [1, 1, -1, 1], so s B A (h, c) = (h1 + h2 - 3) (1, -1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.oracle import OraclePlan

VOCAB = 25


@dataclass(frozen=True)
class GoldenCase:
    """One row: `logits` holds, as `[V]` each, those after the prompt and after each forced token."""

    name: str
    plan: OraclePlan
    prompt: list[int]
    forced: list[int]
    k: int
    logits: list[Tensor]


def golden_model() -> LlamaForCausalLM:
    """The model of the module's docstring: eval, fp32, eager."""
    # 16 is the narrowest head that ONNX Runtime's GroupQueryAttention rotates; the surplus of it is zero.
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=2.0**40,
        mlp_bias=True,
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    identity = torch.eye(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for token in range(VOCAB):
            model.model.embed_tokens.weight[token] = torch.tensor([float(token), 1.0])
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(2.0**20)
            layer.self_attn.v_proj.weight[:2] = identity
            layer.self_attn.o_proj.weight[:, :2] = identity
            layer.post_attention_layernorm.weight.fill_(2.0**20)
            layer.mlp.gate_proj.bias.fill_(32.0)
            layer.mlp.up_proj.weight.copy_(identity / 32)
            layer.mlp.down_proj.weight.copy_(-identity / 2)
        model.model.norm.weight.fill_(2.0**20)
        model.lm_head.weight[:5] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0], [2.0, 1.0]])
    return model


def _logits(y1: float, y2: float) -> Tensor:
    """The head applied to the last layer's output."""
    return torch.tensor([y1, y2, y1 + y2, y1 - y2, 2 * y1 + y2] + [0.0] * 20)


_FIRST = (torch.tensor([[1.0, -1.0]]), torch.tensor([[4.0], [2.0]]), 0.5)
_SECOND = (torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [-2.0]]), 0.5)
_BLOCK = {"1": _FIRST}
_DELTA_FIRST = (torch.tensor([[1.0, -1.0, 2.0, 1.0]]), *_FIRST[1:])
_DELTA_SECOND = (torch.tensor([[1.0, 1.0, -1.0, 1.0]]), *_SECOND[1:])
_ATTN_MLP = {"1.attn": _FIRST, "1.mlp": _SECOND}
_ROW = {"prompt": [18, 2], "forced": [4, 0, 1, 17, 14, 24], "k": 2}

GOLDEN: list[GoldenCase] = [
    # y_t = x_t + s B A x_t
    GoldenCase(
        "residual-block",
        OraclePlan(("1",), "residual", _BLOCK),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full
            _logits(6 + 10, 1 + 5),  # 2: x = (6, 1)
            _logits(3 + 4, 1 + 2),  # 3: x = (3, 1)
            _logits(6, 1),  # 4: full
            _logits(12 + 22, 1 + 11),  # 5: x = (12, 1)
            _logits(11 + 20, 1 + 10),  # 6: x = (11, 1)
            _logits(14, 1),  # 7: full
        ],
    ),
    # y_t = y_(t-1) + s B A x_t
    GoldenCase(
        "recurrent-block",
        OraclePlan(("1",), "recurrent", _BLOCK),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full
            _logits(9 + 10, 1 + 5),  # 2: from y = (9, 1), the last prompt token's
            _logits(19 + 4, 6 + 2),  # 3: from y = (19, 6), approximated
            _logits(6, 1),  # 4: full, and the state starts anew
            _logits(6 + 22, 1 + 11),  # 5: from y = (6, 1)
            _logits(28 + 20, 12 + 10),  # 6: from y = (28, 12), approximated
            _logits(14, 1),  # 7: full
        ],
    ),
    # y_t = y_a + s B A x_t
    GoldenCase(
        "anchor-block",
        OraclePlan(("1",), "anchor", _BLOCK),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full
            _logits(9 + 10, 1 + 5),  # 2: from the anchor at 1, y = (9, 1)
            _logits(9 + 4, 1 + 2),  # 3: from the same
            _logits(6, 1),  # 4: full, the new anchor
            _logits(6 + 22, 1 + 11),  # 5: from the anchor at 4, y = (6, 1)
            _logits(6 + 20, 1 + 10),  # 6: from the same
            _logits(14, 1),  # 7: full
        ],
    ),
    # h_t = x_t + s B1 A1 x_t, then y_t = h_t + s B2 A2 h_t; "sum" is h1 + h2 of h_t
    GoldenCase(
        "residual-attn_mlp",
        OraclePlan(("1.attn", "1.mlp"), "residual", _ATTN_MLP),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full
            _logits(16 + 22, 6 - 22),  # 2: h = (6, 1) + (10, 5) = (16, 6), sum 22
            _logits(7 + 10, 3 - 10),  # 3: h = (3, 1) + (4, 2) = (7, 3), sum 10
            _logits(6, 1),  # 4: full
            _logits(34 + 46, 12 - 46),  # 5: h = (12, 1) + (22, 11) = (34, 12), sum 46
            _logits(31 + 42, 11 - 42),  # 6: h = (11, 1) + (20, 10) = (31, 11), sum 42
            _logits(14, 1),  # 7: full
        ],
    ),
    # h_t = h_(t-1) + s B1 A1 x_t, then y_t = y_(t-1) + s B2 A2 h_t
    GoldenCase(
        "recurrent-attn_mlp",
        OraclePlan(("1.attn", "1.mlp"), "recurrent", _ATTN_MLP),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full, h = (18, 2)
            _logits(9 + 35, 1 - 35),  # 2: h = (18, 2) + (10, 5) = (28, 7), sum 35; from y = (9, 1)
            _logits(44 + 41, -34 - 41),  # 3: h = (28, 7) + (4, 2) = (32, 9), sum 41; from y = (44, -34)
            _logits(6, 1),  # 4: full, h = (12, 2)
            _logits(6 + 47, 1 - 47),  # 5: h = (12, 2) + (22, 11) = (34, 13), sum 47; from y = (6, 1)
            _logits(53 + 77, -46 - 77),  # 6: h = (34, 13) + (20, 10) = (54, 23), sum 77; from y = (53, -46)
            _logits(14, 1),  # 7: full
        ],
    ),
    # h_t = h_a + s B1 A1 x_t, then y_t = y_a + s B2 A2 h_t
    GoldenCase(
        "anchor-attn_mlp",
        OraclePlan(("1.attn", "1.mlp"), "anchor", _ATTN_MLP),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full, h = (18, 2)
            _logits(9 + 35, 1 - 35),  # 2: h = (18, 2) + (10, 5) = (28, 7), sum 35; from y = (9, 1)
            _logits(9 + 26, 1 - 26),  # 3: h = (18, 2) + (4, 2) = (22, 4), sum 26; from y = (9, 1)
            _logits(6, 1),  # 4: full, h = (12, 2)
            _logits(6 + 47, 1 - 47),  # 5: h = (12, 2) + (22, 11) = (34, 13), sum 47; from y = (6, 1)
            _logits(6 + 44, 1 - 44),  # 6: h = (12, 2) + (20, 10) = (32, 12), sum 44; from y = (6, 1)
            _logits(14, 1),  # 7: full
        ],
    ),
    # y_t = x_t + s B A (x_t, c)
    GoldenCase(
        "residual-delta-block",
        OraclePlan(("1",), "residual-delta", {"1": _DELTA_FIRST}),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full
            _logits(6 + 22, 1 + 11),  # 2: x = (6, 1), 6 - 1 + 6 = 11
            _logits(3 + 16, 1 + 8),  # 3: x = (3, 1), 3 - 1 + 6 = 8
            _logits(6, 1),  # 4: full
            _logits(12 + 34, 1 + 17),  # 5: x = (12, 1), 12 - 1 + 6 = 17
            _logits(11 + 32, 1 + 16),  # 6: x = (11, 1), 11 - 1 + 6 = 16
            _logits(14, 1),  # 7: full
        ],
    ),
    # h_t = x_t + s B1 A1 (x_t, c), then y_t = h_t + s B2 A2 (h_t, c); neighbours have one c
    GoldenCase(
        "residual-delta-attn_mlp",
        OraclePlan(("1.attn", "1.mlp"), "residual-delta", {"1.attn": _DELTA_FIRST, "1.mlp": _DELTA_SECOND}),
        **_ROW,
        logits=[
            _logits(9, 1),  # 1: full
            _logits(28 + 37, 12 - 37),  # 2: h = (6, 1) + (22, 11) = (28, 12), 40 - 3 = 37
            _logits(19 + 25, 9 - 25),  # 3: h = (3, 1) + (16, 8) = (19, 9), 28 - 3 = 25
            _logits(6, 1),  # 4: full
            _logits(46 + 61, 18 - 61),  # 5: h = (12, 1) + (34, 17) = (46, 18), 64 - 3 = 61
            _logits(43 + 57, 17 - 57),  # 6: h = (11, 1) + (32, 16) = (43, 17), 60 - 3 = 57
            _logits(14, 1),  # 7: full
        ],
    ),
]

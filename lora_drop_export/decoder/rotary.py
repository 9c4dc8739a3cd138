"""Rewrite rule that restores one RotaryEmbedding node from the arithmetic that transformers traces to.

    x·cos + concat(−x[D/2:], x[:D/2])·sin,  cos = [c, c] and sin = [s, s] unsqueezed over heads
        → RotaryEmbedding(x [B, H, S, D], c [B, S, D/2], s [B, S, D/2])

Gemma 4 turns x [B, S, H, D] and puts the heads first behind it; here they are put first before it.

Requires: x 4-D with static D, both tables made of two equal halves. Where it does not hold (interleaved RoPE) the
arithmetic stays as traced, which is correct as well.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import pattern

_HEADS_FIRST = (0, 2, 1, 3)
_PASS_THROUGH = {"Unsqueeze", "Cast", "Mul", "Cos", "Sin"}


def _constant(value: ir.Value) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(v) for v in tensor.numpy().reshape(-1)]


def _has_equal_halves(value: ir.Value) -> bool:
    """Whether a table comes, through elementwise nodes with scalars, from Concat(f, f)."""
    node = value.producer()
    while node is not None and node.op_type in _PASS_THROUGH:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


class _RotaryEmbedding(pattern.RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript ships no types
    axis_of_heads = 1

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, axes: Any, lo: Any, half: Any, end: Any) -> Any:
        low = op.Slice(x, lo, half, [3], [1])
        high = op.Slice(x, half, end, [3], [1])
        rotated = op.Concat(op.Neg(high), low, axis=-1)
        return op.Add(op.Mul(x, op.Unsqueeze(cos, axes)), op.Mul(rotated, op.Unsqueeze(sin, axes)))

    def check(self, context: Any, x: Any, cos: Any, sin: Any, axes: Any, lo: Any, half: Any, **_: Any) -> Any:
        result = pattern.MatchResult()
        if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
            return result.fail("x is not 4-D with a static head dim")
        if _constant(axes) != [self.axis_of_heads] or _constant(lo) != [0] or _constant(half) != [x.shape[3] // 2]:
            return result.fail("not the two halves of the head dim")
        if not (_has_equal_halves(cos) and _has_equal_halves(sin)):
            return result.fail("the tables are not [c, c]")
        return result

    def rewrite(self, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        half = x.shape[3] // 2
        zero, end, axis = (op.Constant(value_ints=[v]) for v in (0, half, 2))
        cos_half, sin_half = (op.Slice(table, zero, end, axis) for table in (cos, sin))  # [B, S, D/2]
        return op.RotaryEmbedding(x, cos_half, sin_half, interleaved=0)


class _RotaryBeforeHeads(_RotaryEmbedding):
    axis_of_heads = 2

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, axes: Any, lo: Any, half: Any, end: Any) -> Any:
        return op.Transpose(super().pattern(op, x, cos, sin, axes, lo, half, end), perm=list(_HEADS_FIRST))

    def rewrite(self, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        heads_first = op.Transpose(x, perm=list(_HEADS_FIRST))
        heads_first.type, heads_first.shape = x.type, ir.Shape([x.shape[axis] for axis in _HEADS_FIRST])
        return super().rewrite(op, heads_first, cos, sin)


def fuse_rotary_embedding(model: ir.Model) -> int:
    """Apply the rule in place; returns the number of RotaryEmbedding nodes made."""
    # In half precision all layers share one table, unsqueezed: a rule that removes its nodes would not match there
    rules = [kind.rule(remove_nodes=False) for kind in (_RotaryEmbedding, _RotaryBeforeHeads)]
    count: int = pattern.RewriteRuleSet(rules, commute=True).apply_to_model(model)
    CommonSubexpressionEliminationPass()(model)  # every layer makes its own copy of the same two halves
    RemoveUnusedNodesPass()(model)
    return count

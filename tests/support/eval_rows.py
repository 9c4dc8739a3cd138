"""Rows of an evaluation, for tests of what is made of them."""

from __future__ import annotations

import dataclasses

from lora_drop_tools.eval.result import EvalRow


def eval_row(k: int, speedup: float | None, rho: float = 0.25, **changed: object) -> EvalRow:
    """Of a bundle `b` that drops layer 4, under `skip`; without a text or a task unless `changed` has them."""
    row = EvalRow(
        bundle="b",
        label="b",
        method="LoRA-Drop",
        surrogate="residual",
        rank=0,
        sites=("4",),
        rho=rho,
        attentions=rho,
        weight_bytes=rho,
        policy="skip" if k else "full",
        k=k,
        kv_bytes=1000,
        speedup=speedup,
        text=None,
        tasks={},
        average=None,
        average_difference=None,
    )
    return dataclasses.replace(row, **changed)  # type: ignore[arg-type]

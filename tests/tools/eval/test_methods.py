"""Plans that the literature has a name for."""

from __future__ import annotations

import pytest
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_tools.eval.methods import method_of

BARE, ADAPTED = ("4.attn", "6.attn"), ("4.mlp", "6.mlp")


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (DropPlan(8, (4, 6)), "Unified Layer Skipping"),  # of 3 to 6, half
        (DropPlan(8, (3, 4, 5, 6)), "Unified Layer Skipping"),
        (DropPlan(8, (3, 4)), "LoRA-Drop"),
        (DropPlan(8, (4, 6), rank=2), "LoRA-Drop"),
        (DropPlan(8, (4, 6), surrogate="anchor"), "LoRA-Drop"),
        (DropPlan(8, ()), "LoRA-Drop"),
        (DropPlan(8, BARE + ADAPTED, rank=2, bare_sites=BARE, policy="fill"), "FlexiDepth, static"),
        (DropPlan(8, BARE + ADAPTED, rank=2, bare_sites=BARE, policy="backfill"), "LoRA-Drop"),
        (DropPlan(8, BARE + ADAPTED, rank=2, policy="fill"), "LoRA-Drop"),
        (DropPlan(8, (*BARE, "4.mlp"), rank=2, bare_sites=BARE, policy="fill"), "LoRA-Drop"),
        (DropPlan(8, BARE + ADAPTED, rank=2, bare_sites=ADAPTED, policy="fill"), "LoRA-Drop"),
    ],
)
def test_names(plan: DropPlan, name: str) -> None:
    assert method_of(plan) == name

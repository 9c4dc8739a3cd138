"""An oracle for surrogate forms that forgets nothing: every output of every site is kept under its position.

tests/support/oracle.py keeps one state per site and knows three forms by name. Here a base is looked up in the history.
"""

from __future__ import annotations

import torch
from lora_drop_runtime.plan.surrogate import Base
from torch import Tensor
from transformers import PreTrainedModel

from tests.support import oracle


class HistoryRow(oracle.Row):
    """One sequence; `plan.surrogate` plays no part."""

    def __init__(self, model: PreTrainedModel, plan: oracle.OraclePlan, base: Base) -> None:
        super().__init__(model, plan)
        self.kind = base
        self.outputs: dict[str, dict[int, Tensor]] = {site: {} for site in plan.sites}
        self.full_positions: list[int] = []

    def step(self, token: int, full: bool) -> Tensor:
        if full:
            self.full_positions.append(self.position)
        return super().step(token, full)

    def run_layer(self, i: int, own_forward, x: Tensor, **kwargs) -> Tensor:
        sites = [site for site in self.outputs if site.partition(".")[0] == str(i)]
        if self.full or not sites:
            y = own_forward(x, **kwargs)
            for site in sites:  # keep_h has seen what lies between the halves
                self.outputs[site][self.position] = self.h[i] if site.endswith(".attn") else y
            return y
        for site in sites:
            before = self.outputs[site]
            positions = {Base.PREVIOUS: self.position - 1, Base.ANCHOR: self.full_positions[-1]}
            found = x if self.kind is Base.INPUT else before[positions[self.kind]]
            x = before[self.position] = found + self.adapter(site, x)
        return x


def decode_row(
    model: PreTrainedModel, plan: oracle.OraclePlan, base: Base, prompt: list[int], forced: list[int], k: int
) -> list[Tensor]:
    """The logits `[V]` after the prompt and after each forced token, under `skip`."""
    row = HistoryRow(model, plan, base)
    found = [row.step(token, full=True) for token in prompt][-1:]
    return found + [row.step(token, full=j % (k + 1) == 0) for j, token in enumerate(forced, start=1)]


def history_plan(
    drop_layers: tuple[int, ...], injection: str, adapters: dict[str, tuple[Tensor, Tensor, float]] | None
) -> oracle.OraclePlan:
    """The oracle's plan; it has no name for the form."""
    return oracle.OraclePlan(oracle.sites_of(drop_layers, injection), adapters=adapters)


def random_matrices(sites: tuple[str, ...], width: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """site → (A [r, d], B [d, r]), big enough to matter."""
    generator = torch.Generator().manual_seed(7)
    return {
        site: tuple(torch.randn(*shape, generator=generator) * 0.2 for shape in ((rank, width), (width, rank)))
        for site in sites
    }

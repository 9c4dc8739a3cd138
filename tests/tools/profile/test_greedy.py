"""`lora-drop profile`: its KLs and the greedy order, from the oracle."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_drop_tools.profile.greedy import Greedy, ticks
from lora_drop_tools.profile.result import Profile
from transformers import PreTrainedModel

from tests.support import oracle
from tests.support.models import FAMILIES, SIZES
from tests.support.profiles import ELIGIBLE, PROMPT, TOLERANCE, WINDOW, K, make_scoring, random_windows, saved

# `lora_drop_tools.profile` is the function
greedy_module = importlib.import_module("lora_drop_tools.profile.greedy")
scoring_module = importlib.import_module("lora_drop_tools.profile.scoring")


def uneven() -> PreTrainedModel:
    """What layers write is scaled, so that the greedy order goes back and forth."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        for layer, scale in ((3, 0.2), (4, 0.7), (5, 0.3), (6, 0.5)):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(scale)
            model.model.layers[layer].mlp.down_proj.weight.mul_(scale)
    return model


def three(sites: Sequence[str]) -> bool:
    return len(sites) == 3


MODELS: dict[str, Callable[[], PreTrainedModel]] = {**FAMILIES, "uneven": uneven}


@functools.cache
def reference(name: str) -> PreTrainedModel:
    """The oracle's model, which it does not change."""
    return MODELS[name]()


def kl_by_oracle(
    name: str, windows: torch.Tensor, dropped: tuple[str, ...], policy: str, k: int = K, **surrogates: Any
) -> float:
    """Mean KL(full ‖ LoRA step), one token at a time; `surrogates` are the oracle's `surrogate` and `adapters`."""
    model, found = reference(name), []
    for ids in windows.tolist():
        with torch.no_grad():
            full = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        plan = oracle.OraclePlan(dropped, fill=policy == "fill", **surrogates)
        steps = oracle.decode_row(model, plan, ids[:PROMPT], ids[PROMPT:], k, policy)
        for j, logits in enumerate(steps):
            if j and not oracle.is_refresh(j, k):
                wanted = full[PROMPT - 1 + j]
                found.append(float((wanted.exp() * (wanted - logits.double().log_softmax(-1))).sum()))
    return float(np.mean(found))


@pytest.mark.parametrize("policy", ["skip", "backfill", "fill"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kl_is_the_oracles(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_module, "HEAD_ROWS", 5)  # of 14 LoRA steps a window
    windows = random_windows(2)
    scoring = make_scoring(FAMILIES[name](), policy)
    lists = [("5",), ("3", "5"), (), ("3.mlp", "5.attn")]
    expected = [kl_by_oracle(name, windows, one, policy) for one in lists if one]
    found = scoring.of_lists(windows, lists, lambda: None)
    assert found == pytest.approx([*expected[:2], 0.0, expected[2]], rel=TOLERANCE, abs=1e-6)
    greedy = Greedy(scoring, windows)
    alone = greedy.costs(["3", "5"])
    assert alone["5"] == pytest.approx(expected[0], rel=TOLERANCE)
    greedy.drop("3")
    assert greedy.costs(["5"])["5"] == pytest.approx(expected[1], rel=TOLERANCE)
    added = expected[1] - alone["3"]  # what the site is the price of, not the whole list
    assert greedy.prices["5"] / len(scoring.layout.lora) == pytest.approx(added, rel=0.01)
    assert greedy.kept_bytes > 2 * 8 * WINDOW * SIZES["hidden_size"] * 4


@functools.cache
def greedy_by_oracle(name: str, policy: str, count: int) -> tuple[dict[str, float], list[tuple[str, float]]]:
    windows, order = random_windows(count), []
    alone: dict[str, float] = {}
    for _ in range(3):
        before = [layer for layer, _ in order]
        costs = {
            layer: kl_by_oracle(name, windows, tuple(sorted([*before, layer])), policy)
            for layer in ELIGIBLE
            if layer not in before
        }
        alone = alone or costs
        best = min(costs, key=lambda layer: costs[layer])
        order.append((best, costs[best]))
    return alone, order


ORDERED = [("uneven", "backfill", 1), ("uneven", "skip", 1), ("qwen2", "skip", 2)]  # and windows


@pytest.mark.parametrize(("name", "policy", "count"), ORDERED)
def test_greedy_order_is_the_oracles(name: str, policy: str, count: int) -> None:
    expected_alone, expected = greedy_by_oracle(name, policy, count)
    ticked, reported = [], []
    greedy = Greedy(make_scoring(MODELS[name](), policy), random_windows(count), tick=lambda: ticked.append(1))
    alone, order = greedy.order(ELIGIBLE, three, lambda *found: reported.append(found))
    assert alone == pytest.approx(expected_alone, rel=TOLERANCE)
    assert [layer for layer, _ in order] == [layer for layer, _ in expected]
    assert [kl for _, kl in order] == pytest.approx([kl for _, kl in expected], rel=TOLERANCE)
    assert reported == order
    assert len(ticked) == ticks(4, 3, count) == count * (4 + 3 + 2)  # never more than 4 candidates: none is given up


def test_the_greedy_order_is_measured_again() -> None:
    """What the cases above show: it is not the order of what the layers cost alone, nor always from the last."""
    found = [
        (sorted(alone, key=alone.get), [i for i, _ in order])
        for alone, order in map(greedy_by_oracle, *zip(*ORDERED, strict=True))
    ]
    assert any(order != alone[:3] for alone, order in found)
    assert any(order != sorted(order, reverse=True) for _, order in found)


def test_the_costlier_half_is_given_up_after_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, ticked = random_windows(3), []
    scoring = make_scoring(FAMILIES["llama"](), "backfill")
    greedy = Greedy(scoring, windows, tick=lambda: ticked.append(1))
    whole = greedy.costs(ELIGIBLE)
    on_first = Greedy(scoring, windows[:1]).costs(ELIGIBLE)
    on_second = Greedy(scoring, windows[1:2]).costs(ELIGIBLE)
    half = sorted(ELIGIBLE, key=lambda i: on_first[i])[:2]
    last = min(half, key=lambda i: on_first[i] + on_second[i])
    ticked.clear()
    assert greedy.costs(ELIGIBLE, 1) == pytest.approx({last: whole[last]})
    assert len(ticked) == 4 + 2 + 1
    assert greedy.costs(ELIGIBLE, 3).keys() == set(sorted(ELIGIBLE, key=lambda i: on_first[i])[:3])
    monkeypatch.setattr(greedy_module, "SURVIVORS", 1)
    ticked.clear()
    greedy.order(ELIGIBLE, three, lambda *_: None)
    assert len(ticked) == ticks(4, 3, 3) == 3 * 4 + (3 + 1 + 1) + (2 + 1 + 1)


def test_of_equal_sites_the_earlier_one_is_cheaper() -> None:
    costs = {"11": 0.5, "10": 0.5, "9.mlp": 0.5, "9.attn": 0.5, "3": 0.7}
    assert greedy_module._cheapest(costs, 4) == ["9.attn", "9.mlp", "10", "11"]


def test_a_layer_that_does_nothing_comes_first(short: Callable[..., Profile], tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[5].self_attn.o_proj.weight.zero_()
        model.model.layers[5].mlp.down_proj.weight.zero_()
    result = short(saved(model, tmp_path / "model"), tmp_path / "out")
    assert result.sites[5].influence_cosine == pytest.approx(1, abs=1e-6)
    assert result.sites[5].base_errors["residual"] == 0
    assert result.sites[5].kl_alone == pytest.approx(0, abs=1e-6)
    assert result.rankings["influence"][0] == result.rankings["sensitivity"][0] == "5"

"""Sites: their names, and plans that drop halves."""

from __future__ import annotations

import dataclasses

import pytest
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.sites import in_halves, parse_sites, sorted_sites

PLAN = DropPlan(8, ("5.mlp", "3", "4.attn", "6.mlp", "6.attn"))
WINDOWED = DropPlan(8, (), windowed_layers=(3, 4))


@pytest.mark.parametrize(
    ("text", "sites"),
    [
        ("4,6,9", ("4", "6", "9")),
        (" 9, 4 ", ("4", "9")),
        ("10,9", ("9", "10")),
        ("9.mlp,9.attn,4", ("4", "9.attn", "9.mlp")),
        ("0", ("0",)),
    ],
)
def test_parse_sites(text: str, sites: tuple[str, ...]) -> None:
    assert parse_sites(text) == sites


@pytest.mark.parametrize(
    "text",
    ["4-6", "four", "4;6", "4.0", "4,", "4,,5", ",", "", "-1", "04", "4.attn.mlp", "4.Attn", ".attn", "4.", "1e3", "٤"],
)
def test_parse_sites_refuses(text: str) -> None:
    with pytest.raises(PlanError) as refused:
        parse_sites(text)
    assert "no layer and no half" in refused.value.fact
    assert "9.attn" in refused.value.hint


@pytest.mark.parametrize("value", [1.0, None, True, b"4"])
def test_only_names_and_numbers(value: object) -> None:
    with pytest.raises(PlanError):
        sorted_sites([value])


def test_in_halves() -> None:
    assert in_halves((4, "9.mlp")) == ("4.attn", "4.mlp", "9.mlp")


def test_what_a_plan_with_halves_drops() -> None:
    assert PLAN.sites == ("3", "4.attn", "5.mlp", "6.attn", "6.mlp")
    assert PLAN.dropped_attentions == (3, 4, 6)
    assert PLAN.kept_attentions == (0, 1, 2, 5, 7)
    assert PLAN.dropped_mlps == (3, 5, 6)
    assert PLAN.dropped_layers == (3, 6)
    assert PLAN.halves_alone == ("4.attn", "5.mlp")
    assert [PLAN.sites_of(i) for i in (2, 3, 6)] == [(), ("3",), ("6.attn", "6.mlp")]
    assert (PLAN.rho, PLAN.rho_eff, PLAN.attention_share) == (0.5, 0.25, 0.375)


def test_sites_without_an_adapter() -> None:
    plan = dataclasses.replace(PLAN, surrogate="recurrent", rank=2, bare_sites=("4.attn", "6.attn"))
    assert plan.adapted_sites == plan.updated_states == ("3", "5.mlp", "6.mlp")
    assert dataclasses.replace(plan, rank=0).bare_sites == dataclasses.replace(plan, rank=0).adapted_sites == ()
    with pytest.raises(PlanError, match="not in the drop list"):
        dataclasses.replace(plan, bare_sites=("4",))


@pytest.mark.parametrize(
    ("sites", "fact"),
    [
        (("4", "4.attn"), "a layer and a half of it"),
        (("4.mlp", 4), "a layer and a half of it"),
        (("4.attn", "4.attn"), "twice"),
        (("8.mlp",), "does not have"),
        (("2.attn",), "always kept"),
        (("7.mlp",), "always kept"),
    ],
)
def test_a_plan_refuses(sites: tuple[str, ...], fact: str) -> None:
    with pytest.raises(PlanError, match=fact):
        dataclasses.replace(PLAN, sites=sites)


@pytest.mark.parametrize("policy", POLICIES)
def test_halves_of_windowed_layers(policy: str) -> None:
    """MLPs always; attentions where the policy leaves no holes, and such a plan then refuses `skip`."""
    plan = dataclasses.replace(WINDOWED, sites=("4.mlp",), policy=policy)
    plan.check_policy(POLICIES["skip" if policy != "fill" else "fill"])
    for sites in (("4.attn",), ("4",)):
        if policy == "skip":
            with pytest.raises(PlanError, match="always kept") as refused:
                dataclasses.replace(plan, sites=sites)
            assert "4.mlp" in refused.value.hint
            assert "--policy backfill" in refused.value.hint
            continue
        dropped = dataclasses.replace(plan, sites=sites)
        dropped.check_policy(POLICIES[policy])
        with pytest.raises(PlanError, match="policy skip"):
            dropped.check_policy(POLICIES["skip"])


@pytest.mark.parametrize("of_the_bundle", POLICIES)
@pytest.mark.parametrize("asked", POLICIES)
def test_fill_is_chosen_at_the_export(of_the_bundle: str, asked: str) -> None:
    plan = dataclasses.replace(PLAN, policy=of_the_bundle)
    if (asked == "fill") == (of_the_bundle == "fill"):
        plan.check_policy(POLICIES[asked])
        return
    with pytest.raises(PlanError) as refused:
        plan.check_policy(POLICIES[asked])
    assert f"policy {asked}" in refused.value.fact
    assert f"--policy {of_the_bundle}" in refused.value.note

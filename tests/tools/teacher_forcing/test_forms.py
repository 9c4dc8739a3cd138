"""Teacher forcing, the fit and the profile act on the facts of policies and surrogate forms, not on their names."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES, Backfill, Policy, Skip
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_runtime.plan.surrogate import SURROGATES, Base, SurrogateForm
from lora_drop_tools.fit.distill import run_batch
from lora_drop_tools.profile.measures import site_figures
from lora_drop_tools.teacher_forcing.closed_form import Site, batches_of, walk
from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
from lora_drop_tools.teacher_forcing.layout import Layout, check_policy

from tests.support import oracle
from tests.support.history import decode_row, history_plan, random_matrices
from tests.support.models import FAMILIES

TOLERANCE = 3e-5  # of the row's largest |logit|: float32 sums in another order
PROMPT, TOKENS = 5, 19


def texts() -> torch.Tensor:
    return torch.randint(0, 131, (2, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("injection", ["block", "attn_mlp"])
@pytest.mark.parametrize("base", Base, ids=[base.name for base in Base])
def test_a_new_form_is_decoded_as_the_oracle_does(base: Base, injection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SURROGATES, "homemade", SurrogateForm("homemade", base))
    plan = DropPlan(8, oracle.sites_of((3, 4, 6), injection), surrogate="homemade", rank=3)
    model, ids, matrices = FAMILIES["llama"](), texts(), random_matrices(plan.sites, 64, 3)
    theirs = history_plan((3, 4, 6), injection, {site: (a, b, 1.0) for site, (a, b) in matrices.items()})
    forcing, layout = TeacherForcing(copy.deepcopy(model)), Layout.of(TOKENS, PROMPT, PeriodicSchedule(3))
    with torch.no_grad():
        ours = forcing.logits(forcing.decode(forcing.exact(ids), ids, layout, plan, matrices, Skip("another name")))
    for row in range(2):
        tokens = ids[row].tolist()
        for at, wanted in enumerate(decode_row(model, theirs, base, tokens[:PROMPT], tokens[PROMPT:], 3)):
            assert (ours[row, PROMPT - 1 + at] - wanted).abs().max() < TOLERANCE * wanted.abs().max(), (row, at)


@pytest.mark.parametrize("policy", [Skip("another name"), Backfill("another name")], ids=["holes", "exact"])
def test_a_policy_counts_by_its_facts(policy: Policy) -> None:
    """The same facts under another name give the same figures, and other facts other ones."""
    plan, ids, layout = DropPlan(8, ("3", "5.attn")), texts(), Layout.of(TOKENS, PROMPT, PeriodicSchedule(2))
    found = {}
    for name, one in (*POLICIES.items(), ("toy", policy)):
        forcing = TeacherForcing(FAMILIES["qwen2"]())
        sums = run_batch(forcing, ids, layout, plan, {}, one)
        moments: list[float] = []

        def choose(_: str, site: Site, to: list[float] = moments) -> None:
            to.append(site.fit.yy)

        walk(forcing, batches_of(forcing, [(ids, layout)]), plan, one, [(site,) for site in plan.sites], choose)
        found[name] = (vars(sums), moments)
    same = [name for name in POLICIES if found[name] == found["toy"]]
    assert same == [name for name, one in POLICIES.items() if isinstance(one, type(policy))]


def test_a_profile_has_a_figure_for_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SURROGATES, "homemade", SurrogateForm("homemade", Base.ANCHOR))
    forcing = TeacherForcing(FAMILIES["llama"]())
    for figures in site_figures(forcing, torch.randint(0, 131, (1, 24)), 3, lambda: None).values():
        assert list(figures.base_errors) == ["residual", "recurrent", "anchor", "homemade"]
        assert figures.base_errors["homemade"] == figures.base_errors["anchor"] != figures.base_errors["recurrent"]


def test_a_policy_between_the_two_streams_is_refused() -> None:
    class AllButOne(Policy):
        leaves_holes = True
        exact_refreshes = False

        def steps_taken_back(self, lora_steps: int) -> int:
            return max(0, lora_steps - 1)

    policy = AllButOne("all but one")
    check_policy(policy, 1)  # takes nothing back, as skip
    with pytest.raises(PlanError, match="all tokens at once") as caught:
        check_policy(policy, 2)
    assert "under all but one takes some of 2 LoRA steps back" in str(caught.value)
    for known in POLICIES.values():
        check_policy(known, 5)

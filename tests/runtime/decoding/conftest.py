"""Shared by the tests of the session."""

from __future__ import annotations

import pytest
from lora_drop_runtime.plan.drop_plan import DropPlan

from tests.support.decoding import PLANS


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def plan(request: pytest.FixtureRequest) -> DropPlan:
    return request.param

"""The API's description is true: whatever may be asked by it is answered by it, and never with a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.text import TextCodec
from schemathesis.specs.openapi.checks import negative_data_rejection

from tests.support.serving import Served, serving

from .test_errors import check_alive


@pytest.fixture(scope="module")
def keyed(bundle: Bundle) -> Iterator[Served]:
    batch = Batch.open(bundle.root, slots=4, policy="backfill", max_seq_len=32, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer"), api_key="sesame") as server:
        yield server


@pytest.fixture(scope="module")
def described(keyed: Served) -> Any:
    return schemathesis.openapi.from_url(f"{keyed.address}/openapi.json")


api = schemathesis.pytest.from_fixture("described")


@api.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_what_is_asked_by_the_description_is_answered_by_it(case: schemathesis.Case) -> None:
    answer = case.call(headers={"Authorization": "Bearer sesame"})
    assert answer.status_code < 500
    case.validate_response(answer)

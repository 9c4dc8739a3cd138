"""The API's description is true: whatever may be asked by it is answered by it, and never with a 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.requests import MOST_BODY_BYTES
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.support.serving import Served, serving

KEY = {"Authorization": "Bearer sesame"}
GET = "/health", "/ready", "/metrics", "/v1/models", "/v1/models/{name}"
POST = "/v1/completions", "/v1/chat/completions", "/v1/responses"
ROUTES = [*(("GET", path) for path in GET), *(("POST", path) for path in POST)]
ANSWERS = {200, 400, 401, 404}  # 408, 413, 429, 500 and 503 take other causes than a small body


@pytest.fixture(scope="module")
def keyed(bundle: Bundle) -> Iterator[Served]:
    batch = Batch.open(bundle.root, slots=4, policy="backfill", max_seq_len=32, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer"), api_key="sesame") as server:
        yield server


@pytest.fixture(scope="module")
def described(keyed: Served) -> Any:
    return schemathesis.openapi.from_url(f"{keyed.address}/openapi.json")


def test_it_describes_all_routes(described: Any) -> None:
    found = [found.ok() for found in described.get_all_operations()]
    assert sorted((one.method.upper(), one.path) for one in found) == sorted(ROUTES)


def enums(value: Any) -> Iterator[list[Any]]:
    held = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    if isinstance(value, dict) and isinstance(value.get("enum"), list):
        yield value["enum"]
    for one in held:
        yield from enums(one)


def test_generators_of_clients_can_read_it(keyed: Served) -> None:
    """openapi-python-client leaves out a route whose body has an `enum` of lists, or of several types."""
    found = list(enums(keyed.http.get("/openapi.json").json()))
    assert found
    assert all({type(value) for value in values} in ({str}, {int}) for values in found)


# What hypothesis makes depends on which modules are loaded
EXAMPLES = {("positive", "POST"): 45, ("negative", "POST"): 30}
NAMED, PLAIN = 20, 10  # of a path with a name in it, and of those that take nothing


@pytest.mark.parametrize(
    ("mode", "method", "path"),
    [
        *(("positive", *route) for route in ROUTES),
        *(("negative", *route) for route in ROUTES[2:]),  # the first two take nothing that could be wrong
    ],
    ids=str,
)
def test_what_is_asked_is_answered_as_described(
    keyed: Served, described: Any, mode: str, method: str, path: str
) -> None:
    """Status, content type and body; and `negative`, what the description forbids, is refused."""
    operation, statuses = described[path][method], Counter[int]()
    examples = EXAMPLES.get((mode, method), NAMED if "{" in path else PLAIN)
    generation = schemathesis.GenerationMode(mode)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=generation))
    def ask(case: schemathesis.Case) -> None:
        if (mode, path) == ("positive", POST[1]):
            for message in case.body["messages"]:  # it may be left out beside calls, else that is all that is found
                message.setdefault("content", "t1")
        answer = case.call(headers=KEY, session=session)
        if answer.status_code == 413:  # refused unread, as far more messages than there may be: not what is asked here
            assert len(answer.request.body) > MOST_BODY_BYTES
            return
        statuses[answer.status_code] += 1
        # A body may be in order and still ask for more than fits here
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    with requests.Session() as session:
        ask()
    assert statuses.keys() <= ANSWERS
    assert 200 in statuses or mode == "negative" or "{" in path
    keyed.await_rows(0)

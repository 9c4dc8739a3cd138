"""A bundle of target openvino behind HTTP: what a server asks of an engine beyond single tokens of single rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from lora_drop_runtime import Batch, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec
from lora_drop_tools.serve import ServeSettings

from tests.support.bundles import make_bundle
from tests.support.serving import Served, await_that, serving
from tests.support.tokenizers import byte_tokenizer

from .test_constraints import CITY, schema

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[openvino]'")
COMPLETIONS = "/v1/completions"
PROMPT = [5, 17, 40, 33, 8, 61, 90, 2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("openvino") / "b"
    make_bundle("llama", root, targets=("ort", "openvino"), drop_layers=(3, 4, 6), k=3, max_batch=8, max_seq_len=256)
    byte_tokenizer(root)
    return Bundle.open(root)


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Served]:
    batch = Batch.open(bundle.root, slots=4, policy="backfill", target="openvino", threads=1, keep_prefixes=True)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as server:
        yield server


def choices(served: Served, **fields: Any) -> list[dict[str, Any]]:
    answer = served.http.post(COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 20, "seed": 4, **fields})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["choices"]
    return found


def test_streams_and_choices_are_what_each_is_alone(served: Served) -> None:
    both = [choice["text"] for choice in choices(served, n=2)]
    assert both == [choices(served, seed=4 + index)[0]["text"] for index in range(2)]
    streamed = served.http.post(
        COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 20, "seed": 4, "n": 2, "stream": True}
    )
    texts = ["", ""]
    for line in filter(None, streamed.text.splitlines()[:-2]):
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == both


def test_logprobs_of_a_prompt_are_those_of_onnx_runtime(served: Served, bundle: Bundle) -> None:
    for policy, k in (("backfill", 0), ("lossless", 3)):
        (choice,) = choices(served, max_tokens=1, echo=True, logprobs=0, k=k, policy=policy)
        ours = choice["logprobs"]["token_logprobs"][: len(PROMPT)]
        assert ours[0] is None
        with Session.open(bundle.root, target="ort", k=0, threads=1) as session:
            for place in range(1, len(PROMPT)):
                logits = session.prefill(np.array([PROMPT[:place]]), max_new_tokens=1)[0].astype(np.float64)
                wanted = logits[PROMPT[place]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
                assert abs(ours[place] - wanted) < 1e-3


def test_json_follows_its_schema(served: Served) -> None:
    for policy in ("skip", "backfill", "lossless"):
        for choice in choices(served, max_tokens=200, n=2, policy=policy, **schema(CITY)):
            jsonschema.validate(json.loads(choice["text"]), CITY)


def test_who_goes_away_gives_its_blocks_back(served: Served) -> None:
    for _ in range(5):
        body = {"prompt": PROMPT, "max_tokens": 200, "n": 8, "stream": True}
        with served.http.stream("POST", COMPLETIONS, json=body) as answer:
            next(answer.iter_lines())
    served.await_rows(0)
    assert served.metrics()['lora_drop_kv_bytes{of="kept"}'] == 0
    assert len({choices(served, temperature=0)[0]["text"] for _ in range(5)}) == 1


def test_rows_wait_for_room_in_the_caches(bundle: Bundle) -> None:
    """Of four slots two are free, and rows that wait for blocks are counted as waiting; one whole row has to fit."""
    settings = ServeSettings(slots=4, policy="backfill", target="openvino", threads=1, max_seq_len=64)
    with settings.open(bundle) as batch:
        row = batch.row_bytes
    with pytest.raises(InputError, match="no room for one whole row") as refused:
        dataclasses.replace(settings, kv_cache_bytes=row - 1).open(bundle)
    assert f"It is {row - 1}; a row of 64 tokens may take {row}." in refused.value.note
    batch = dataclasses.replace(settings, kv_cache_bytes=2 * row).open(bundle)
    body = {"prompt": [PROMPT] * 4, "max_tokens": 56, "seed": 4}
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as served:
        driver, seen = served.driver, set[tuple[float, float]]()
        give = driver._give

        def watched(*arguments: Any) -> None:
            give(*arguments)
            seen.add((driver.metrics.running._value.get(), driver.metrics.waiting._value.get()))

        driver._give = watched  # type: ignore[method-assign]
        texts = [choice["text"] for choice in served.http.post(COMPLETIONS, json=body).json()["choices"]]
        await_that(lambda: served.metrics()["lora_drop_rows_running"] == 0)
    assert max(running for running, _ in seen) == 2
    assert (2.0, 2.0) in seen
    assert len(set(texts)) == 1

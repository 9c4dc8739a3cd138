"""The server over an engine that runs whole cycles: answers are those of each request alone.

On a fake CUDA and a fake TensorRT, with the kernel that chooses tokens on the host; on no GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime import Batch, SamplingOptions
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.trt.cycle import DeviceCycle
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_runtime.text import TextCodec

from tests.support.fake_trt import make_device_bundle, open_device_session
from tests.support.serving import serving, word_tokenizer

ASKED: list[dict[str, Any]] = [
    {"prompt": [7, 3, 11], "max_tokens": 22, "temperature": 0},
    {"prompt": [5], "max_tokens": 17, "temperature": 1.5, "seed": 4},
    {"prompt": [23, 29, 31, 2, 40], "max_tokens": 9, "temperature": 0.8, "top_p": 0.9, "seed": 1},
    {"prompt": [9, 8], "max_tokens": 12, "temperature": 0, "logprobs": 1},
    {"prompt": [9, 8], "max_tokens": 3, "temperature": 0},
    {"prompt": [4], "max_tokens": 12, "temperature": 1.0, "seed": 2, "min_p": 0.02, "frequency_penalty": 0.5},
]


def test_answers_are_those_of_each_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word_tokenizer(make_device_bundle("llama", tmp_path / "bundle", k=3, rank=2).root)
    made = Bundle.open(tmp_path / "bundle")
    codec, wanted = TextCodec.open(made.root / "tokenizer"), []
    with open_device_session(made)[0] as alone:
        for one in ASKED:
            options = {name: one[name] for name in one.keys() & {"top_p", "seed", "min_p", "frequency_penalty"}}
            sampling = SamplingOptions(one["temperature"], **options)
            (tokens,) = alone.generate([one["prompt"]], one["max_tokens"], sampling=sampling)
            wanted.append(codec.decode(tokens))
    runs, run = [], DeviceCycle.run
    monkeypatch.setattr(DeviceCycle, "run", lambda self, count: (runs.append(count), run(self, count))[1])
    _, engine, cuda = open_device_session(made, cycles=True)
    batch = Batch(made, engine, PeriodicSchedule(3), slots=3)
    with serving(batch, codec) as served, ThreadPoolExecutor(len(ASKED)) as pool:

        def answer(one: dict[str, Any]) -> str:
            response = served.http.post("/v1/completions", json=one, timeout=600)
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["text"])

        assert list(pool.map(answer, ASKED)) == wanted
        runs.clear()  # which of them met, and so ran in cycles, is a matter of time; one alone does
        assert answer(ASKED[0]) == wanted[0]
    assert sum(runs) > 8
    assert not cuda.live

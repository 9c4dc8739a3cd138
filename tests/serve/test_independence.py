"""Each request gets what it would get alone, whatever runs beside it, when it comes, and who goes away: 120 requests
over HTTP against sessions, in float32."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from lora_drop_runtime import SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle

from tests.support.serving import Served

NEAR = 1e-4  # logits that are nearer than this may change places
POLICIES = ("skip", "backfill", "lossless")


@dataclass(frozen=True)
class Asked:
    """A request; `leaves` is after how many tokens its client goes away."""

    prompt: tuple[int, ...]
    count: int
    k: int
    policy: str
    temperature: float
    seed: int
    begins: float
    streams: bool
    leaves: int | None


def requests(policy: str, count: int) -> list[Asked]:
    rng = random.Random(f"served {policy}")
    return [
        Asked(
            prompt=tuple(rng.randrange(131) for _ in range(rng.randint(1, 40))),
            count=rng.randint(1, 40),
            k=rng.randint(0, 4),
            policy=policy,
            temperature=rng.choice((0.0, 0.0, 1.0)),
            seed=rng.randrange(100),
            begins=rng.random(),
            streams=(streams := rng.random() < 0.6),
            leaves=rng.randint(0, 10) if streams and rng.random() < 0.2 else None,
        )
        for _ in range(count)
    ]


async def asked(http: httpx.AsyncClient, one: Asked) -> list[int]:
    """The tokens that a request was told."""
    body = {"prompt": one.prompt, "max_tokens": one.count, "k": one.k, "policy": one.policy, "seed": one.seed}
    body |= {"temperature": one.temperature, "stream": one.streams}
    await asyncio.sleep(one.begins)
    text = ""
    if not one.streams:
        text = (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    else:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            told = 0
            async for line in answer.aiter_lines():
                if told == one.leaves:
                    break
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    told += 1
    return [int(word[1:]) for word in text.split()]


def alone(session: Session, one: Asked) -> list[int]:
    sampling = SamplingOptions(temperature=one.temperature, seed=one.seed)
    return session.generate([one.prompt], one.count, k=one.k, sampling=sampling)[0].tolist()


def is_near_tie(session: Session, one: Asked, tokens: list[int]) -> bool:
    """Whether the full model hardly prefers a token after these; only where steps are the full model's."""
    logits = np.sort(session.prefill(np.array([[*one.prompt, *tokens]]))[0])
    return bool(logits[-1] - logits[-2] < NEAR)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_request_gets_what_it_would_get_alone(served: Served, bundle: Bundle, policy: str) -> None:
    script = requests(policy, 40)

    async def all_of_them() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.address, timeout=None, limits=limits) as http:
            return await asyncio.gather(*(asked(http, one) for one in script))

    found = asyncio.run(all_of_them())
    ties = 0
    with Session.open(bundle.root, policy=policy, threads=1) as session:
        for one, tokens in zip(script, found, strict=True):
            wanted = alone(session, one)
            if one.leaves is None:
                assert len(tokens) == len(wanted), one
            if tokens != wanted[: len(tokens)]:
                place = next(i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b)
                assert not one.temperature, f"another draw: {one}"
                assert is_near_tie(session, one, wanted[:place]), f"{one}: {tokens}, alone {wanted}"
                ties += 1
    assert ties <= 1
    served.await_rows(0)

"""What OpenAI's own client gets: texts, chunks, logprobs and usage, each as a session alone gives it."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from lora_drop_runtime import Batch, SamplingOptions, Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding import drafter, sampling
from lora_drop_runtime.text import TextCodec

from tests.support.bundles import record_again
from tests.support.serving import TEMPLATE, Served, serving, word_tokenizer

PROMPT = [3, 14, 15, 92]
TEXT = "t3 t14 t15 t92"


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=None) as client:
        yield client


@functools.cache
def _alone(root: Path, prompt: tuple[int, ...], count: int, seed: int | None, **options: Any) -> list[int]:
    sampling = SamplingOptions() if seed is None else SamplingOptions(temperature=1.0, seed=seed)
    with Session.open(root, threads=1, **{"policy": "backfill", **options}) as session:
        return session.generate([prompt], count, sampling=sampling)[0].tolist()


def alone(bundle: Bundle, prompt: list[int], count: int, seed: int | None = None, **options: Any) -> list[int]:
    """What a session writes, computed once."""
    return [*_alone(bundle.root, tuple(prompt), count, seed, **options)]


def words(tokens: list[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def test_models(client: openai.OpenAI, bundle: Bundle) -> None:
    (model,) = client.models.list().data
    assert model.id == bundle.manifest.model.name
    assert client.models.retrieve(model.id).id == model.id
    facts = model.model_extra["lora_drop"]
    assert (facts["k"], facts["policy"], facts["chat"]) == (bundle.manifest.plan.k, "backfill", True)
    assert facts["lenience"] == 1


@pytest.mark.parametrize(
    ("k", "policy", "said"), [(5, "skip", 5), (2, "lossless", 2), ("auto", "lossless", "auto"), (None, "skip", 3)]
)
def test_the_models_k_is_that_of_requests_without_one(
    bundle: Bundle, k: int | str | None, policy: str, said: int | str
) -> None:
    assert bundle.manifest.plan.k == 3
    codec = TextCodec.open(bundle.root / "tokenizer")
    with serving(Batch.open(bundle.root, slots=1, threads=1, k=k, policy=policy), codec) as server:
        (model,) = server.http.get("/v1/models").json()["data"]
        assert model["lora_drop"]["k"] == said


def test_a_completion_of_a_text_and_of_token_ids(client: openai.OpenAI, bundle: Bundle) -> None:
    wanted = alone(bundle, PROMPT, 9, k=3)
    for prompt in (TEXT, PROMPT):
        done = client.completions.create(
            model=bundle.manifest.model.name, prompt=prompt, max_tokens=9, temperature=0, extra_body={"k": 3}
        )
        (choice,) = done.choices
        assert (choice.text, choice.finish_reason) == (words(wanted), "length")
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (4, 9, 13)
        # Eight steps after the prompt: LoRA LoRA LoRA refresh, twice
        assert done.usage.model_extra == {"lora_drop": {"refresh_steps": 2, "lora_steps": 6}}


def test_k_and_policy_are_the_requests_own(client: openai.OpenAI, bundle: Bundle) -> None:
    model = bundle.manifest.model.name
    for k, policy in ((0, "backfill"), (2, "skip"), (4, "lossless"), (0, "lossless")):
        done = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"k": k, "policy": policy}
        )
        assert done.choices[0].text == words(alone(bundle, PROMPT, 12, k=k, policy=policy))
        steps = done.usage.model_extra["lora_drop"]
        if policy == "lossless" and k:
            assert steps["lora_steps"] >= steps["drafted"] >= steps["accepted"]
            assert steps["lora_steps"] > 0
            assert steps["refresh_steps"] + steps["accepted"] == 11  # a token each, and one from the prompt
        else:
            counted = {"refresh_steps": 11 // (k + 1), "lora_steps": 11 - 11 // (k + 1)}
            assert {name: count for name, count in steps.items() if count} == {n: c for n, c in counted.items() if c}


def test_the_ends_of_what_the_api_allows(client: openai.OpenAI, bundle: Bundle) -> None:
    """A top_p of 0 leaves the likeliest token; any 64-bit number is a seed."""
    hot = {"model": bundle.manifest.model.name, "prompt": PROMPT, "max_tokens": 9, "temperature": 2}
    done = client.completions.create(**hot, top_p=0)
    assert done.choices[0].text == words(alone(bundle, PROMPT, 9))
    texts = [client.completions.create(**hot, seed=seed).choices[0].text for seed in (-1, -1, -(2**63), 2**63 - 1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    last = client.completions.create(**hot | {"temperature": 1}, seed=2**63 - 1, n=2)  # behind the last comes the first
    assert [one.text for one in last.choices] == [words(alone(bundle, PROMPT, 9, seed)) for seed in (2**63 - 1, 0)]


def test_penalties_biases_and_min_p(client: openai.OpenAI, bundle: Bundle) -> None:
    """By the API's names, and vLLM's for min-p; in chats, too. null is what is left out."""
    asked: dict[str, Any] = {"presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {"7": 1.5, "130": -100}}
    both = {"min_p": 0.05, "repetition_penalty": 1.1}
    options = {**asked, **both, "logit_bias": {7: 1.5, 130: -100}}
    chat = TextCodec.open(bundle.root / "tokenizer").encode_chat([{"role": "user", "content": TEXT}]).tolist()
    for k, policy in ((2, "skip"), (3, "lossless")):
        wanted = []
        with Session.open(bundle.root, threads=1, k=k, policy=policy, draft="ngram" if k == 3 else None) as session:
            for prompt, temperature in ((PROMPT, 0), (PROMPT, 1.5), (chat, 0)):
                sampling = SamplingOptions(temperature, seed=3, **options)
                wanted.append(words(session.generate([prompt], 30, sampling=sampling)[0].tolist()))
            assert wanted[0] != words(session.generate([PROMPT], 30)[0].tolist())
        usual = {"model": bundle.manifest.model.name, "max_tokens": 30, "seed": 3, **asked}
        usual["extra_body"] = {**both, "k": k, "policy": policy}
        for temperature in (0, 1.5) if policy == "skip" else (0,):  # of drafts by LoRA steps are other draws
            done = client.completions.create(prompt=PROMPT, temperature=temperature, **usual)
            assert done.choices[0].text == wanted[bool(temperature)]
        said = client.chat.completions.create(messages=[{"role": "user", "content": TEXT}], temperature=0, **usual)
        assert said.choices[0].message.content == wanted[2]
    nothing: dict[str, Any] = dict.fromkeys(("presence_penalty", "frequency_penalty", "logit_bias"))
    usual = {"model": bundle.manifest.model.name, "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    done = client.completions.create(**usual, **nothing, extra_body={"min_p": None})
    assert done.choices[0].text == client.completions.create(**usual, logit_bias={}).choices[0].text


def test_lenience(client: openai.OpenAI, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "CONFIDENCE", 0.0)  # a random model has less
    usual = {"model": bundle.manifest.model.name, "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    texts = []
    for lenience in (None, 0.5):
        extra = {"k": 3, "policy": "lossless", "lenience": lenience}
        texts.append(client.completions.create(**usual, extra_body=extra).choices[0].text)
        assert texts[-1] == words(alone(bundle, PROMPT, 30, k=3, policy="lossless", lenience=lenience))
    assert texts[0] != texts[1]


def test_logprobs_are_the_models_own_under_penalties_and_biases(client: openai.OpenAI, bundle: Bundle) -> None:
    usual = {"model": bundle.manifest.model.name, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 2}
    plain = client.completions.create(**usual).choices[0]
    banned = client.completions.create(**usual, logit_bias={plain.text[1:]: -100}).choices[0]
    assert banned.text != plain.text
    assert plain.logprobs is not None
    assert banned.logprobs is not None
    assert banned.logprobs.top_logprobs == plain.logprobs.top_logprobs
    assert banned.logprobs.token_logprobs[0] < plain.logprobs.token_logprobs[0]


def test_lists_of_prompts_and_n_choices_draw_by_their_seeds(client: openai.OpenAI, bundle: Bundle) -> None:
    prompts = [PROMPT, [5], [23, 29]]
    done = client.completions.create(
        model=bundle.manifest.model.name, prompt=prompts, n=2, seed=7, temperature=1, max_tokens=6, extra_body={"k": 2}
    )
    wanted = [alone(bundle, prompt, 6, seed=7 + choice, k=2) for prompt in prompts for choice in (0, 1)]
    assert [choice.text for choice in done.choices] == [words(tokens) for tokens in wanted]
    assert [choice.index for choice in done.choices] == list(range(6))
    assert done.usage.prompt_tokens == 7
    texts = ["t5", "t23 t29"]
    done = client.completions.create(model=bundle.manifest.model.name, prompt=texts, seed=7, max_tokens=6)
    assert len(done.choices) == 2


@pytest.mark.parametrize("seed", [None, 7])
def test_biases_are_read_once_for_all_choices(
    client: openai.OpenAI, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """They may be a thousand, of 128 choices, and what reads them holds up all streams."""
    read = list[Any]()
    check = sampling._checked_bias
    monkeypatch.setattr(sampling, "_checked_bias", lambda given: read.append(given) or check(given))
    asked: dict[str, Any] = {"prompt": [PROMPT, [5]], "n": 2, "temperature": 1, "max_tokens": 6, "seed": seed}
    done = client.completions.create(model=bundle.manifest.model.name, **asked, logit_bias={"77": 100, "5": 0.5})
    assert len(read) == 1
    assert [choice.text for choice in done.choices] == [words([77] * 6)] * 4


def cached(done: Any) -> int:
    found: int = done.usage.prompt_tokens_details.cached_tokens
    return found


def test_a_chat_s_next_turn_runs_what_is_new(client: openai.OpenAI, bundle: Bundle, served: Served) -> None:
    """The reply too, up to its last refresh; and the text is what it is alone."""
    asked = {"model": bundle.manifest.model.name, "temperature": 0, "extra_body": {"k": 2, "policy": "backfill"}}
    chat = [{"role": "user", "content": words(list(range(60, 90)))}]
    first = client.chat.completions.create(messages=chat, max_tokens=9, **asked)  # type: ignore[call-overload]
    assert cached(first) == 0
    before = served.metrics()["lora_drop_prompt_tokens_reused_total"]
    chat += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "t1 t2"}]
    done = client.chat.completions.create(messages=chat, max_tokens=9, **asked)  # type: ignore[call-overload]
    assert (done.usage.prompt_tokens, cached(done)) == (30 + 9 + 2, 30 + 6)
    assert served.metrics()["lora_drop_prompt_tokens_reused_total"] == before + 36
    tokens = [int(word[1:]) for message in chat for word in message["content"].split()]
    assert done.choices[0].message.content == words(alone(bundle, tokens, 9, k=2))


def test_the_choices_of_a_prompt_run_it_once(client: openai.OpenAI, bundle: Bundle, served: Served) -> None:
    """What they give each other was not there before: it counts in the metrics and not in the usage."""
    prompts = [list(range(start, start + 40)) for start in (20, 70)]
    before = served.metrics()["lora_drop_prompt_tokens_reused_total"]
    asked = {"model": bundle.manifest.model.name, "prompt": prompts, "n": 2, "max_tokens": 3, "temperature": 0}
    done = client.completions.create(**asked)  # type: ignore[call-overload]
    assert (done.usage.prompt_tokens, cached(done)) == (80, 0)
    assert served.metrics()["lora_drop_prompt_tokens_reused_total"] == before + 2 * 38
    (*_, last) = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    assert 38 <= cached(last) <= 76
    assert [choice.text for choice in done.choices[::2]] == [words(alone(bundle, prompt, 3)) for prompt in prompts]


def test_echo_and_stop(client: openai.OpenAI, bundle: Bundle) -> None:
    wanted = alone(bundle, PROMPT, 20)
    place = next(i for i in range(2, 20) if wanted[i] not in wanted[:i])
    stop = f" t{wanted[place]}"
    if any(f"t{token}".startswith(stop[1:]) for token in wanted[:place]):
        stop += " "
    done = client.completions.create(
        model=bundle.manifest.model.name, prompt=TEXT, echo=True, stop=["nowhere", stop], max_tokens=20, temperature=0
    )
    assert done.choices[0].text == TEXT + words(wanted[:place])
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens in (place + 1, place + 2)  # up to the one that completed it


def test_logprobs_are_those_of_the_full_softmax(client: openai.OpenAI, bundle: Bundle) -> None:
    done = client.completions.create(
        model=bundle.manifest.model.name, prompt=PROMPT, max_tokens=3, temperature=0, logprobs=3, extra_body={"k": 0}
    )
    found = done.choices[0].logprobs
    chat = client.chat.completions.create(
        model=bundle.manifest.model.name,
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"k": 0},
    )
    said = chat.choices[0].logprobs.content
    text = list(PROMPT)
    with Session.open(bundle.root, k=0, threads=1) as session:
        for place in range(3):
            logits = session.prefill(np.array([text]))[0].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum())
            best = np.argsort(-logprobs)[:3].tolist()
            assert found.tokens[place] == said[place].token == f"t{best[0]}"
            assert found.token_logprobs[place] == pytest.approx(logprobs[best[0]], abs=1e-4)
            assert list(found.top_logprobs[place]) == [one.token for one in said[place].top_logprobs]
            assert list(found.top_logprobs[place]) == [f"t{token}" for token in best]
            for token, one in zip(best, said[place].top_logprobs, strict=True):
                assert one.logprob == pytest.approx(logprobs[token], abs=1e-4)
                assert bytes(one.bytes).decode() == one.token
            text.append(best[0])
    for token, place in zip(found.tokens, found.text_offset, strict=True):
        assert done.choices[0].text[place:].lstrip().startswith(token)


def test_logprobs_of_a_prompt_are_those_of_full_steps(client: openai.OpenAI, bundle: Bundle) -> None:
    """Of prompts of many lengths at once, beside a new token or without."""
    prompts = [[(7 * place + length) % 131 for place in range(length)] for length in (1, 2, 3, 8, 9, 16, 30)]
    with Session.open(bundle.root, k=0, threads=1) as session:
        wanted = []
        for prompt in prompts:
            each = [
                session.prefill(np.array([prompt[:end]]))[0].astype(np.float64) for end in range(1, len(prompt) + 1)
            ]
            wanted.append([logits - np.log(np.exp(logits).sum()) for logits in each])
    for count, extra in ((0, {"k": 0}), (1, {"k": 0}), (1, {"k": 3, "policy": "lossless"})):
        done = client.completions.create(
            model=bundle.manifest.model.name,
            prompt=prompts,
            max_tokens=count,
            temperature=0,
            logprobs=2,
            echo=True,
            extra_body=extra,
        )
        assert done.usage.completion_tokens == count * len(prompts)
        assert [choice.finish_reason for choice in done.choices] == ["length"] * len(prompts)
        for prompt, choice, each in zip(prompts, done.choices, wanted, strict=True):
            tokens = [*prompt, int(each[-1].argmax())][: len(prompt) + count]
            found = choice.logprobs
            assert found.tokens == [f"t{token}" for token in tokens]
            assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
            for place, token in enumerate(tokens[1:]):
                assert found.token_logprobs[place + 1] == pytest.approx(each[place][token], abs=1e-4)
                assert max(found.top_logprobs[place + 1].values()) == pytest.approx(each[place].max(), abs=1e-4)
            assert choice.text == words(prompt) + words(tokens[len(prompt) :])


def forced(bundle: Bundle, ids: list[int], context: int, k: int, policy: str) -> list[np.ndarray]:
    """Log-probabilities [V] after each token from the context's last on, which are fed one by one."""
    with Session.open(bundle.root, k=k, policy=policy, threads=1) as session:
        logits = [session.prefill(np.array([ids[:context]]), max_new_tokens=len(ids) - context + 1)[0].astype(float)]
        logits += [session.step(np.array([token]))[0].astype(float) for token in ids[context:]]
    return [one - np.log(np.exp(one).sum()) for one in logits]


@pytest.mark.parametrize(("k", "policy"), [(3, "skip"), (3, "backfill"), (1, "skip"), (0, "skip")])
def test_what_follows_a_context_is_scored_by_the_schedule(
    client: openai.OpenAI, bundle: Bundle, k: int, policy: str
) -> None:
    """Each prompt with a context of its own; the token behind is made by the same schedule."""
    prompts = [[(7 * place + 3 * row + 5) % 131 for place in range(12)] for row in range(3)]
    contexts = [1, 7, 12]
    done = client.completions.create(
        model=bundle.manifest.model.name,
        prompt=prompts,
        max_tokens=1,
        temperature=0,
        logprobs=1,
        echo=True,
        extra_body={"k": k, "policy": policy, "context_tokens": contexts},
    )
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (36, 3)
    for prompt, context, choice in zip(prompts, contexts, done.choices, strict=True):
        each = forced(bundle, prompt, context, k, policy)
        tokens = [*prompt, int(each[-1].argmax())]
        assert choice.text == words(prompt) + words(tokens[len(prompt) :])
        found = choice.logprobs
        assert found is not None
        assert found.tokens == [f"t{token}" for token in tokens]
        wanted = [each[place][token] for place, token in enumerate(tokens[context:])]
        assert found.token_logprobs[context:] == pytest.approx(wanted, abs=1e-4)
        best = [one.max() for one in each]
        assert [max(top.values()) for top in found.top_logprobs[context:]] == pytest.approx(best, abs=1e-4)


def test_a_stream_has_logprobs_of_the_prompt(client: openai.OpenAI, bundle: Bundle) -> None:
    asked: dict[str, Any] = {
        "model": bundle.manifest.model.name,
        "prompt": PROMPT,
        "max_tokens": 3,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
        "extra_body": {"k": 0},
    }
    whole = client.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [part for chunk in chunks if chunk.logprobs for part in getattr(chunk.logprobs, field)]
        assert parts == getattr(whole.logprobs, field)
    assert len(whole.logprobs.tokens) == len(PROMPT) + 3


def streamed(
    client: openai.OpenAI, bundle: Bundle, count: int, extra_body: dict[str, Any] | None = None, **usage: bool
) -> list[Any]:
    """The chunks of a completion of so many tokens, with its usage at the end."""
    asked: dict[str, Any] = {"model": bundle.manifest.model.name, "prompt": TEXT, "max_tokens": count, "temperature": 0}
    options: Any = {"include_usage": True, **usage}
    return list(client.completions.create(**asked, stream=True, stream_options=options, extra_body=extra_body))


def test_a_stream_has_a_chunk_for_each_token_and_says_its_step(client: openai.OpenAI, bundle: Bundle) -> None:
    *chunks, last = streamed(client, bundle, 9, extra_body={"k": 3})
    assert "".join(chunk.choices[0].text for chunk in chunks) == words(alone(bundle, PROMPT, 9, k=3))
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 8 + ["length"]
    steps = [chunk.model_extra["lora_drop"]["step"] for chunk in chunks]
    assert steps == ["refresh", *(["lora"] * 3 + ["refresh"]) * 2]
    assert last.choices == []
    assert last.usage.completion_tokens == 9
    assert last.usage.model_extra["lora_drop"] == {"refresh_steps": 2, "lora_steps": 6}


def test_an_event_is_one_line_for_every_reader(served: Served) -> None:
    """Many readers of lines, such as httpx's, end one at each of these."""
    text = "t1 \u2028\u2029\x85\x0b\x0c\x1c é😀"
    asked = {"prompt": text, "echo": True, "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=asked) as answer:
        *events, done = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert done == "[DONE]"
    assert json.loads(events[0])["choices"][0]["text"] == text
    assert len(events) == 3


def test_each_chunk_has_the_usage_so_far_where_it_is_asked_for(client: openai.OpenAI, bundle: Bundle) -> None:
    """As generators of load ask: they count tokens by it."""
    *chunks, last = streamed(client, bundle, 5, continuous_usage_stats=True)
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [1, 2, 3, 4, 5]
    assert last.choices == []
    assert last.usage == chunks[-1].usage


def test_a_text_goes_on_behind_an_end_token_that_is_ignored(bundle: Bundle, tmp_path: Path) -> None:
    """As generators of load ask, who want texts of one length."""
    free = alone(bundle, PROMPT, 9, k=0)
    end, place = next((token, place) for place, token in enumerate(free) if place and token not in free[:place])
    root = shutil.copytree(bundle.root, tmp_path / "b")
    manifest = json.loads((root / MANIFEST_NAME).read_text())
    manifest["special_tokens"]["eos"] = [end]
    (root / MANIFEST_NAME).write_text(json.dumps(manifest))
    batch = Batch.open(root, slots=2, threads=1)
    with serving(batch, TextCodec.open(root / "tokenizer")) as server:
        asked = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0, "k": 0}
        ends, goes_on = (server.http.post("/v1/completions", json={**asked, "ignore_eos": it}) for it in (False, True))
    assert ends.json()["choices"][0]["finish_reason"] == "stop"
    assert (ends.json()["usage"]["completion_tokens"], goes_on.json()["usage"]["completion_tokens"]) == (place, 9)
    assert goes_on.json()["choices"][0]["text"] == words(free)


def test_a_chat_whole_and_as_a_stream(client: openai.OpenAI, bundle: Bundle) -> None:
    asked: dict[str, Any] = {
        "model": bundle.manifest.model.name,
        "messages": [
            {"role": "developer", "content": "t3 t14"},
            {"role": "user", "content": [{"type": "text", "text": "t15 "}, {"type": "text", "text": "t92"}]},
        ],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    wanted = words(alone(bundle, PROMPT, 8))
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", wanted)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_variables_of_the_chat_template(bundle: Bundle, tmp_path: Path) -> None:
    """`chat_template_kwargs`, as other servers call them."""
    root = shutil.copytree(bundle.root, tmp_path / "b")
    word_tokenizer(root, TEMPLATE + "{% if enable_thinking is false %}t7 t9{% endif %}")
    with serving(Batch.open(root, slots=2, threads=1), TextCodec.open(root / "tokenizer")) as server:
        asked = {"messages": [{"role": "user", "content": "t3 t14"}], "max_tokens": 4}
        tokens = {}
        for given in (None, {}, {"enable_thinking": True}, {"enable_thinking": False}):
            answer = server.http.post("/v1/chat/completions", json={**asked, "chat_template_kwargs": given})
            tokens[json.dumps(given)] = answer.json()["usage"]["prompt_tokens"]
        assert tokens == {"null": 2, "{}": 2, '{"enable_thinking": true}': 2, '{"enable_thinking": false}': 4}
        for wrong in ({"messages": []}, {"tools": None}, [1], "x", {"x": math.inf}):
            body = json.dumps({**asked, "chat_template_kwargs": wrong})
            answer = server.http.post(
                "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_how_much_to_reason(bundle: Bundle, served: Served, tmp_path: Path) -> None:
    """A variable of the template, where it knows one for it."""
    root = shutil.copytree(bundle.root, tmp_path / "b")
    word_tokenizer(root, TEMPLATE + "{% if reasoning_effort in ('none', 'high') %}t7 {{ reasoning_effort }}{% endif %}")
    asked: Any = {"messages": [{"role": "user", "content": "t3 t14"}], "max_tokens": 1}
    with serving(Batch.open(root, slots=1, threads=1), TextCodec.open(root / "tokenizer")) as server:
        for effort, tokens in ((None, 2), ("none", 4), ("low", 2), ("high", 4)):
            answer = server.http.post("/v1/chat/completions", json=asked | {"reasoning_effort": effort})
            assert answer.json()["usage"]["prompt_tokens"] == tokens
    switch = "{% if enable_thinking %}t7 <think>{% elif enable_thinking is false %}t7 t8 t9 </think>{% endif %}"
    for template, expected in (
        (switch, {None: 2, "none": 6, "minimal": 4, "high": 4}),
        ("{% set ends = '</think>' %}", {None: 2, "none": 400, "low": 400}),
    ):
        word_tokenizer(root, TEMPLATE + template)
        with serving(Batch.open(root, slots=1, threads=1), TextCodec.open(root / "tokenizer")) as server:
            for effort, tokens in expected.items():
                answer = server.http.post("/v1/chat/completions", json=asked | {"reasoning_effort": effort}).json()
                assert tokens == (400 if "error" in answer else answer["usage"]["prompt_tokens"])
    for effort, status in (("none", 200), ("low", 400), ("some", 400)):
        answer = served.http.post("/v1/chat/completions", json=asked | {"reasoning_effort": effort})
        assert answer.status_code == status
        assert status == 200 or answer.json()["error"]["param"] == "reasoning_effort"


def test_reasoning_stands_apart(bundle: Bundle, tmp_path: Path) -> None:
    """Of a template that begins it; a completion has none."""
    root = shutil.copytree(bundle.root, tmp_path / "b")
    word_tokenizer(root, TEMPLATE + "{% set ends = '</think>' %} <think>")
    file = root / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"t130"', '"<think>"'), encoding="utf-8")
    record_again(root)
    with serving(Batch.open(root, slots=2, threads=1), TextCodec.open(root / "tokenizer")) as server:
        asked = {"messages": [{"role": "user", "content": "t3 t14"}], "max_tokens": 4, "temperature": 0}
        answer = server.http.post("/v1/chat/completions", json=asked).json()
        message, usage = answer["choices"][0]["message"], answer["usage"]
        assert (message["content"], len(message["reasoning_content"].split())) == ("", 4)
        assert usage["completion_tokens_details"] == {"reasoning_tokens": usage["completion_tokens"]}
        whole = server.http.post("/v1/completions", json={"prompt": "t3 t14", "max_tokens": 4}).json()
        assert "completion_tokens_details" not in whole["usage"]


def test_a_chat_takes_what_fits_where_it_does_not_say(client: openai.OpenAI, bundle: Bundle) -> None:
    messages: Any = [{"role": "user", "content": TEXT}]
    done = client.chat.completions.create(model=bundle.manifest.model.name, messages=messages, temperature=0)
    assert done.usage.total_tokens == bundle.manifest.limits.max_seq_len
    short = client.completions.create(model=bundle.manifest.model.name, prompt=TEXT, temperature=0)
    assert short.usage.completion_tokens == 16


def test_many_at_once_by_the_async_client(served: Served, bundle: Bundle) -> None:
    """More than there are slots, whole and streamed: each its own text."""

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        asked: dict[str, Any] = {
            "model": bundle.manifest.model.name,
            "prompt": [number, 2 * number + 1],
            "max_tokens": 5 + number,
            "temperature": 1,
            "seed": number,
        }
        if number % 2:
            return (await client.completions.create(**asked)).choices[0].text
        stream = await client.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=None
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(16)))

    texts = asyncio.run(all_of_them())
    wanted = [alone(bundle, [n, 2 * n + 1], 5 + n, seed=n) for n in range(16)]
    assert texts == [words(tokens) for tokens in wanted]


def test_metrics_count_what_was_served(served: Served, bundle: Bundle) -> None:
    before = served.metrics()
    body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0, "k": 3}
    assert served.http.post("/v1/completions", json=body).status_code == 200
    done = served.http.post("/v1/completions", json={**body, "max_tokens": 40, "k": 4, "policy": "lossless"})
    steps = done.json()["usage"]["lora_drop"]
    served.await_rows(0)
    after = served.metrics()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained['lora_drop_requests_total{path="/v1/completions",status="200"}'] == 2
    assert 2 <= gained["lora_drop_prompt_tokens_reused_total"] <= 4  # an earlier test may have asked the same
    assert gained["lora_drop_prompt_tokens_total"] == gained["lora_drop_prompt_length_tokens_sum"] == 8
    assert gained['lora_drop_prompt_length_tokens_bucket{le="8.0"}'] == 2
    for name in ("request_duration", "time_in_queue"):
        assert gained[f"lora_drop_{name}_seconds_count"] == 2
    assert after["lora_drop_time_in_queue_seconds_sum"] <= after["lora_drop_time_to_first_token_seconds_sum"]
    assert after["lora_drop_time_to_first_token_seconds_sum"] <= after["lora_drop_request_duration_seconds_sum"]
    assert not any(count for name, count in gained.items() if name.startswith("lora_drop_refused"))
    assert gained['lora_drop_tokens_total{step="lora"}'] == 6
    assert gained['lora_drop_tokens_total{step="refresh"}'] == 3 + 40
    assert gained["lora_drop_time_to_first_token_seconds_count"] == 2
    assert gained["lora_drop_time_between_tokens_seconds_count"] == 8 + 39
    drafts = {one: gained[f'lora_drop_drafts_total{{outcome="{one}"}}'] for one in ("accepted", "rejected")}
    assert drafts == {"accepted": steps["accepted"], "rejected": steps["drafted"] - steps["accepted"]}
    assert steps["drafted"] > 0
    assert after["lora_drop_rows_running"] == after["lora_drop_rows_waiting"] == 0
    assert after['lora_drop_kv_bytes{of="kept"}'] == 0
    assert after['lora_drop_kv_bytes{of="allocated"}'] > 0
    assert math.isfinite(after["lora_drop_time_to_first_token_seconds_sum"])


@pytest.mark.parametrize(("k", "policy"), [(5, "skip"), ("auto", "lossless"), (0, "backfill")])
def test_the_info_metric_says_what_is_served(bundle: Bundle, k: int | str, policy: str) -> None:
    batch, codec = (
        Batch.open(bundle.root, slots=1, threads=1, k=k, policy=policy),
        TextCodec.open(bundle.root / "tokenizer"),
    )
    with serving(batch, codec, model_name="other") as server:
        (line,) = (line for line in server.http.get("/metrics").text.splitlines() if line.startswith("lora_drop_info"))
    labels = dict(re.findall(r'(\w+)="(.*?)"', line))
    assert line.endswith(" 1.0")
    version = importlib.metadata.version("lora-drop-export")
    model = json.loads((bundle.root / MANIFEST_NAME).read_text())["model"]
    assert labels == {
        "version": version,
        "model": model["name"],
        "target": "ort",
        "dtype": model["weight_dtype"],
        "k": str(k),
        "policy": policy,
    }


def test_what_is_refused_is_counted_by_its_reason(bundle: Bundle) -> None:
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {"json": {"prompt": [1], "max_tokens": -1}}, "invalid"),
        ("/v1/completions", {"json": {"prompt": [1], "n": 99}}, "invalid"),
        ("/v1/completions", {"json": {"prompt": [1], "x": 1}}, "invalid"),
        ("/v1/completions", {"json": {"prompt": [1], "model": "x"}}, "model_not_found"),
        ("/v1/completions", {"json": {"prompt": [1] * 128}}, "context_length_exceeded"),
        ("/v1/completions", {"content": b"{", "headers": {"Content-Type": "application/json"}}, "json"),
        ("/v1/completions", {"json": {}, "headers": {"Authorization": "Bearer x"}}, "invalid_api_key"),
        ("/v1/completions", {"json": {"prompt": [1], "max_tokens": 2}}, ""),
        ("/nothing", {"json": {}}, "not_found"),
        ("/v1/models", {"json": {}}, "method_not_allowed"),
    ]
    batch = Batch.open(bundle.root, slots=1, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer"), api_key="sesame", max_waiting=1) as server:
        for path, request, _ in asked:
            server.http.post(path, **request)
        server.driver.is_leaving = server.driver.is_closing = True
        assert server.http.post("/v1/completions", json={"prompt": [1]}).status_code == 503
        assert server.http.get("/ready").status_code == 503  # a probe, and no request
        counted = {name: int(value) for name, value in server.metrics().items() if "refused_requests_total" in name}
    reasons = Counter(reason for *_, reason in asked if reason) + Counter(["closing"])
    assert {name.split('"')[1]: count for name, count in counted.items() if count} == reasons

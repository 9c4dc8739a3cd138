"""Whatever is asked, the answer is the API's own: an error object that names the field, and never a 5xx."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Calibration
from lora_drop_runtime.plan.schedule import MarginSchedule
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.app import ACCEPT_LOG_SECONDS, _LoopErrors
from lora_drop_serve.errors import of_validation
from lora_drop_serve.log import Log
from lora_drop_serve.requests import CHANGES_NOTHING, MOST_BODY_BYTES, ChatRequest, CompletionRequest, Message
from lora_drop_serve.response_requests import ResponseRequest
from pydantic import ValidationError

from tests.support.serving import Served, serving, word_bundle

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HI = [{"role": "user", "content": "t1"}]


def check_error(answer: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The object as the API has it."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["param"] == param, error
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 1500
    assert "Traceback" not in answer.text
    assert "Error(" not in answer.text
    return error


def check_alive(served: Served) -> None:
    """The loop goes on, and no slot is lost."""
    served.await_rows(0)
    assert served.http.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 2}).status_code == 200
    for path in ("/health", "/ready"):
        assert served.http.get(path).status_code == 200


WRONG = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": ["t1", 2]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, True]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.0]}, "prompt"),
    (COMPLETIONS, {"prompt": [131]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**40]}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * 128}, "prompt"),
    (COMPLETIONS, {"prompt": "t1 " * 2000}, "prompt"),
    (COMPLETIONS, {"prompt": [[1]] * 10000}, "prompt"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": -3}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 1.5}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 128}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 10**30}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": "9"}, "max_tokens"),
    (COMPLETIONS, {"temperature": -0.1}, "temperature"),
    (COMPLETIONS, {"temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"temperature": True}, "temperature"),
    (COMPLETIONS, {"top_p": -0.1}, "top_p"),
    (COMPLETIONS, {"top_p": 1.1}, "top_p"),
    (COMPLETIONS, {"top_k": -1}, "top_k"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"seed": -(2**63) - 1}, "seed"),
    (COMPLETIONS, {"seed": 2**63}, "seed"),
    (COMPLETIONS, {"n": 0}, "n"),
    (COMPLETIONS, {"n": 128}, "n"),
    (COMPLETIONS, {"n": 10**9}, "n"),
    (COMPLETIONS, {"stop": [""]}, "stop"),
    (COMPLETIONS, {"stop": [str(n) for n in range(10**4)]}, "stop"),
    (COMPLETIONS, {"stop": "x" * 10**5}, "stop"),
    (COMPLETIONS, {"stop": 3}, "stop"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"logprobs": 1, "echo": True}, "echo"),  # the batch's k is not 0
    (COMPLETIONS, {"logprobs": 1, "echo": True, "k": 2}, "echo"),
    (COMPLETIONS, {"echo": True, "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"context_tokens": 1}, "context_tokens"),
    (COMPLETIONS, {"context_tokens": 1, "echo": True}, "context_tokens"),
    *(
        (COMPLETIONS, {"prompt": [5, 6, 7], "logprobs": 1, "echo": True, "context_tokens": count}, "context_tokens")
        for count in (0, -1, 4, True, 1.5, "1", [], [1, 2], [0], 10**30)
    ),
    (COMPLETIONS, {"k": -1}, "k"),
    (COMPLETIONS, {"k": 1.5}, "k"),
    (COMPLETIONS, {"k": "auto"}, "k"),
    (COMPLETIONS, {"policy": "best"}, "policy"),
    (COMPLETIONS, {"policy": "fill"}, "policy"),
    (COMPLETIONS, {"policy": 3}, "policy"),
    (COMPLETIONS, {"policy": "x" * 10**5}, "policy"),
    (COMPLETIONS, {"stream": "yes"}, "stream"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    (COMPLETIONS, {"ignore_eos": 1}, "ignore_eos"),
    (COMPLETIONS, {"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
    (
        CHAT,
        {"messages": HI, "ignore_eos": True, "tools": [{"type": "function", "function": {"name": "f"}}]},
        "ignore_eos",
    ),
    (COMPLETIONS, {"presence_penalty": 2.5}, "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": -2.1}, "frequency_penalty"),
    (COMPLETIONS, {"frequency_penalty": 10**400}, "frequency_penalty"),
    (COMPLETIONS, {"presence_penalty": False}, "presence_penalty"),
    (COMPLETIONS, {"presence_penalty": "0.5"}, "presence_penalty"),
    (COMPLETIONS, {"store": 0}, "store"),
    *(
        (COMPLETIONS, {"logit_bias": wrong}, "logit_bias")
        for wrong in (
            [],
            [[5, 1]],
            "5",
            {"5": 101},
            {"5": -100.5},
            {"5": "1"},
            {"5": None},
            {"5": True},
            {"5": 10**400},
            {"x": 1},
            {"-1": 1},
            {"05": 1},
            {"5.0": 1},
            {" 5": 1},
            {"5\n": 1},
            {"٥": 1},
            {"": 1},
            {"131": 1},
            {"9" * 10: 1},
            {"9" * 5000: 1},
            {str(token): 1 for token in range(1025)},
        )
    ),
    (CHAT, {"messages": HI, "logit_bias": {"131": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "presence_penalty": -3}, "presence_penalty"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"suffix": "end"}, "suffix"),
    (COMPLETIONS, {"min_p": 1.1}, "min_p"),
    (COMPLETIONS, {"min_p": -0.1}, "min_p"),
    (COMPLETIONS, {"policy": "lossless", "lenience": 0}, "lenience"),
    (COMPLETIONS, {"policy": "lossless", "lenience": 1.1}, "lenience"),
    (COMPLETIONS, {"policy": "backfill", "lenience": 0.5}, "lenience"),
    (CHAT, {"messages": HI, "lenience": 0.5}, "lenience"),
    (COMPLETIONS, {"messages": HI}, "messages"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "t1"}, "messages"),
    (CHAT, {"messages": [{"content": "t1"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "t1 " * 2000}]}, "messages"),
    (CHAT, {"messages": HI, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"messages": HI, "max_completion_tokens": 128}, "max_completion_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 128}, "max_tokens"),
    (CHAT, {"messages": HI, "n": 128}, "n"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HI, "logprobs": 2}, "logprobs"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": HI, "modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG, ids=[f"{i}-{case[2]}" for i, case in enumerate(WRONG)])
def test_a_wrong_field_is_named(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    usual = {"prompt": [1, 2]} if path == COMPLETIONS and param != "prompt" else {}
    answer = served.http.post(path, json={**usual, **body})
    check_error(answer, 400, param)
    for streams in (True,) if not {"stream", "stream_options"} & body.keys() else ():
        check_error(served.http.post(path, json={**usual, **body, "stream": streams}), 400, param)


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a text": b'"prompt"',
    "no UTF-8": b'{"prompt": "\xff"}',
    "deep": b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "deep in a message": b'{"messages": [{"role": "user", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}]}",
    "long digits": b'{"prompt": [1], "seed": ' + b"9" * 10**5 + b"}",
    "a long float": b'{"prompt": [1], "temperature": 1e' + b"9" * 10**4 + b"}",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_body_that_is_none(served: Served, path: str, body: bytes) -> None:
    answer = served.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    check_error(answer, 400, answer.json()["error"]["param"])


def test_a_choice_of_a_tool_that_is_nested_as_deep_as_json_can_be_read(served: Served) -> None:
    """What is read at a depth of calls need not be written at a larger one."""
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    for depth in range(900, 1000):
        choice = '{"a": ' * depth + "1" + "}" * depth
        body = f'{{"messages": {json.dumps(HI)}, "tools": {tools}, "tool_choice": {choice}}}'
        answer = served.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        check_error(answer, 400, answer.json()["error"]["param"])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "logit_bias",
        "lenience",
        "seed",
        "k",
        "n",
    ],
)
def test_no_number_is_not_a_number(served: Served, field: str, number: str) -> None:
    body = f'{{"prompt": [1], "{field}": {number}}}'.encode()
    check_error(served.http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"}), 400, field)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, {"messages": [0] * 4000}, "messages.0: it has to be an object"),
        (CHAT, {"messages": [{}] * 4000}, "role"),
        (CHAT, {"messages": HI * 5000}, "4096"),
        (CHAT, {"messages": [{"role": "user", "content": [0] * 4096}]}, "text alone"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 2100}] * 2}, "4096 are"),
        (CHAT, {"messages": [*HI, {"role": "assistant", "tool_calls": [{}] * 10**5}]}, "4096 are"),
        (CHAT, {"messages": HI, "tools": [{}] * 10**5}, "128"),
        (CHAT, {"messages": [{"role": "user", **dict.fromkeys(map(str, range(10**4)), 0)}]}, "fields"),
        (COMPLETIONS, {"prompt": [1], "k": 1.5}, "k: Input should be a valid integer"),
        (CHAT, {"messages": HI, "stop": [0] * 10**5}, "32"),
        (CHAT, {"messages": HI, "logit_bias": dict.fromkeys(map(str, range(10**4)), 0)}, "1024 are the most"),
        (CHAT, {"messages": HI, "logit_bias": dict.fromkeys(map(str, range(10**3)), 200)}, "bias of token 0"),
        (CHAT, {"messages": HI, "logit_bias": {f"x{n}": 0 for n in range(10**3)}}, "'x0' is no token id"),
        (CHAT, {"messages": HI, "stop": [0]}, "it has to be a text, or a list of texts"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text alone"),
        (CHAT, {"messages": [{"role": "user"}]}, "content is missing"),
        (CHAT, {"messages": HI, **dict.fromkeys(map(str, range(10**4)), 0)}, "fields"),
        (COMPLETIONS, {"prompt": ""}, "not empty"),
        (COMPLETIONS, {"prompt": [[]] * 4095 + [0]}, "not empty"),
        (COMPLETIONS, {"prompt": [[5]] * 10**5}, "4096 are the most"),
        (COMPLETIONS, {"prompt": [""] * 10**5}, "4096 are the most"),
        (COMPLETIONS, {"prompt": [0] * 10**5 + ["t1"]}, "token ids"),
    ],
)
def test_many_faults_are_one_error(path: str, body: dict[str, Any], said: str) -> None:
    """Of millions of wrong items each would be an object of its own, while nobody else is served."""
    with pytest.raises(ValidationError) as refused:
        (ChatRequest if path == CHAT else CompletionRequest).model_validate(body)
    assert refused.value.error_count() <= 3
    assert said in of_validation(refused.value.errors()).body["error"]["message"]


def test_a_text_that_cannot_fit_is_not_tokenized(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer holds the whole process up as long as it reads."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was read")

    tokenizer = SimpleNamespace(encode_batch=never, get_vocab=served.codec._tokenizer.get_vocab)
    monkeypatch.setattr(served.codec, "_tokenizer", tokenizer)
    long = "t1 " * 10**5
    for path, body, param in (
        (COMPLETIONS, {"prompt": long}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": long}]}, "messages"),
    ):
        error = check_error(served.http.post(path, json=body), 400, param)
        assert error["code"] == "context_length_exceeded"
        assert "characters" in error["message"]


def test_texts_behind_one_that_is_too_long_are_not_tokenized(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, read = served.codec.encode, []
    monkeypatch.setattr(served.codec, "encode", lambda text, **how: read.append(text) or plain(text, **how))
    error = check_error(served.http.post(COMPLETIONS, json={"prompt": ["t1", "t1 " * 150, "t2"]}), 400, "prompt")
    assert "150 tokens" in error["message"]
    assert [text[:2] for text in read] == ["t1", "t1"]


def test_ids_that_cannot_fit_are_not_made_text(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 million fit into a body."""
    read: list[int] = []
    monkeypatch.setattr(served.codec, "decode", lambda ids: read.append(len(ids)) or "")
    error = check_error(served.http.post(COMPLETIONS, json={"prompt": [1] * 10**5, "echo": True}), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert read == []


@pytest.fixture
def plain_collector() -> Iterator[None]:
    """Python's own, which tests/conftest.py changes."""
    found = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*found)


@pytest.mark.usefixtures("plain_collector")
def test_a_body_of_many_lists_is_not_searched_for_garbage_all_the_time(bundle: Bundle) -> None:
    def collections() -> int:
        return sum(generation["collections"] for generation in gc.get_stats())

    lists = 10**5
    body = '{"prompt": "t1", "max_tokens": 1, "metadata": [' + "[]," * lists + "[]]}"
    batch = Batch.open(bundle.root, slots=1, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as server:
        before = collections()
        answer = server.http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200
        assert collections() - before < lists / 5000
    assert gc.get_threshold()[0] == 700


def test_arguments_of_calls_are_not_copied_for_the_template() -> None:
    """A million lists fit into them."""
    calls = [{"id": "a", "function": {"name": "f", "arguments": '{"a": [[], []]}'}}]
    message = Message.model_validate({"role": "assistant", "tool_calls": calls})
    assert message.tool_calls is not None
    (call,) = message.for_template["tool_calls"]
    assert call == {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"a": [[], []]}}}
    assert call["function"]["arguments"] is message.tool_calls[0].function.arguments


def test_hints_for_commands_are_not_for_clients(served: Served) -> None:
    error = check_error(served.http.post(COMPLETIONS, json={"prompt": [1], "k": "auto"}), 400, "k")
    assert "--" not in error["message"]


def test_probes_may_ask_for_the_head_alone(served: Served) -> None:
    for path in ("/", "/health", "/ready"):
        assert served.http.head(path).status_code == 200
    assert served.http.get("/health/").status_code == 404


def test_connections_that_cannot_be_accepted_are_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    now = [5.0]
    told = _LoopErrors(Log())
    loop: Any = SimpleNamespace(time=lambda: now[0])
    context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
    for _ in range(1000):
        told(loop, context)
    assert capsys.readouterr().err.count("too many connections") == 1
    now[0] += ACCEPT_LOG_SECONDS
    told(loop, context)
    assert capsys.readouterr().err.count("too many connections") == 1


def test_halves_of_characters(served: Served) -> None:
    half = r'"\ud800"'
    for body, param in (
        (f'{{"prompt": {half}}}', "prompt"),
        (f'{{"prompt": [1], "stop": {half}}}', "stop"),
        (f'{{"prompt": [1], "model": {half}}}', "model"),
        (f'{{"prompt": [1], "policy": {half}}}', "policy"),
        (f'{{"prompt": [1], {half}: 1}}', None),
        (f'{{"messages": [{{"role": "user", "content": {half}}}]}}', "messages"),
        (f'{{"messages": [{{"role": {half}, "content": "t1"}}]}}', "messages"),
    ):
        path = CHAT if "messages" in body else COMPLETIONS
        answer = served.http.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"] == param, answer.text
    check_alive(served)


def test_paths_and_methods(served: Served) -> None:
    for path in ("/v1", "/v1/nothing", "/nothing", "/v1/embeddings", "/v1/completions/9", "/%00"):
        check_error(served.http.get(path), 404)
    for method, path in (("GET", COMPLETIONS), ("DELETE", "/v1/models"), ("PUT", CHAT), ("POST", "/health")):
        answer = served.http.request(method, path)
        check_error(answer, 405)
        assert answer.headers["Allow"]


def test_another_model(served: Served) -> None:
    for answer in (
        served.http.post(COMPLETIONS, json={"model": "gpt-4", "prompt": "t1"}),
        served.http.post(CHAT, json={"model": "gpt-4", "messages": HI}),
        served.http.get("/v1/models/gpt-4"),
    ):
        assert check_error(answer, 404, "model")["code"] == "model_not_found"


def test_a_body_that_is_too_large(served: Served) -> None:
    body = b'{"prompt": "' + b"t" * MOST_BODY_BYTES + b'"}'
    check_error(served.http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"}), 413)

    def parts():
        for begin in range(0, len(body), 1 << 20):
            yield body[begin : begin + (1 << 20)]

    check_error(served.http.post(COMPLETIONS, content=parts(), headers={"Content-Type": "application/json"}), 413)
    check_alive(served)


def test_what_is_sent_as_a_form(served: Served) -> None:
    """As `curl -d` sends it, and as any page on the web could."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    error = check_error(served.http.post(COMPLETIONS, content=b'{"prompt": "t1"}', headers=headers), 400)
    assert "application/json" in error["message"]


def test_values_that_change_nothing_are_taken(served: Served) -> None:
    for name, values in CHANGES_NOTHING.items():
        for value in values or ("anything", {"a": 1}, None):
            for path, usual in ((COMPLETIONS, {"prompt": [1]}), (CHAT, {"messages": HI})):
                body = {**usual, "max_tokens": 1, name: value}
                assert served.http.post(path, json=body).status_code == 200, body


def test_what_newer_clients_of_the_api_send_is_taken(served: Served) -> None:
    body = {"messages": HI, "max_tokens": 1, "moderation": None, "prompt_cache_options": {"mode": "implicit"}}
    assert served.http.post(CHAT, json=body).status_code == 200
    plain = {**body, "stream": True, "stream_options": {"include_obfuscation": False}}
    assert served.http.post(CHAT, json=plain).status_code == 200
    plain["stream_options"] = {"include_obfuscation": True}
    check_error(served.http.post(CHAT, json=plain), 400, "stream_options")


def test_a_key(bundle: Bundle) -> None:
    batch = Batch.open(bundle.root, slots=1, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer"), api_key="sesame") as served:
        del served.http.headers["Authorization"]
        for path in ("/", "/health", "/ready"):
            assert served.http.get(path).status_code == 200
        wrong = ["Bearer wrong", "Bearer sésame", "sesame", "Basic sesame", ""]
        for headers in ({}, {"X-Key": "1"}, *({"Authorization": one.encode()} for one in wrong)):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = served.http.get(path, headers=headers)
                assert check_error(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            check_error(served.http.post(COMPLETIONS, content=b"{", headers=headers), 401)
        for path in ("/v1/models", "/metrics"):
            whole = {"target": f"http://elsewhere{path}".encode()}  # as to a proxy
            check_error(served.http.get(path, extensions=whole), 401)
            for extensions in ({}, whole):
                answer = served.http.get(path, headers={"Authorization": "Bearer sesame"}, extensions=extensions)
                assert answer.status_code == 200


def test_a_bundle_without_a_template(tmp_path) -> None:
    bundle = word_bundle(tmp_path / "b", template=None)
    batch = Batch.open(bundle.root, slots=1, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as served:
        check_error(served.http.post(CHAT, json={"messages": HI}), 400, "messages")
        assert served.http.get("/v1/models").json()["data"][0]["lora_drop"]["chat"] is False


def test_a_row_that_does_not_fit_beside_the_batchs_k(bundle: Bundle) -> None:
    """Under skip the slots of dropped layers are made for the batch's k."""
    batch = Batch.open(bundle.root, slots=1, policy="skip", k=3, max_prompt_len=8, threads=1)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as served:
        body = {"prompt": [1] * 8, "max_tokens": 100}
        error = check_error(served.http.post(COMPLETIONS, json={**body, "k": 0}), 400, "k")
        assert "does not fit" in error["message"]
        check_error(served.http.post(COMPLETIONS, json={**body, "k": 0, "stream": True}), 400, "k")
        assert served.http.post(COMPLETIONS, json=body).status_code == 200
        check_alive(served)


def test_a_threshold_is_that_of_its_policy(bundle: Bundle) -> None:
    """As `lora-drop generate --schedule margin --policy skip` is refused; k goes with every policy."""
    batch = Batch.open(bundle.root, slots=1, policy="backfill", k=MarginSchedule(3, 1.25), threads=1)
    found = Calibration(1.25, 3, "backfill", 0.9, 0.91, 0.4, 500, 0.89, 0.41, 480)
    manifest = dataclasses.replace(bundle.manifest, calibration={"margin": found})
    batch.bundle = dataclasses.replace(bundle, manifest=manifest)
    with serving(batch, TextCodec.open(bundle.root / "tokenizer")) as served:
        body = {"prompt": [1] * 8, "max_tokens": 4, "policy": "skip"}
        error = check_error(served.http.post(COMPLETIONS, json=body), 400, "policy")
        assert "margin schedule was found for backfill; skip was asked for" in error["message"]
        assert served.http.post(COMPLETIONS, json={**body, "k": 2}).status_code == 200
        check_alive(served)


# ── anything at all ────────────────────────────────────────────────────────────────────────────────────────────

KINDS = CompletionRequest, ChatRequest, ResponseRequest
NAMES = sorted({"x", *CHANGES_NOTHING, *(name for kind in KINDS for name in kind.model_fields)})
TEXTS = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(["t1 t2", "user", "skip", "auto", "lossless"])
NUMBERS = st.integers(-3, 40) | st.integers() | st.floats() | st.sampled_from([0, 1, 2, 0.5, 1.0])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": TEXTS, "content": TEXTS | VALUES}, optional={"name": VALUES, "tool_calls": VALUES}),
    max_size=3,
)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"]) | VALUES,
            **dict.fromkeys(("role", "content", "call_id", "name", "output", "summary"), TEXTS | VALUES),
            "arguments": st.just("{}") | VALUES,
        },
    ),
    max_size=3,
)
BODY = st.builds(
    lambda prompt, rest: {**rest, **prompt},
    st.fixed_dictionaries({}, optional={"prompt": st.lists(st.integers(0, 130), min_size=1, max_size=9) | VALUES})
    | st.fixed_dictionaries({"messages": MESSAGES | VALUES})
    | st.fixed_dictionaries({"input": ITEMS | VALUES}),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(BODY, st.booleans())
def test_any_json_is_answered(served: Served, body: dict[str, Any], rare: bool) -> None:
    path = RESPONSES if "input" in body else CHAT if "messages" in body else COMPLETIONS
    limit = {"max_output_tokens" if path == RESPONSES else "max_tokens": 2}
    content = json.dumps(body if rare else {**body, **limit})
    answer = served.http.post(path, content=content.encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        check_error(answer, answer.status_code, answer.json()["error"]["param"])
    elif not body.get("stream"):
        assert answer.json()["usage"]["total_tokens"] > 0
    elif path == RESPONSES:
        assert json.loads(answer.text.splitlines()[-2].removeprefix("data: "))["response"]["usage"]
    else:
        assert answer.text.endswith("data: [DONE]\n\n")


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([COMPLETIONS, CHAT, RESPONSES, "/v1/models", "/"]), st.binary(max_size=60))
def test_any_bytes_are_answered(served: Served, path: str, body: bytes) -> None:
    answer = served.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404, 405)
    check_error(answer, answer.status_code, answer.json()["error"]["param"])


def test_after_all_that_the_loop_goes_on(served: Served) -> None:
    check_alive(served)

"""The line that each request leaves in the log, and its id: what they say is what the client was told."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.row import Event
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.answers import Answer
from lora_drop_serve.app import Gate
from lora_drop_serve.driver import Began, Job
from lora_drop_serve.names import request_id

from tests.support.serving import Served, await_that, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEYS = [
    *("time", "id", "route", "status", "error", "model"),
    *("prompt_tokens", "new_tokens", "finish_reason", "queue_seconds", "first_token_seconds", "total_seconds"),
]
MADE = re.compile("[0-9a-f]{32}")


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Served]:
    """One slot, and one row may wait."""
    batch = Batch.open(bundle.root, slots=1, policy="backfill", threads=1)
    codec = TextCodec.open(bundle.root / "tokenizer")
    with serving(batch, codec, max_waiting=1, log_requests=True, model_name="m", api_key="sesame") as server:
        yield server


class Log:
    """What standard error has got since the last look."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured, self._text = captured, ""

    def said(self) -> str:
        """All since the last lines."""
        self._text += self._captured.readouterr().err
        return self._text

    def lines(self, count: int) -> list[dict[str, Any]]:
        """So many, each of which comes when its answer is over, and none beside them."""
        await_that(lambda: self.said().count("\n") >= count)
        found, self._text = [json.loads(line) for line in self._text.splitlines()], ""
        assert len(found) == count
        for one in found:
            assert list(one) == KEYS
            assert datetime.fromisoformat(one["time"]).utcoffset() is not None
        return found


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


@pytest.mark.parametrize("streams", [False, True])
def test_a_line_says_what_the_answer_said(served: Served, log: Log, streams: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "t77 t78 t79"}]}
    for path, asked, prompt in ((COMPLETIONS, {"prompt": [3, 14]}, 2), (CHAT, chat, 3)):
        body = {**asked, "max_tokens": 9, "temperature": 0, "stream": streams}
        body |= {"stream_options": {"include_usage": True}} if streams else {}
        answer = served.http.post(path, json=body, headers={"X-Request-ID": "a-1"})
        assert (answer.status_code, answer.headers.get_list("x-request-id")) == (200, ["a-1"])
        (line,) = log.lines(1)
        whole = json.loads(answer.text.split("data: ")[-2]) if streams else answer.json()
        assert (line["id"], line["route"], line["status"], line["error"]) == ("a-1", path, 200, None)
        assert line["model"] == whole["model"] == "m"
        assert line["prompt_tokens"] == whole["usage"]["prompt_tokens"] == prompt
        assert line["new_tokens"] == whole["usage"]["completion_tokens"] == 9
        assert line["finish_reason"] == "length"
        assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["total_seconds"]


def test_choices_that_end_otherwise(served: Served, log: Log) -> None:
    first = served.http.post(COMPLETIONS, json={"prompt": [3], "max_tokens": 5, "temperature": 0}).json()
    second = first["choices"][0]["text"].split()[1]
    body = {"prompt": [[3], [4]], "max_tokens": 5, "temperature": 0, "stop": f" {second}"}
    found = [choice["finish_reason"] for choice in served.http.post(COMPLETIONS, json=body).json()["choices"]]
    assert found == ["stop", "length"]
    _, line = log.lines(2)
    assert line["finish_reason"] == "stop,length"
    assert line["prompt_tokens"] == 2


def test_what_is_refused_has_its_code_and_no_text_of_the_request(served: Served, log: Log) -> None:
    secret = "t77 " * 4
    cases: list[tuple[dict[str, Any], int, str, str | None]] = [
        ({"json": {"prompt": secret, "max_tokens": -1}}, 400, "greater_than_equal", None),
        ({"json": {"prompt": secret, secret: 1}}, 400, "unknown_parameter", None),
        ({"json": {"prompt": secret, "model": secret}}, 404, "model_not_found", None),
        ({"json": {"prompt": secret * 100}}, 400, "context_length_exceeded", "m"),
        ({"json": {"prompt": secret, "n": 3}}, 400, "invalid_request_error", "m"),
        ({"content": secret}, 400, "invalid_request_error", None),
        ({"json": {}, "headers": {"Authorization": f"Bearer {secret.strip()}"}}, 401, "invalid_api_key", None),
        ({"content": b"x" * (5 << 20)}, 413, "body_too_large", None),
    ]
    for asked, status, code, model in cases:
        answer = served.http.post(COMPLETIONS, **asked)
        assert answer.status_code == status, answer.text
        (line,) = log.lines(1)
        assert (line["status"], line["error"], line["model"]) == (status, code, model), answer.text
        assert line["id"] == answer.headers["x-request-id"]
        assert MADE.fullmatch(line["id"])
        assert "t77" not in json.dumps(line)
        assert line["total_seconds"] >= 0
        assert {line[key] for key in ("new_tokens", "finish_reason", "queue_seconds", "first_token_seconds")} == {None}


def test_routes_and_probes(served: Served, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes have a line where they fail, and other paths one name."""
    for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 200), ("/v1/models", 200), ("/t77?t77", 404)):
        answer = served.http.get(path)
        assert answer.status_code == status
        assert MADE.fullmatch(answer.headers["x-request-id"])
    monkeypatch.setattr(served.driver, "is_leaving", True)
    assert served.http.get("/ready").status_code == 503
    found = [(line["route"], line["status"], line["error"]) for line in log.lines(3)]
    assert found == [("/v1/models", 200, None), ("other", 404, "not_found"), ("/ready", 503, "closing")]


@pytest.mark.parametrize("streams", [True, False])
def test_clients_that_go_away(served: Served, log: Log, monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    """Ticks stand still from the fourth on, until the server knows."""
    gate, ticks, tick = threading.Event(), 0, served.driver._batch.tick

    def held() -> list[Event]:
        nonlocal ticks
        ticks += 1
        if ticks > 3:
            gate.wait()
        return tick()

    monkeypatch.setattr(served.driver._batch, "tick", held)
    data = json.dumps({"prompt": [3], "max_tokens": 126, "ignore_eos": True, "n": 2, "stream": streams}).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer sesame\r\n"
    )
    with socket.create_connection((served.http.base_url.host, served.http.base_url.port)) as client:
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await_that(lambda: ticks > 3)
        if streams:
            assert client.recv(9) == b"HTTP/1.1 "
    await_that(lambda: served.driver.open_rows == 0)
    (line,) = log.lines(1)
    assert (line["status"], line["error"], line["finish_reason"]) == (200 if streams else 499, "client_gone", None)
    assert line["new_tokens"] <= 3
    gate.set()
    served.await_rows(0)


def test_a_client_that_goes_away_before_the_end_of_what_was_made(
    served: Served, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens are there, but the last of them do not go out."""
    answer = Gate.__call__

    async def held(gate: Gate, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if b"[DONE]" in message.get("body", b""):
                await asyncio.Event().wait()
            await send(message)

        await answer(gate, scope, receive, sent)

    name = "lora_drop_request_duration_seconds_count"
    before = served.metrics()[name]
    with monkeypatch.context() as patch:
        patch.setattr(Gate, "__call__", held)
        with served.http.stream("POST", COMPLETIONS, json={"prompt": [3], "max_tokens": 4, "stream": True}) as told:
            next(line for line in told.iter_lines() if '"finish_reason":null' not in line and line)
        (line,) = log.lines(1)
    assert (line["status"], line["error"], line["new_tokens"]) == (200, "client_gone", 4)
    assert served.metrics()[name] == before


def test_a_client_that_goes_away_within_its_body(served: Served, log: Log) -> None:
    """Its JSON is not wrong, but cut."""
    name = 'lora_drop_refused_requests_total{reason="json"}'
    before = served.metrics()[name]
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Length: 9\r\n\r\n"
    with socket.create_connection((served.http.base_url.host, served.http.base_url.port)) as client:
        client.sendall(f"{head}{{".encode())
    (line,) = log.lines(1)
    assert (line["route"], line["status"], line["error"]) == (COMPLETIONS, 499, "client_gone")
    assert served.metrics()[name] == before


def broken(*_: object) -> Any:
    """A part of the server with an error of its own."""
    raise ZeroDivisionError


def test_errors_of_our_own(served: Served, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    before = served.metrics()
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "whole", broken)
        answer = served.http.post(COMPLETIONS, json={"prompt": [3]}, headers={"X-Request-ID": "a-2"})
        assert (answer.status_code, answer.headers.get_list("x-request-id")) == (500, ["a-2"])
        assert answer.headers["connection"] == "close"
    name = f'lora_drop_requests_total{{path="{COMPLETIONS}",status="500"}}'
    assert served.metrics()[name] - before.get(name, 0) == 1
    (line,) = log.lines(1)
    assert (line["id"], line["status"], line["error"]) == ("a-2", 500, "internal_error")


def test_a_stream_that_an_error_of_our_own_breaks_off(
    served: Served, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client has not left: it sees the connection end."""
    monkeypatch.setattr(Answer, "chunks", broken)
    with pytest.raises(httpx.RemoteProtocolError):
        served.http.post(COMPLETIONS, json={"prompt": [3], "stream": True})
    (line,) = log.lines(1)
    assert (line["status"], line["error"]) == (200, "internal_error")


def test_what_is_no_http_has_an_id_and_a_line(served: Served, log: Log) -> None:
    with socket.create_connection((served.http.base_url.host, served.http.base_url.port)) as client:
        client.sendall(b"no HTTP\r\n\r\n")
        head = b"".join(iter(lambda: client.recv(1 << 16), b"")).partition(b"\r\n\r\n")[0].decode().lower()
    (line,) = log.lines(1)
    assert f"x-request-id: {line['id']}" in head
    assert (line["route"], line["status"], line["error"]) == ("other", 400, "malformed")


def test_the_times_are_those_of_slot_and_token(served: Served, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: the second of two rows waits for all ticks of the first."""
    now = 100.0
    monkeypatch.setattr("lora_drop_serve.driver.time", SimpleNamespace(perf_counter=lambda: now))
    tick = served.driver._batch.tick

    def ticked() -> list[Event]:
        nonlocal now
        events = tick()
        now += 1
        return events

    monkeypatch.setattr(served.driver._batch, "tick", ticked)
    begun = list[tuple[int, float]]()
    take = Job.take

    def taken(job: Job, item: Any, *rest: Any) -> None:
        take(job, item, *rest)
        if isinstance(item, Began):
            begun.append((item.row, item.at))

    monkeypatch.setattr(Job, "take", taken)
    body = {"prompt": [[3], [4]], "max_tokens": 4, "temperature": 0, "ignore_eos": True, "k": 0}
    assert served.http.post(COMPLETIONS, json=body).status_code == 200
    (line,) = log.lines(1)
    assert begun == [(0, 100.0), (1, 104.0)]  # a row of four tokens takes four ticks
    assert (line["queue_seconds"], line["first_token_seconds"]) == (0, 1)


@pytest.mark.parametrize("given", ["a", "4bf92f3577b34da6", "A.b_c:d/e+f=g@h-i", "x" * 128])
def test_ids_that_are_taken_over(given: str) -> None:
    assert request_id([(b"host", b"x"), (b"x-request-id", given.encode())]) == given


@pytest.mark.parametrize("given", [b"", b"a b", b'a"b', b"a\n", b"a\r\nX: y", b"\xe9", b"x" * 129, b"{}", b"a,b"])
def test_ids_that_are_not(given: bytes) -> None:
    found = {request_id([(b"x-request-id", given)]) for _ in range(2)}
    assert len(found) == 2
    assert all(map(MADE.fullmatch, found))


def test_of_two_ids_none_is_taken() -> None:
    assert MADE.fullmatch(request_id([(b"x-request-id", b"a"), (b"x-request-id", b"a")]))

"""What may go wrong while rows run: readers that leave or sleep, rows and engines that fail, a full queue, the end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h11
import httpx
import numpy as np
import pytest
from lora_drop_runtime import Batch, BundleError, InputError, PeriodicSchedule
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import Limits
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.driver import Job, RowRequest
from lora_drop_serve.requests import MOST_BODY_BYTES

from tests.support.decoding import PLAN, continued
from tests.support.fake_engine import FakeEngine, Run, make_manifest, open_session
from tests.support.serving import Served, await_that, serving, word_tokenizer

COMPLETIONS = "/v1/completions"


class GatedEngine(FakeEngine):
    """Runs only while its gate is open, from the `held`-th run on."""

    def __init__(self) -> None:
        super().__init__(PLAN)
        self.batched_chunks = self.idle_rows = True
        self.gate, self.held = threading.Event(), 0
        self.gate.set()
        self.broken: Callable[[Run], None] = lambda run: None

    def _predict(self, run: Run) -> None:
        if len(self.runs) >= self.held:
            self.gate.wait()
        super()._predict(run)
        self.broken(run)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "lora_drop.json").write_text("{}")
    word_tokenizer(root)
    return TextCodec.open(root / "tokenizer")


@pytest.fixture
def engine() -> GatedEngine:
    return GatedEngine()


@pytest.fixture
def served(engine: GatedEngine, codec: TextCodec) -> Iterator[Served]:
    """Two slots, and two rows may wait."""
    bundle = Bundle(Path("/nowhere"), make_manifest(PLAN, limits=Limits(100_000, 4000, 8)))
    batch = Batch(bundle, engine, PeriodicSchedule(2), "backfill", slots=2, max_seq_len=5000)
    with serving(batch, codec, max_waiting=2) as server:
        yield server
        engine.gate.set()


def body(count: int, prompt: int = 7, **options: Any) -> dict[str, Any]:
    return {"prompt": [prompt], "max_tokens": count, "temperature": 0, **options}


def wanted(count: int, prompt: int = 7) -> str:
    return " ".join(f"t{token}" for token in continued([prompt], count))


def check_alive(served: Served) -> None:
    """No row is left, no place is taken, and four requests at once are answered."""
    served.await_rows(0)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: served.http.post(COMPLETIONS, json=body(5, n)), range(4)))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [wanted(5, n) for n in range(4)]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    return answer.json()["error"]


def refused(served: Served) -> dict[str, float]:
    """What `/metrics` counts as requests that were not taken."""
    return {name: count for name, count in served.metrics().items() if "refused_requests_total" in name and count}


# ── clients ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_given_up(served: Served, engine: GatedEngine) -> None:
    """Once the server knows that the client is gone, the tick that runs is the row's last."""
    await_that(lambda: served.driver.open_rows == 0)
    engine.gate.set()
    served.await_rows(0)
    assert len(engine.runs) == 20
    check_alive(served)


def test_a_client_that_goes_away_in_a_stream_frees_its_row(served: Served, engine: GatedEngine) -> None:
    engine.gate.clear()
    engine.held = 20
    with served.http.stream("POST", COMPLETIONS, json=body(4000, stream=True)) as answer:
        lines = answer.iter_lines()  # which closes the response when it is forgotten
        next(lines)
        await_that(lambda: len(engine.runs) == 20)
    check_given_up(served, engine)


def test_a_client_that_goes_away_before_its_answer_frees_its_row(served: Served, engine: GatedEngine) -> None:
    host, port = served.http.base_url.host, served.http.base_url.port
    data = json.dumps(body(4000)).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    with socket.create_connection((host, port)) as client:
        engine.gate.clear()
        engine.held = 20
        client.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\n{headers}\r\n".encode() + data)
        await_that(lambda: len(engine.runs) == 20)
    check_given_up(served, engine)


@pytest.mark.parametrize("early", [b"\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["line", "request"])
def test_a_client_that_goes_away_behind_its_next_request_frees_its_row(
    served: Served, engine: GatedEngine, early: bytes
) -> None:
    engine.gate.clear()
    engine.held = 20
    asked = json.dumps(body(1000)).encode()
    with socket.create_connection((served.http.base_url.host, served.http.base_url.port)) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(asked) + asked)
        await_that(lambda: len(engine.runs) == 20)
        client.sendall(early)
        (connection,) = [one for one in served.server.server_state.connections if one.conn.their_state is h11.DONE]
        await_that(lambda: connection.conn.trailing_data[0] == early)
    check_given_up(served, engine)


def test_many_that_hang_up_in_the_midst(served: Served) -> None:
    """Some before their first token, some while they wait, some while they are told; nothing is kept of them."""

    def hang_up(number: int) -> int:
        with httpx.Client(base_url=served.address, timeout=None, verify=False) as http:  # reads no certificates
            asked = body(50 + number % 50, number % 40, stream=True)
            with http.stream("POST", COMPLETIONS, json=asked) as answer:
                lines = answer.iter_lines()
                for _ in range(number % 7):
                    next(lines, None)
                return answer.status_code

    with ThreadPoolExecutor(12) as pool:
        statuses = set(pool.map(hang_up, range(100)))
    assert statuses <= {200, 429}
    check_alive(served)
    driver = served.driver
    assert (driver._rows, driver._numbers, driver._queue) == ({}, {}, {})


def test_a_reader_that_sleeps_holds_nobody_up(served: Served) -> None:
    """What it does not take lies in its job; the others go on, and it gets all of it when it wakes."""
    with served.http.stream("POST", COMPLETIONS, json=body(4000, stream=True)) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        for number in range(5):
            other = served.http.post(COMPLETIONS, json=body(9, number))
            assert other.json()["choices"][0]["text"] == wanted(9, number)
        await_that(lambda: served.driver._batch.rows == 0)  # it has run to its end, unread
        data = [line.removeprefix("data: ") for line in [first, *lines] if line]
    assert data.pop() == "[DONE]"
    assert "".join(json.loads(one)["choices"][0]["text"] for one in data) == wanted(4000)
    check_alive(served)


@contextlib.contextmanager
def sleeping_reader(served: Served, count: int, streams: bool) -> Iterator[socket.socket]:
    """One that takes nothing of an answer of so many texts, which have far more than the system keeps."""
    data = json.dumps(body(8000 // count, n=count, stream=streams, logprobs=20)).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((served.http.base_url.host, served.http.base_url.port))
        client.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\n{headers}\r\n".encode() + data)
        await_that(lambda: served.driver.open_rows == count)
        yield client


@pytest.mark.parametrize("streams", [True, False])
def test_a_reader_that_never_wakes_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    """Once what is sent to it does not go out any more: here at once, not after a minute. Nothing is kept for it."""
    monkeypatch.setattr("lora_drop_serve.server.MOST_STALL_SECONDS", 0)
    with sleeping_reader(served, 4, streams) as client:
        await_that(lambda: not served.server.server_state.connections)
        monkeypatch.undo()
        check_alive(served)
        got = b"".join(iter(lambda: client.recv(1 << 16), b""))
    head, _, told = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    if streams:
        assert b"[DONE]" not in told
    else:
        assert f"content-length: {len(told)}".encode() not in head.lower().splitlines()
    assert served.metrics()["lora_drop_request_duration_seconds_count"] == 4  # those of `check_alive`


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_keeps_its_places_until_it_is_delivered(served: Served, streams: bool) -> None:
    connections = served.server.server_state.connections
    with sleeping_reader(served, 2, streams):
        await_that(lambda: any(one.transport.get_write_buffer_size() > 1 << 16 for one in connections))
        await_that(lambda: served.driver._batch.rows == 0)
        answer = served.http.post(COMPLETIONS, json=body(3, n=3))
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
    check_alive(served)


# ── what is no request, or none that ends ──────────────────────────────────────────────────────────────────────


def sent(served: Served, data: bytes) -> bytes:
    """All that the server says to this before it closes the connection."""
    with socket.create_connection((served.http.base_url.host, served.http.base_url.port)) as client:
        client.sendall(data)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def check_raw(answer: bytes, status: int, code: str) -> None:
    """One answer, whose body is the API's error object."""
    head, _, data = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert b"content-type: application/json" in head.lower()
    error = json.loads(data)["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["code"], error["type"]) == (code, "invalid_request_error")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS, spoken to a server without
        b"what is this\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    ],
    ids=["tls", "words", "host", "length"],
)
def test_what_is_no_http_gets_the_error_object(served: Served, data: bytes) -> None:
    check_raw(sent(served, data), 400, "malformed")
    check_alive(served)


def test_a_request_whose_end_is_not_certain_is_the_last_of_its_connection(served: Served) -> None:
    """By its length the second one is a part of its body, which a proxy may take it for."""
    second = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b"0\r\n\r\n" + second
    ends = b"Content-Length: %d\r\n" % len(body), b"Transfer-Encoding: chunked\r\n"
    for head in (ends, ends[::-1]):
        check_raw(sent(served, HEAD + b"".join(head) + b"\r\n" + body), 400, "malformed")
    check_alive(served)


def test_a_whole_address_is_taken(served: Served) -> None:
    answer = sent(served, b"GET http://elsewhere/health HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert sent(served, b"GET http://x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.parametrize("data", [HEAD[:1], HEAD, HEAD[:-1]], ids=len)
def test_a_head_that_does_not_end_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("lora_drop_serve.server.HEAD_SECONDS", 0.05)
    check_raw(sent(served, data), 408, "too_slow")
    assert sent(served, b"") == b""  # of a connection that lies idle there is nothing to say
    check_alive(served)


def test_of_prompts_one_of_which_the_batch_refuses_none_runs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others would run on for nobody."""
    batch, added, given_up = served.driver._batch, list[int](), list[int]()
    add, cancel = batch.add, batch.cancel

    def refuse_nine(prompt: Any, *arguments: Any, **options: Any) -> int:
        if prompt.tolist() == [9]:
            raise InputError("The prompt cannot run.", note="It is 9.", hint="Give another.")
        added.append(add(prompt, *arguments, **options))
        return added[-1]

    monkeypatch.setattr(batch, "add", refuse_nine)
    monkeypatch.setattr(batch, "cancel", lambda number: given_up.append(number) or cancel(number))
    answer = served.http.post(COMPLETIONS, json=body(900) | {"prompt": [[7], [9]]})
    assert (answer.status_code, len(added), given_up) == (400, 1, added)
    assert "cannot run" in error_of(answer)["message"]
    monkeypatch.undo()
    check_alive(served)


def test_what_the_head_is_refused_for_is_said_before_the_body(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_drop_serve.app.DISCARD_SECONDS", 3600)
    for length in (MOST_BODY_BYTES + 1, 10**15):
        head = HEAD + f"Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n".encode()
        with socket.create_connection((served.http.base_url.host, served.http.base_url.port), timeout=600) as client:
            client.sendall(head)
            answer = b""
            while not answer.endswith(b"}") and (part := client.recv(1 << 16)):
                answer += part
        check_raw(answer, 413, "body_too_large")
    check_alive(served)


def test_a_body_that_does_not_end_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_drop_serve.app.BODY_SECONDS", 0.05)
    check_raw(sent(served, HEAD + b"Content-Length: 100\r\n\r\n{"), 408, "too_slow")
    check_raw(sent(served, HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"), 408, "too_slow")
    assert served.driver.open_rows == 0
    check_alive(served)


def test_a_body_that_nobody_reads_is_cut_off_though_it_goes_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte after the other, behind an answer that is complete."""
    monkeypatch.setattr("lora_drop_serve.server.HEAD_SECONDS", 0.2)
    with socket.create_connection((served.http.base_url.host, served.http.base_url.port)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")

        def is_open() -> bool:
            try:
                client.sendall(b"x")
            except ConnectionError:
                return False
            return True

        await_that(lambda: not is_open())
    check_alive(served)


def test_time_for_a_head_does_not_run_while_an_answer_does(
    served: Served, engine: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does that for a body, once it is there: the tick waits until both would long be over."""
    monkeypatch.setattr("lora_drop_serve.server.HEAD_SECONDS", 0.05)
    monkeypatch.setattr("lora_drop_serve.app.BODY_SECONDS", 0.05)
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(served.http.post, COMPLETIONS, json=body(5))
        await_that(lambda: served.driver.open_rows == 1)
        assert sent(served, b"GET") != b""  # which takes as long as a head may
        engine.gate.set()
        assert whole.result().json()["choices"][0]["text"] == wanted(5)
    monkeypatch.undo()
    check_alive(served)


# ── the queue ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue(served: Served, engine: GatedEngine) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(served.http.post, COMPLETIONS, json=body(6, n)) for n in range(4)]
        await_that(lambda: served.driver.open_rows == 4)
        for options in ({}, {"stream": True}):
            late = served.http.post(COMPLETIONS, json=body(6, **options))
            assert late.status_code == 429
            assert int(late.headers["Retry-After"]) >= 1
            assert (error_of(late)["type"], error_of(late)["code"]) == ("rate_limit_error", "queue_full")
        metrics = served.metrics()
        assert metrics["lora_drop_rows_running"] + metrics["lora_drop_rows_waiting"] <= 4
        await_that(lambda: served.metrics()["lora_drop_rows_running"] > 0)  # though the first tick is not over
        engine.gate.set()
        texts = [one.result().json()["choices"][0]["text"] for one in running]
    assert texts == [wanted(6, n) for n in range(4)]
    many = served.http.post(COMPLETIONS, json=body(2, n=5))
    assert (many.status_code, error_of(many)["param"]) == (400, "n")
    check_alive(served)


# ── engines ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("streams", [False, True])
def test_a_row_that_fails_fails_alone(served: Served, engine: GatedEngine, streams: bool) -> None:
    """Its logits are no numbers: those of the row that has token 43 in its prompt."""
    engine.gate.clear()

    def broken(run: Run) -> None:
        run.binding.outputs["logits"][(run.input_ids == 43).any(axis=1), :, 3] = np.nan

    engine.broken = broken
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(served.http.post, COMPLETIONS, json={**body(6), "prompt": [7]})
        bad = pool.submit(served.http.post, COMPLETIONS, json={**body(6), "prompt": [43], "stream": streams})
        await_that(lambda: served.driver.open_rows == 2)
        engine.gate.set()
    assert good.result().json()["choices"][0]["text"] == wanted(6)
    answer = bad.result()
    if streams:
        assert answer.status_code == 200
        (last,) = (line for line in answer.text.splitlines() if line)
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 500
        error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "failed")
    assert "not numbers" in error["message"]
    engine.broken = lambda run: None
    check_alive(served)
    assert not refused(served)  # it was taken


@pytest.mark.parametrize("error", [BundleError("The device is lost."), RuntimeError("secret"), MemoryError()], ids=repr)
def test_an_engine_that_fails_ends_what_runs_and_says_so(
    served: Served, engine: GatedEngine, error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.gate.clear()

    def broken(_: Run) -> None:
        raise error

    engine.broken = broken
    with ThreadPoolExecutor(3) as pool:
        whole = pool.submit(served.http.post, COMPLETIONS, json=body(6))
        stream = pool.submit(served.http.post, COMPLETIONS, json=body(6, stream=True))
        await_that(lambda: served.driver.open_rows == 2)
        engine.gate.set()
    assert whole.result().status_code == 503
    assert error_of(whole.result())["code"] == "engine_failed"
    assert '"code":"engine_failed"' in stream.result().text
    for answer in (served.http.get("/ready"), served.http.get("/health"), served.http.post(COMPLETIONS, json=body(3))):
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "engine_failed"
        assert "secret" not in answer.text
    metrics = served.metrics()
    gauges = [name for name in metrics if name.startswith(("lora_drop_rows", "lora_drop_kv"))]
    assert len(gauges) == 5
    assert {metrics[name] for name in gauges} == {0}  # of what is no more
    assert engine.times_closed == 1
    said = {BundleError: "The device is lost.", RuntimeError: "RuntimeError: secret", MemoryError: "MemoryError"}
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert lines == [f"error: the engine has failed, and nothing runs any more: {said[type(error)]}"]


def test_a_step_that_does_not_end_is_no_health(
    served: Served, engine: GatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_drop_serve.driver.STALLED_SECONDS", 0)
    engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.http.post, COMPLETIONS, json=body(3))
        await_that(lambda: served.http.get("/health").status_code == 503)
        assert error_of(served.http.get("/ready"))["code"] == "stalled"
        engine.gate.set()
        assert running.result().status_code == 200
    check_alive(served)


# ── the end ────────────────────────────────────────────────────────────────────────────────────────────────────


def drain(served: Served, seconds: float, delay: float = 0.0) -> Any:
    """What the first signal does."""
    import asyncio

    return asyncio.run_coroutine_threadsafe(served.driver.drain(seconds, delay), served.driver._loop)


def test_what_runs_ends_and_what_comes_is_refused(served: Served, engine: GatedEngine) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(served.http.post, COMPLETIONS, json=body(6, n)) for n in range(4)]
        await_that(lambda: served.driver.open_rows == 4)
        draining = drain(served, 600)
        await_that(lambda: served.http.get("/ready").status_code == 503)
        late = served.http.post(COMPLETIONS, json=body(3))
        assert (late.status_code, error_of(late)["code"]) == (503, "closing")
        assert late.headers["Retry-After"]
        assert served.http.get("/health").status_code == 200
        engine.gate.set()
        texts = [one.result().json()["choices"][0]["text"] for one in running]
    assert texts == [wanted(6, n) for n in range(4)]
    assert draining.result() == 0


def test_before_it_drains_a_server_that_leaves_serves(served: Served) -> None:
    draining = drain(served, 600, delay=600)
    await_that(lambda: served.http.get("/ready").status_code == 503)
    for streams in (False, True):
        late = served.http.post(COMPLETIONS, json=body(3, stream=streams))
        assert (late.status_code, late.headers["connection"]) == (200, "close")
    assert not draining.done()
    served.driver.cut()
    assert draining.result() == 0
    assert error_of(served.http.post(COMPLETIONS, json=body(3)))["code"] == "closing"


def test_an_engine_that_fails_ends_the_delay(served: Served, engine: GatedEngine) -> None:
    def broken(_: Run) -> None:
        raise RuntimeError

    draining = drain(served, 600, delay=600)
    engine.broken = broken
    assert served.http.post(COMPLETIONS, json=body(3)).status_code == 503
    assert draining.result() == 0


def test_what_a_failed_engine_has_ended_is_not_cut(served: Served, engine: GatedEngine) -> None:
    """Though its answer is not delivered yet."""
    import asyncio

    def broken(_: Run) -> None:
        raise RuntimeError

    async def begun() -> Job:
        job = served.driver.submit([RowRequest(np.array([7]), 3, {})])
        await job.begin()
        return job

    engine.broken = broken
    job = asyncio.run_coroutine_threadsafe(begun(), served.driver._loop).result()
    await_that(lambda: served.driver.error is not None)
    assert served.driver.open_rows == 1
    assert drain(served, 600).result() == 0
    served.driver._loop.call_soon_threadsafe(job.close)


def test_two_signals_at_once_end_the_server(served: Served, engine: GatedEngine) -> None:
    """Before the loop has come to what the first one began."""
    engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.http.post, COMPLETIONS, json=body(6))
        await_that(lambda: served.driver.open_rows == 1)
        for _ in range(2):
            served.driver._loop.call_soon_threadsafe(lambda: [served.server._end(), served.server._end()])
        await_that(lambda: served.server.should_exit)
        assert running.result().status_code == 503
        engine.gate.set()


def test_after_the_grace_what_runs_is_cut(served: Served, engine: GatedEngine) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(served.http.post, COMPLETIONS, json=body(6))
        stream = pool.submit(served.http.post, COMPLETIONS, json=body(6, stream=True))
        await_that(lambda: served.driver.open_rows == 2)
        assert drain(served, 0).result() == 2
        assert whole.result().status_code == 503
        assert '"code":"closing"' in stream.result().text
        engine.gate.set()


def test_a_session_of_the_fake_engine_agrees() -> None:
    """What `wanted` says is what the fake model writes."""
    session, _ = open_session(PLAN)
    assert session.generate([[7]], 9, stop_token_ids=())[0].tolist() == continued([7], 9)

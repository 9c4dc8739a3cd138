"""The command itself: what it says, what it refuses, and how it ends under load."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_serve.driver import Driver
from lora_drop_serve.server import address as server_address
from lora_drop_serve.server import is_local, listening, make_server
from lora_drop_tools.cli import main
from lora_drop_tools.serve import ServeSettings

from tests.serve.test_client import alone, words
from tests.support.serving import await_that

COMMAND = [sys.executable, "-m", "lora_drop_tools", "serve"]


def _hear_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which a run in the background may ignore
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def started(bundle: Bundle, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, once it listens, and its address."""
    command = [*COMMAND, str(bundle.root), "--port", "0", "--threads", "1", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=_hear_signals,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"serving \S+ at (http://\S+) ", line)
            assert found, (line, process.stderr)
            yield process, found[1]
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate()
    return process.returncode, errors


def on_this_host(address: str) -> str:
    return f"http://127.0.0.1:{address.rpartition(':')[2]}"


def test_a_signal_under_load_loses_nothing(bundle: Bundle) -> None:
    """Every request that was taken is answered in full; those that come later are refused, none is cut."""
    asked: list[dict[str, Any]] = [
        {"prompt": [n, n + 1], "max_tokens": 80, "temperature": 0, "stream": n % 2 == 0} for n in range(12)
    ]
    with started(bundle, "--slots", "2", "--policy", "backfill", "--grace", "86400") as (process, address):
        taken = threading.Semaphore(0)

        def one(body: dict[str, Any]) -> str:
            with httpx.Client(base_url=address, timeout=None, verify=False) as http:
                request = http.build_request("POST", "/v1/completions", json=body)
                answer = http.send(request, stream=True) if body["stream"] else None
                taken.release()
                if answer is None:
                    answer = http.send(request)
                text = answer.read().decode()
                assert answer.status_code == 200, text
                if body["stream"]:
                    assert text.endswith("data: [DONE]\n\n")
                    return "".join(re.findall(r'"text":"(.*?)"', text))
                return str(answer.json()["choices"][0]["text"])

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = [pool.submit(one, body) for body in asked]
            for _ in asked:
                taken.acquire()
            with httpx.Client(base_url=address, timeout=None) as http:
                open_rows = 0.0
                while open_rows < len(asked):  # all have come
                    found = re.findall(r"^lora_drop_prompt_tokens_total (\S+)", http.get("/metrics").text, re.MULTILINE)
                    open_rows = float(found[0]) / 2
            process.send_signal(signal.SIGTERM)
            texts = [answer.result() for answer in answers]
        code, errors = end_of(process)
    assert (code, "cut" in errors, "Traceback" in errors) == (0, False, False), errors
    assert texts == [words(alone(bundle, body["prompt"], 80)) for body in asked]


def test_a_second_signal_cuts_what_runs(bundle: Bundle) -> None:
    body = {"prompt": [1], "max_tokens": 120, "stream": True, "n": 60}
    with (
        started(bundle, "--slots", "1", "--grace", "86400") as (process, address),
        httpx.Client(base_url=address, timeout=None) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while http.get("/ready").status_code == 200:
            pass
        process.send_signal(signal.SIGINT)
        assert '"code":"closing"' in [line for line in lines if line][-1]
        code, errors = end_of(process)
    assert code == 0
    assert "1 request cut, after" in errors
    assert "Traceback" not in errors


def test_the_end_waits_for_no_client_that_stands_still(bundle: Bundle) -> None:
    """One in the midst of its body is told that the server closes; of one that is told of its refusal and goes on, and
    of one that takes nothing of its answer, the server takes leave. None of it is an error of the server's own."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    data = json.dumps({"prompt": [1], "max_tokens": 120, "stream": True, "n": 60, "logprobs": 20}).encode()
    begun = {
        "half": head + b"100\r\n\r\n{",
        "refused": head + b"10000000\r\n\r\n{",
        "reader": head + f"{len(data)}\r\n\r\n".encode() + data,
    }
    with started(bundle, "--grace", "0") as (process, address), ExitStack() as ends:
        http = ends.enter_context(httpx.Client(base_url=address, timeout=None))
        clients = {name: ends.enter_context(socket.socket()) for name in begun}
        for name, client in clients.items():
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((http.base_url.host, http.base_url.port))
            client.sendall(begun[name])
        assert clients["refused"].recv(1 << 16).startswith(b"HTTP/1.1 413")
        made = r"^lora_drop_tokens_total\S+ (\S+)"
        await_that(lambda: sum(map(float, re.findall(made, http.get("/metrics").text, re.MULTILINE))) == 60 * 120)
        process.send_signal(signal.SIGTERM)
        told = b"".join(iter(lambda: clients["half"].recv(1 << 16), b""))
        code, errors = end_of(process)
    assert told.startswith(b"HTTP/1.1 503"), told
    assert b'"code":"closing"' in told
    assert code == 0
    assert "1 request cut, after" in errors
    assert "ERROR" not in errors
    assert "Traceback" not in errors


BODY = {"prompt": [1], "max_tokens": 3, "temperature": 0}


def test_signals_that_are_ignored_stay_so_and_all_handlers_come_back() -> None:
    """`nohup` lets SIGHUP be ignored."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        _hear_signals()  # this process may ignore some itself
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        server = make_server(FastAPI(), cast(Driver, None), 0)
        with server.capture_signals():
            taken = [signal.getsignal(number) for number in numbers]
        assert taken == [server.handle_exit, server.handle_exit, signal.SIG_IGN]
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL, signal.SIG_DFL, signal.SIG_IGN]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with server.capture_signals():
            assert signal.getsignal(signal.SIGHUP) == server.handle_exit
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_key_from_the_environment_and_a_delay_that_ends_by_itself(bundle: Bundle) -> None:
    """On any host: with a key there is nothing to warn of."""
    arguments = ("--host", "0.0.0.0", "--drain-delay", "0.05", "--grace", "86400")
    with started(bundle, *arguments, LORA_DROP_API_KEY="sesame") as (process, address):
        with httpx.Client(base_url=on_this_host(address), timeout=None) as http:
            assert http.get("/v1/models").status_code == 401
            http.headers["Authorization"] = "Bearer sesame"
            assert http.get("/v1/models").status_code == 200
            assert "connection" not in http.post("/v1/completions", json=BODY).headers
            process.send_signal(signal.SIGTERM)
        code, errors = end_of(process)
    assert code == 0
    assert "served for 0.05 s" in errors
    for word in ("cut", "warning", "Traceback"):
        assert word not in errors


def test_a_second_signal_ends_the_delay(bundle: Bundle) -> None:
    arguments = ("--drain-delay", "86400", "--grace", "86400", "--api-key", "sesame")
    with started(bundle, *arguments) as (process, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        with (
            httpx.Client(base_url=address, timeout=None, headers={"Authorization": "Bearer sesame"}) as http,
            http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 120, "n": 60, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            await_that(lambda: http.get("/ready").status_code == 503)
            assert http.get("/v1/models").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert '"code":"closing"' in [line for line in lines if line][-1]
        code, errors = end_of(process)
    assert code == 0
    assert "1 request cut, after" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "is empty"),
        ("sesame ", "begins or ends with white space"),
        ("open\nsesame", "has a line break"),
        ("open\vsesame", "has a line break"),
    ],
)
def test_a_key_that_nobody_can_send_is_refused(key: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable is a secret that was not loaded, not a wish to let everybody in."""
    with pytest.raises(InputError, match=rf"--api-key {said}"):
        ServeSettings(api_key=key)
    monkeypatch.setenv("LORA_DROP_API_KEY", key)
    with pytest.raises(InputError, match=rf"LORA_DROP_API_KEY {said}"):
        ServeSettings()
    assert ServeSettings(api_key="x").key == "x"


def asked_twice(address: str) -> list[int]:
    """How many tokens of a prompt of 40 were kept when it came, and when it came again; the answers are the same."""
    body = {"prompt": list(range(40)), "max_tokens": 2, "temperature": 0}
    answers = [httpx.post(f"{address}/v1/completions", json=body, timeout=600).json() for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    return [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers]


def test_ipv6(bundle: Bundle) -> None:
    """And no prefixes are kept, where it is said."""
    arguments = ("--no-prefixes", "--slots", "1", "--max-waiting", "0", "--grace", "0")
    with started(bundle, "--host", "[::1]", *arguments) as (process, address):
        assert address.startswith("http://[::1]:")
        assert asked_twice(address) == [0, 0]
        process.send_signal(signal.SIGHUP)
        code, errors = end_of(process)
    assert code == 0
    assert "warning" not in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("system", "reuses"), [("linux", True), ("darwin", True), ("win32", False)])
def test_two_servers_never_listen_at_one_place(monkeypatch: pytest.MonkeyPatch, system: str, reuses: bool) -> None:
    """The option lets one listen where another did a moment before; on Windows where another does."""
    monkeypatch.setattr(sys, "platform", system)
    with listening("127.0.0.1", 0) as made:
        assert bool(made.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) == reuses


@pytest.mark.parametrize(("host", "local"), [("127.1", True), ("LOCALHOST", True), ("[::1]", True), ("0", False)])
def test_who_reaches_a_server_is_said_by_its_address(host: str, local: bool) -> None:
    """A name or a short form of this machine's own was warned of."""
    with listening(host, 0) as made:
        assert is_local(made) == local


def test_ipv6_without_brackets() -> None:
    with listening("::1", 0) as made:
        assert server_address(made).startswith("http://[::1]:")


@pytest.mark.skipif(not Path("/proc").exists(), reason="threads are counted in /proc")
def test_texts_need_no_thread_for_each_core(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may not have as many: tokenizers took no text for ever after, and the server was ready."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with started(bundle, RAYON_NUM_THREADS="50") as (process, address):
        done = httpx.post(f"{address}/v1/completions", json={"prompt": "t1 t2", "max_tokens": 2}, timeout=None)
        assert done.status_code == 200
        assert len(os.listdir(f"/proc/{process.pid}/task")) < 50


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_the_log_stops_nothing(bundle: Bundle) -> None:
    """Not the start, not an answer, not what is said of connections and cut requests, and not the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*COMMAND, str(bundle.root), "--port", str(port), "--threads", "1", "--slots", "1", "--grace", "0"]
    address = f"http://127.0.0.1:{port}"
    with (
        open("/dev/full", "w", encoding="utf-8") as full,
        subprocess.Popen(command, stdout=full, stderr=full) as process,
    ):
        try:
            with httpx.Client(base_url=address, timeout=None) as http:
                await_that(lambda: answers(http))
                for _ in range(20):
                    with socket.create_connection(("127.0.0.1", port)) as client:
                        client.sendall(b"no HTTP\r\n\r\n")  # each is logged
                        assert client.recv(99).startswith(b"HTTP/1.1 400")
                    done = http.post("/v1/completions", json={"prompt": [1], "max_tokens": 3})
                    assert done.status_code == 200
                body = {"prompt": [1], "max_tokens": 120, "stream": True, "n": 60}
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)  # cuts it, which is told
                    assert '"code":"closing"' in [line for line in lines if line][-1]
            process.wait()
        finally:
            process.kill()


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_bundle_that_disappears_is_served_on(bundle: Bundle, tmp_path: Path) -> None:
    """With another one in its place, whose tokenizer nobody can read.

    On any host without a key, which is warned of; and prefixes are kept, where nothing else is said.
    """
    root = tmp_path / "b"
    shutil.copytree(bundle.root, root)
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}
    with (
        started(Bundle.open(root), "--host", "0.0.0.0") as (process, address),
        httpx.Client(base_url=on_this_host(address), timeout=None) as http,
    ):
        assert asked_twice(on_this_host(address)) == [0, 38]
        body = {"prompt": "t1 t2", "max_tokens": 40, "temperature": 0}
        before = http.post("/v1/completions", json=body).json()["choices"]
        shutil.rmtree(root)
        (root / "tokenizer").mkdir(parents=True)
        (root / "tokenizer/tokenizer.json").write_text("none")
        assert http.post("/v1/completions", json=body).json()["choices"] == before
        chat = {"messages": [{"role": "user", "content": "t1"}], "max_tokens": 4}
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
        refused = http.post("/v1/chat/completions", json={**chat, "response_format": schema})
        assert "no end token" in refused.json()["error"]["message"]  # of the one that is served
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/"):
            assert http.get(path).status_code == 200
        process.send_signal(signal.SIGINT)
        code, errors = end_of(process)
    assert code == 0
    assert "there is no --api-key" in errors
    assert "Traceback" not in errors


def test_what_cannot_be_served_is_refused(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = [
            ([str(bundle.root), "--port", port], "cannot listen"),
            ([str(bundle.root), "--host", "nowhere.invalid"], "cannot listen"),
            ([str(bundle.root), "--port", "0", "--slots", "9"], "so many slots"),
            ([str(bundle.root), "--port", "70000"], "--port"),
            ([str(bundle.root), "--slots", "0"], "--slots is too small"),
            ([str(bundle.root), "--max-waiting", "-1"], "--max-waiting is too small"),
            ([str(bundle.root), "--max-waiting", "99999999"], "--max-waiting is too large"),
            ([str(bundle.root), "--model-name", "ein Modell"], "such a name"),
            ([str(bundle.root), "--kv-cache-bytes", "0"], "--kv-cache-bytes is too small"),
            ([str(bundle.root), "--kv-cache-bytes", "2GiB"], "--kv-cache-bytes"),
            ([str(bundle.root), "--kv-cache-bytes", str(2**30), "--port", "0"], "--slots and --max-seq-len"),
            ([str(bundle.root), "--drain-delay", "-1"], "--drain-delay is too small"),
            ([str(bundle.root), "--drain-delay", "nan"], "--drain-delay is not a number"),
            ([str(bundle.root), "--grace", "nan"], "--grace is not a number"),
            ([str(bundle.root), "--grace", "1e9"], "--grace is too large"),
            ([str(bundle.root), "--port", "0", "--policy", "fill"], "fill"),
            ([str(tmp_path)], "bundle"),
        ]
        for arguments, said in refused:
            assert main(["serve", *arguments]) == 2
            errors = capsys.readouterr().err
            assert said in errors
            assert "Hint: " in errors
    for missing, said in (["no_such"], "no_such is missing."), (["no_such", "nor_this"], "no_such, nor_this are miss"):
        monkeypatch.setattr(sys.modules["lora_drop_tools.serve"], "PACKAGES", (*missing, "json"))
        assert main(["serve", str(bundle.root)]) == 2
        errors = capsys.readouterr().err
        assert f"Note: {said}" in errors
        assert "pip install 'lora-drop-export[serve]'" in errors

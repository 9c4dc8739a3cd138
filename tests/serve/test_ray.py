"""The server behind Ray Serve: two real nodes on this machine, and what happens when parts of them are killed.

The tests stand in an order: those further down run on what those above have left of the cluster.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import io
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from lora_drop_runtime import Batch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.text import TextCodec
from lora_drop_serve.app import create_app
from lora_drop_serve.driver import Driver
from lora_drop_serve.errors import ApiError

from tests.serve.test_client import alone, words
from tests.support.ray_cluster import BROKEN, ENVIRONMENT, RayCluster, ray_cluster
from tests.support.serving import await_that, word_bundle

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),  # when it is imported
]
KEY = {"Authorization": "Bearer sesame"}
STREAMS, CHOICES, TOKENS = 8, 4, 240


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return word_bundle(tmp_path_factory.mktemp("ray") / "b", max_seq_len=256)


@pytest.fixture(scope="module")
def cluster(bundle: Bundle) -> Iterator[RayCluster]:
    replicas = {"min_replicas": 2, "max_replicas": 2, "grace": 600}  # on a busy machine 30 s are not enough
    with ray_cluster(bundle=bundle.root, slots=4, threads=2, policy="backfill", api_key="sesame", **replicas) as made:
        yield made


@pytest.fixture(scope="module")
def http(cluster: RayCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.address, headers=KEY, timeout=None) as client:
        yield client


def counts(http: httpx.Client) -> dict[str, float]:
    """`/metrics` of the replica that answers."""
    lines = http.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def begun(http: httpx.Client) -> float:
    """How many chats a replica has begun to answer: the most of those that answer here, which is the one that was not
    killed. All of a load may have gone to the other."""
    name = 'lora_drop_requests_total{path="/v1/chat/completions",status="200"}'
    return max(counts(http).get(name, 0) for _ in range(20))


def check_twenty(http: httpx.Client, bundle: Bundle) -> None:
    """The next 20 of 20 requests succeed, nobody trying twice."""
    for number in range(20):
        answer = http.post("/v1/completions", json={"prompt": [number], "max_tokens": 6, "temperature": 0})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == words(alone(bundle, [number], 6))


def told_under_load(cluster: RayCluster, command: str) -> list[list[str] | None]:
    """Texts of streams that run when a command is done, None for those that were cut."""
    are_open = threading.Semaphore(0)

    def told(number: int) -> list[str] | None:
        texts = [""] * CHOICES
        body = {"messages": [{"role": "user", "content": f"t{number}"}], "temperature": 0, "stream": True}
        with (
            httpx.Client(base_url=cluster.address, headers=KEY, timeout=None, verify=False) as http,
            http.stream("POST", "/v1/chat/completions", json={**body, "n": CHOICES, "max_tokens": TOKENS}) as answer,
        ):
            are_open.release()
            try:
                for line in answer.iter_lines():
                    for index, text in re.findall(r'"index":(\d),"delta":\{[^}]*"content":"(.*?)"', line):
                        texts[int(index)] += text
                    if line == "data: [DONE]":
                        return texts
            except httpx.RemoteProtocolError:
                pass
        return None

    with ThreadPoolExecutor(STREAMS) as pool:
        telling = [pool.submit(told, number) for number in range(STREAMS)]
        for _ in range(STREAMS):
            are_open.acquire()
        cluster.do(command)
        return [one.result() for one in telling]


def check_told(found: list[list[str] | None], bundle: Bundle) -> int:
    """What was told to the end is what a session alone writes; returns how many streams that are."""
    for number, texts in enumerate(found):
        assert texts is None or texts == [words(alone(bundle, [number], TOKENS))] * CHOICES
    return sum(texts is not None for texts in found)


# ── without a cluster ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "'bundle' cannot be used.\nNote: It is missing"),
        ({"slot": "8"}, "no argument 'slot'.\nNote: Known are bundle, slots"),
        ({"slots": "many"}, "'slots' cannot be used.\nNote: It is 'many'"),
        ({"slots": "0"}, "'slots' cannot be used.\nNote: It is '0'"),
        ({"max_replicas": 0}, "no replica that could answer"),
        ({"slots": "999"}, "does not allow so many slots"),
        ({"k": "-1"}, "'k' cannot be used"),
        ({"policy": "fill"}, "cannot be decoded under policy fill"),
        ({"api_key": 123}, "'api_key' cannot be used.\nNote: It is wrong"),
        ({"model_name": "a b"}, "model_name is 'a b'"),
        ({"api_key": " x"}, "api_key begins or ends with white space"),
        ({"bundle": "/nowhere"}, "no bundle here.\nNote: /nowhere"),
        ({"provider": "cuda"}, "Hint: "),
        ({"max_seq_len": 257}, "max_seq_len is 257; possible is 2 to 256"),
        ({"max_prompt_len": "256"}, "max_prompt_len is 256; possible is 1 to 255"),
        ({"k": "auto"}, "k is 'auto', the policy 'skip'"),
        ({"schedule": "some"}, "Unknown schedule"),
        ({"schedule": "margin"}, "not calibrated for the margin schedule"),
        ({"draft": "ngram"}, "The policy has no drafts"),
        ({"policy": "lossless", "draft": "some"}, "Unknown draft"),
        ({"target": "tensorrt"}, "Hint: "),
        ({"gpus": "0.00001"}, "gpus is 1e-05"),
        ({"gpus": 1.5}, "gpus is 1.5"),
        ({"kv_cache_bytes": "0"}, "'kv_cache_bytes' cannot be used"),
        ({"kv_cache_bytes": 2**20}, "applies only where caches are paged"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_a_replica_starts(bundle: Bundle, given: dict[str, Any], said: str) -> None:
    """As an error that `serve run` prints without a traceback."""
    import click
    from lora_drop_serve.ray_app import build

    with pytest.raises(click.ClickException) as caught:
        build({"bundle": str(bundle.root), **given} if given else given)
    assert said in caught.value.format_message()
    assert caught.value.exit_code == 2


def test_what_a_replica_opens(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_drop_serve import ray_app

    opened: dict[str, Any] = {}
    batch = Batch.open(bundle.root, slots=1)

    def note(root: Path, **given: Any) -> Batch:
        opened.update(given, root=root)
        return batch

    monkeypatch.setattr(ray_app.Batch, "open", note)
    wanted = {"kv_cache_bytes": 2**20, "keep_prefixes": False, "max_seq_len": 100, "max_prompt_len": 50, "k": 2}
    arguments = ray_app.Arguments(bundle=bundle.root, slots=4, **wanted)
    with batch:
        ray_app._application(arguments, 3, None)()
    assert wanted.items() <= opened.items()
    assert (opened["root"], opened["slots"]) == (bundle.root, 3)


def test_health_fails_when_the_engine_is_stuck(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_drop_serve.ray_app import Replica

    replica: Any = Replica()
    with Batch.open(bundle.root, slots=1) as batch:
        driver = Driver(batch, 1)
        replica.app = SimpleNamespace(state=SimpleNamespace(driver=driver))
        asyncio.run(replica.check_health())
        driver._tick_began = 0.0
        with pytest.raises(ApiError, match="does not come to its end"):
            asyncio.run(replica.check_health())


def test_the_key_is_asked_for_below_a_prefix(bundle: Bundle) -> None:
    """Which Ray has for each of its applications, and leaves in the path."""
    with Batch.open(bundle.root, slots=1) as batch:
        app = create_app(Driver(batch, 1), TextCodec.open(bundle.root / "tokenizer"), api_key="sesame")

        async def statuses() -> list[int]:
            transport = httpx.ASGITransport(app, root_path="/llm")
            async with httpx.AsyncClient(transport=transport, base_url="http://x/llm") as http:
                paths = ("/v1/models", "/metrics", "/health")
                return [(await http.get(path)).status_code for path in paths] + [
                    (await http.get("/v1/models", headers=KEY)).status_code
                ]

        assert asyncio.run(statuses()) == [401, 401, 200, 200]


def test_where_no_head_of_a_cluster_listens_is_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: Ray itself tries for minutes. The dashboard's port is one of HTTP, that of Ray's client one of gRPC."""
    import grpc
    from lora_drop_tools import EvalSettings, eval
    from lora_drop_tools.eval import spread

    (tmp_path / "text").write_text(words([7 * n % 131 for n in range(400)]))
    silent = socket.create_server(("127.0.0.1", 0))
    http = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    other = grpc.server(ThreadPoolExecutor(1))
    ports = {"silent": silent.getsockname()[1], "http": http.server_port, "other": other.add_insecure_port("[::1]:0")}
    other.start()
    try:
        for address, said in {
            "nowhere": "nowhere",
            "127.0.0.1:1": "refused",
            "127.0.0.1:port": "port",
            "[::1]:1": "refused",
            f"127.0.0.1:{ports['silent']}": "",
            f"127.0.0.1:{ports['http']}": "HTTP",
            f"[::1]:{ports['other']}": "no head of a Ray cluster",
        }.items():
            monkeypatch.setattr(spread, "CONNECT_SECONDS", 600 if said else 0.2)  # all but the silent one answer
            with pytest.raises(InputError, match="cannot be reached") as refused:
                eval(bundle.root, EvalSettings(text=tmp_path / "text", window=32, prompt=8, ray=address))
            assert f"Note: --ray is {address}: " in str(refused.value)
            assert said in refused.value.note
    finally:
        silent.close()
        http.shutdown()
        http.server_close()
        other.stop(None).wait()


def test_a_cluster_that_wants_a_token_is_refused_without_one(bundle: Bundle, tmp_path: Path) -> None:
    """By Ray, in a process of its own: it reads its variables once."""
    import grpc

    class Head(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            )

    (tmp_path / "text").write_text(words([7 * n % 131 for n in range(400)]))
    head = grpc.server(ThreadPoolExecutor(1), handlers=[Head()])
    address = f"127.0.0.1:{head.add_insecure_port('127.0.0.1:0')}"
    head.start()
    command = [sys.executable, "-m", "lora_drop_tools", "eval", str(bundle.root), "--text", str(tmp_path / "text")]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")}
    try:
        done = subprocess.run(
            [*command, "--window", "32", "--prompt", "8", "--ray", address],
            env={**os.environ, **ENVIRONMENT, **token},
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        head.stop(None).wait()
    assert done.returncode == 2
    assert "error: The Ray cluster cannot be reached.\n" in done.stderr
    assert "RAY_AUTH_TOKEN_PATH is set but file cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr


# ── with two nodes ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_real_client(cluster: RayCluster, http: httpx.Client, bundle: Bundle) -> None:
    assert [len(found) for found in cluster.do("replicas")] == [1, 1]
    assert httpx.get(f"{cluster.address}/v1/models").status_code == 401
    named = http.get("/v1/models", headers={"X-Request-ID": "a-1"})
    assert named.headers.get_list("x-request-id") == ["a-1"]  # once: Ray's proxies tell it
    with openai.OpenAI(base_url=f"{cluster.address}/v1", api_key="sesame", max_retries=0) as client:
        (model,) = client.models.list().data
        wanted = words(alone(bundle, [7, 8], 40))
        options: dict[str, Any] = {"model": model.id, "prompt": [7, 8], "max_tokens": 40, "temperature": 0}
        assert client.completions.create(**options).choices[0].text == wanted
        chunks = list(client.completions.create(**options, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
        assert len(chunks) == 40  # one by one, not in one piece
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{**options, "max_tokens": 999})
        assert refused.value.param == "max_tokens"


def test_an_evaluation_over_the_cluster_is_that_of_one_process(
    cluster: RayCluster, bundle: Bundle, tmp_path: Path
) -> None:
    """Item by item, digit by digit: windows of a text, log-likelihoods of continuations, and texts."""
    pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")
    from lora_drop_tools import EvalSettings, eval

    from tests.tools.eval.tasks.support import define

    (tmp_path / "text").write_text(words([7 * n % 131 for n in range(400)]))
    define(
        tmp_path,
        "choices",
        "piqa/piqa.yaml",
        [{"goal": f"t{n}", "sol1": "t1", "sol2": "t2", "label": 1} for n in range(9)],
    )
    rows = [{"question": f"t{n}", "answer": f"#### {n}"} for n in range(9)]
    define(tmp_path, "sums", "gsm8k/gsm8k.yaml", rows, rows)
    settings = EvalSettings(
        k=(3,),
        policies=("backfill",),
        text=tmp_path / "text",
        window=32,
        prompt=8,
        windows=12,
        num_fewshot=0,
        tasks=("choices", "sums"),
        include_path=(tmp_path,),
        threads=1,
        out_dir=tmp_path / "alone",
    )
    eval(bundle.root, settings, out=io.StringIO())
    over = dataclasses.replace(settings, ray=cluster.ray_address, out_dir=tmp_path / "over")
    program = f"from lora_drop_tools import *\nfrom pathlib import *\neval({str(bundle.root)!r}, {over!r})"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **ENVIRONMENT})
    (alone, spread) = (sorted(file.read_text().splitlines()) for file in sorted(tmp_path.glob("*/*.jsonl")))
    assert len(alone) == 1 + 2 * (12 + 2 * 9 + 9)
    assert spread == alone


def test_who_hangs_up_frees_its_row(http: httpx.Client) -> None:
    """Through Ray's proxy: the rows of 8 streams that nobody reads end long before their last token."""
    for _ in range(8):
        body = {"prompt": [1], "n": 16, "max_tokens": TOKENS, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    for _ in range(20):  # of both replicas
        await_that(lambda: counts(http)["lora_drop_rows_running"] == 0)
    for _ in range(20):
        found = counts(http)
        assert sum(found[f'lora_drop_tokens_total{{step="{step}"}}'] for step in ("refresh", "lora")) < 4 * 16 * TOKENS


def test_a_killed_replica_cuts_its_own_streams_alone(cluster: RayCluster, http: httpx.Client, bundle: Bundle) -> None:
    for _ in range(12):  # the proxy may have sent all of a load to one of them
        await_that(lambda: [len(found) for found in cluster.do("replicas")] == [1, 1])
        await_that(lambda: cluster.do("running replicas") == 2)
        before = begun(http)
        finished = check_told(told_under_load(cluster, "kill a replica"), bundle)
        check_twenty(http, bundle)
        if 0 < finished < STREAMS:
            break
    assert 0 < finished == begun(http) - before < STREAMS


def test_it_is_replaced_and_a_killed_node_cuts_its_own_streams_alone(
    cluster: RayCluster, http: httpx.Client, bundle: Bundle
) -> None:
    await_that(lambda: [len(found) for found in cluster.do("replicas")] == [1, 1])
    check_twenty(http, bundle)
    finished = check_told(told_under_load(cluster, "kill a node"), bundle)
    check_twenty(http, bundle)
    assert finished == begun(http)


def test_an_engine_that_fails_is_replaced(cluster: RayCluster, http: httpx.Client, bundle: Bundle) -> None:
    await_that(lambda: cluster.do("replicas of the head"))  # the one before may just have been killed
    (before,) = cluster.do("replicas of the head")
    failed = http.post("/v1/completions", json={"prompt": [BROKEN], "max_tokens": 6})
    assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_failed")
    await_that(lambda: before not in cluster.do("replicas of the head"))
    await_that(lambda: http.get("/ready").status_code == 200)
    check_twenty(http, bundle)


def test_what_runs_ends_when_the_application_does(cluster: RayCluster, http: httpx.Client, bundle: Bundle) -> None:
    assert check_told(told_under_load(cluster, "end the application"), bundle) == STREAMS
    await_that(lambda: http.get("/ready").status_code == 404)

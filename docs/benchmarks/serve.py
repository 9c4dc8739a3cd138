"""What HTTP costs: the tokens a second of `lora-drop serve` beside those of a `Batch` that is driven bare.

    python docs/benchmarks/serve.py BUNDLE --users 8 --repeats 5

Both do the same requests, `--users` at a time, and take turns; the server is a process of its own. Medians over the
repeats, and the time to the first token and between tokens as clients see them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime import Batch

Bodies = list[dict[str, Any]]


def bare(batch: Batch, bodies: Bodies, users: int) -> tuple[int, float]:
    """Tokens and seconds of a batch in this process."""
    waiting, tokens, begin = list(reversed(bodies)), 0, time.perf_counter()
    while waiting or batch.rows:
        while waiting and batch.rows < users:
            body = waiting.pop()
            batch.add(body["prompt"], body["max_tokens"], k=body["k"])
        tokens += sum(event.token is not None for event in batch.tick())
    return tokens, time.perf_counter() - begin


def served(port: int, bodies: Bodies, users: int, streams: bool) -> tuple[int, float, list[float], list[float]]:
    """Tokens and seconds of the server; where it streams, seconds to first tokens and between tokens."""
    waiting, lock = list(reversed(bodies)), threading.Lock()
    tokens: list[int] = []
    first: list[float] = []
    between: list[float] = []

    def user() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                if not waiting:
                    return
                body = waiting.pop()
            asked = {**body, "stream": streams} | ({"stream_options": {"include_usage": True}} if streams else {})
            latest = time.perf_counter()
            connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if not streams:
                tokens.append(json.load(answer)["usage"]["completion_tokens"])
                continue
            times, count = first, 0
            for line in answer:
                if b'"lora_drop":{"step"' in line:
                    now = time.perf_counter()
                    times.append(now - latest)
                    latest, times, count = now, between, count + 1
            tokens.append(count)

    begin = time.perf_counter()
    threads = [threading.Thread(target=user) for _ in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(tokens), time.perf_counter() - begin, first, between


def started(bundle: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A server of the bundle in a process of its own, and its port; ends this one where it does not start."""
    command = [sys.executable, "-m", "lora_drop_tools", "serve", str(bundle), "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    found = re.search(r"http://[\d.]+:(\d+) ", server.stdout.readline())
    if found is None:
        sys.exit(server.wait())  # it has said why
    return server, int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--policy", default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    bodies: Bodies = [
        {
            "prompt": rng.integers(100, 10000, int(rng.integers(32, 128))).tolist(),
            "max_tokens": options.new_tokens,
            "temperature": 0,
            "k": options.k,
        }
        for _ in range(options.requests)
    ]
    shared = [
        "--threads",
        str(options.threads),
        "--no-prefixes",
        *(["--policy", options.policy] if options.policy else []),
    ]
    server, port = started(options.bundle, "--slots", str(options.users), *shared)
    ways: dict[str, list[float]] = {"bare": [], "served": [], "streamed": []}
    first: list[float] = []
    between: list[float] = []
    with Batch.open(options.bundle, slots=options.users, policy=options.policy, threads=options.threads) as batch:
        for repeat in range(options.repeats + 1):
            for way, speeds in ways.items():
                if way == "bare":
                    tokens, seconds = bare(batch, bodies, options.users)
                else:
                    tokens, seconds, to_first, gaps = served(port, bodies, options.users, way == "streamed")
                    first += to_first if repeat else []
                    between += gaps if repeat else []
                print(f"{way}: {tokens} tokens in {seconds:.1f} s", file=sys.stderr, flush=True)
                if repeat:  # the first warms up
                    speeds.append(tokens / seconds)
    server.terminate()
    server.wait()
    print("| | tokens/s, median | of bare | all |\n|---|---|---|---|")
    base = statistics.median(ways["bare"])
    for way, speeds in ways.items():
        median = statistics.median(speeds)
        print(f"| {way} | {median:.1f} | {median / base:.3f} | {', '.join(f'{speed:.1f}' for speed in speeds)} |")
    for what, times in (("to the first token", first), ("between tokens", between)):
        ms = np.percentile(times, [50, 95]) * 1000
        print(f"{what}: p50 {ms[0]:.0f} ms, p95 {ms[1]:.0f} ms")


if __name__ == "__main__":
    main()

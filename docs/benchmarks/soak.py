"""Whether a server that runs for long stays as it is: its memory, and its slots.

    python docs/benchmarks/soak.py BUNDLE --minutes 60 --users 4 --json soak.json

Users ask without a pause: whole answers, streams, streams that they leave in the midst, JSON by a schema, logprobs of
prompts, and requests that are refused. Once a minute the server's resident memory (VmRSS) is read. At the end no row
may run or wait, and the next 20 requests have to succeed; the exit code is 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from serve import started  # the script beside this one

LEAST_MINUTES = 0.1
WARM_UP = 0.2  # of the time: pages of caches are taken when rows first reach them
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
JSON = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}}
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "left": {"stream": True, "max_tokens": 200},
    "json": {"response_format": JSON},
    "scored": {"echo": True, "logprobs": 2, "k": 0, "max_tokens": 0},
    "refused": {"top_p": 7},
}


def ask(port: int, kind: str, rng: random.Random) -> int:
    """One request; returns its status."""
    words = " ".join(rng.choice(("river", "stone", "three", "of", "and", "green", "walks")) for _ in range(20))
    body = {"prompt": words, "max_tokens": rng.randint(1, 24), "temperature": 1, "k": rng.choice((0, 1, 3))}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body |= KINDS[kind]
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if kind == "left":
        answer.read(rng.randint(1, 2000))
    else:
        answer.read()
    connection.close()
    return answer.status


def resident(pid: int) -> float:
    """MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def rows(port: int) -> float:
    """Rows that run or wait."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    told = connection.getresponse().read().decode()
    return sum(float(count) for count in re.findall(r"^lora_drop_rows_(?:running|waiting) (\S+)", told, re.M))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.minutes >= LEAST_MINUTES and options.users > 0):
        parser.error(f"--minutes is at least {LEAST_MINUTES}, --users at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"there is no directory for --json {options.json}")
    server, port = started(options.bundle, "--threads", str(options.threads))
    end = time.monotonic() + 60 * options.minutes
    statuses: collections.Counter[str] = collections.Counter()

    def user(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            kind = rng.choice(list(KINDS))
            statuses[f"{kind} {ask(port, kind, rng)}"] += 1

    users = [threading.Thread(target=user, args=(seed,)) for seed in range(options.users)]
    for one in users:
        one.start()
    memory: list[tuple[float, float]] = []  # minutes, MiB
    begin = time.monotonic()
    while time.monotonic() < end:
        time.sleep(min(60.0, max(0.1, end - time.monotonic())))
        memory.append(((time.monotonic() - begin) / 60, resident(server.pid)))
        print(f"{memory[-1][0]:.0f} min: {memory[-1][1]:.1f} MiB, {sum(statuses.values())} requests", flush=True)
    for one in users:
        one.join()
    for _ in range(600):
        if rows(port) == 0:
            break
        time.sleep(0.1)
    lost = rows(port)
    after = [ask(port, "whole", random.Random(n)) for n in range(20)]
    server.terminate()
    server.wait()
    warm = [mib for minute, mib in memory if minute >= WARM_UP * options.minutes]
    wanted = {f"{kind} {400 if kind == 'refused' else 200}" for kind in KINDS}
    report = {
        "minutes": options.minutes,
        "users": options.users,
        "requests": dict(sorted(statuses.items())),
        "memory_mib": {"least": min(warm), "most": max(warm), "first": warm[0], "last": warm[-1]},
        "memory": memory,
        "rows_left": lost,
        "next_20": after.count(200),
    }
    print(json.dumps({name: value for name, value in report.items() if name != "memory"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    flat = max(warm) / min(warm) <= 1.04  # ± 2 %
    return 0 if flat and not lost and after.count(200) == 20 and set(statuses) == wanted else 1


if __name__ == "__main__":
    sys.exit(main())

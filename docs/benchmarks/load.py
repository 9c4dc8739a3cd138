"""Servers of OpenAI's API under load: `guidellm` asks each in turn, at several numbers of users.

    python docs/benchmarks/load.py --guidellm gl/bin/guidellm --tokenizer CHECKPOINT --users 1,8,32 --repeats 3 \\
        'k = 0=http://127.0.0.1:8000,k=0' 'skip=http://127.0.0.1:8000,k=3,policy=skip' --json FILE

An arm is a name, an address, and fields of its requests. Arms take turns within each repeat. Prompts are made by
guidellm, each another one; all requests are greedy and have the same length. `--command NAME=COMMAND` adds an arm that
is no server: its output's last line is the tokens a second of `--batch` rows. Printed are medians over the repeats; the
ratios are those of arms within one repeat. Tokens a second are those of a fixed number of requests, from the begin of
the first to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Measured = dict[str, float]


class Arm(NamedTuple):
    """A server, and the fields of the requests that it gets, as guidellm's options have them."""

    name: str
    target: str
    fields: tuple[str, ...]

    @staticmethod
    def of(text: str) -> Arm:
        name, _, rest = text.rpartition("=http")
        target, *fields = f"http{rest}".split(",")
        if not name or not rest or not all("=" in field for field in fields):
            raise argparse.ArgumentTypeError(f"{text!r} is no NAME=URL, with FIELD=VALUE of its requests behind commas")
        return Arm(name, target, tuple(fields))


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: there is at least one user")
    return found


def asked(arm: Arm, users: int, options: argparse.Namespace) -> Measured:
    """Tokens a second, and ms to the first token and between tokens of a request: p50 and p95 over requests."""
    extras = [f"extras.body.{field}" for field in ("temperature=0", *arm.fields)]
    backend = ",".join([f"kind=openai_http,target={arm.target},request_format=/v1/completions", *extras])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [options.guidellm, "run", "--disable-console", "--backend", backend]
        command += ["--profile", f"kind=concurrent,streams={users}"]
        command += ["--constraint", f"kind=max_requests,count={max(options.rounds * users, options.least)}"]
        command += ["--tokenizer", f"kind=hf_auto,model={options.tokenizer}"]
        tokens = f"prompt_tokens={options.prompt_tokens},output_tokens={options.new_tokens}"
        command += ["--data", f"kind=synthetic_text,{tokens}", "--output", f"kind=json,path={report}"]
        alone = {**os.environ, "GUIDELLM__MAX_WORKER_PROCESSES": "1"}  # ten would take the cores that the server needs
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        if done.returncode or not report.exists():
            sys.exit(f"{arm.name}: guidellm failed\n{(done.stderr or done.stdout).strip()[-2000:]}")
        (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    metrics = benchmark["metrics"]
    if metrics["request_totals"]["errored"]:
        sys.exit(f"{arm.name}: {metrics['request_totals']['errored']} requests failed")
    requests = metrics["request_totals"]["successful"]
    found = {"tokens_per_second": requests * options.new_tokens / benchmark["duration"], "requests": requests}
    for name, key in (("first_ms", "time_to_first_token_ms"), ("between_ms", "inter_token_latency_ms")):
        percentiles = metrics[key]["successful"]["percentiles"]
        found |= {f"{name}_{p}": percentiles[p] for p in ("p50", "p95")}
    return found


def ran(command: str) -> Measured:
    done = subprocess.run(shlex.split(command), check=True, stdout=subprocess.PIPE, text=True)
    return {"tokens_per_second": float(done.stdout.splitlines()[-1])}


def told(arms: Sequence[str], users: int, runs: Sequence[dict[str, Measured]]) -> None:
    """A table of one number of users."""
    base = next(iter(arms))
    print(
        f"\n{users} users\n\n| arm | tokens/s | over {base} | first token p50 ms | p95 ms | between p50 ms | p95 ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for arm in arms:
        own = [(run[arm], run[base]) for run in runs if arm in run]
        if not own:
            continue
        speed = statistics.median(one["tokens_per_second"] for one, _ in own)
        ratio = statistics.median(one["tokens_per_second"] / first["tokens_per_second"] for one, first in own)
        keys = ("first_ms_p50", "first_ms_p95", "between_ms_p50", "between_ms_p95")
        times = [f"{statistics.median(one[key] for one, _ in own):.1f}" if key in own[0][0] else "" for key in keys]
        print(f"| {arm} | {speed:.1f} | {ratio:.3f}× | {' | '.join(times)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="+", metavar="NAME=URL[,FIELD=VALUE…]", type=Arm.of)
    parser.add_argument("--command", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--batch", type=int, default=8, help="number of users beside whom --command is run")
    parser.add_argument("--guidellm", default="guidellm")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--users", type=numbers, default=[1, 2, 4, 8, 16, 32], help="such as 1,8,32")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each user")
    parser.add_argument("--least", type=int, default=12, help="requests in all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if shutil.which(options.guidellm) is None:
        parser.error(f"{options.guidellm} is no command: pip install guidellm, in an environment of its own")
    if not all("=" in text for text in options.command):
        parser.error("--command is NAME=COMMAND")
    commands = dict(text.split("=", 1) for text in options.command)
    runs: dict[int, list[dict[str, Measured]]] = {}
    for users in options.users:
        runs[users] = []
        for _ in range(options.repeats):
            run = {arm.name: asked(arm, users, options) for arm in options.arms}
            if users == options.batch:
                run |= {name: ran(command) for name, command in commands.items()}
            runs[users].append(run)
            print(f"{users} users: {json.dumps(run)}", file=sys.stderr, flush=True)
        told([*(arm.name for arm in options.arms), *commands], users, runs[users])
        if options.json:
            options.json.write_text(
                json.dumps({"prompt_tokens": options.prompt_tokens, "runs": runs}, indent=1) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main()

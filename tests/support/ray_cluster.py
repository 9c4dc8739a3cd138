"""Two nodes of Ray on this machine, which serve a bundle: a program, so that nothing of Ray outlives a test.

    python -m tests.support.ray_cluster '{"bundle": …, arguments of ray_app.build}'

Its standard output is a line of JSON for each thing that was done: first the address. Its standard input says what to
do, a line each, and all nodes end when it ends. `RayCluster` is this seen from a test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before Ray is imported. The directory has a short name: Ray puts sockets there, whose paths have at most 107 bytes
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "600",  # else a proxy that starts slowly is killed, and so for ever
    "OMP_NUM_THREADS": "1",
}
BROKEN = 99  # a token


class RayCluster:
    """A running program, and the address of what it serves."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address, self.ray_address = self._said()

    def _said(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)["said"]
        raise AssertionError("the cluster has ended; its log stands above")

    def do(self, command: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._said()


@contextmanager
def ray_cluster(**arguments: Any) -> Iterator[RayCluster]:
    """Two nodes, the head and one more, with a replica on each."""
    root = tempfile.mkdtemp(prefix="ld-", dir="/tmp")
    command = [sys.executable, "-m", "tests.support.ray_cluster", json.dumps(arguments, default=str)]
    environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": root}
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            yield RayCluster(process)
            # Which closes its input, and waits for its end
    finally:
        shutil.rmtree(root, ignore_errors=True)


# ── the program ────────────────────────────────────────────────────────────────────────────────────────────────


def _running(status: Any) -> int:
    """Replicas that Ray sends requests to; their processes begin seconds before."""
    deployments = [one for application in status.applications.values() for one in application.deployments.values()]
    return sum(int(one.replica_states.get("RUNNING", 0)) for one in deployments)


def _say(what: Any) -> None:
    print(json.dumps({"said": what}), flush=True)


def _children(parent: int) -> list[int]:
    """Process ids of children and of theirs."""
    found = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8").split()]
    return [*found, *(below for pid in found for below in _children(pid))]


def _processes(node: Any) -> list[int]:
    roots = [info.process.pid for infos in node.all_processes.values() for info in infos]
    return [*roots, *(pid for root in roots for pid in _children(root))]


def _replicas(node: Any) -> list[int]:
    """Process ids of a node's replicas."""
    return [pid for pid in _processes(node) if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _kill(pids: list[int]) -> int:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return len(pids)


def _breakable(make: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    """Applications whose engines fail for ever at a prompt of BROKEN alone."""

    def breakable(*arguments: Any) -> Callable[[], Any]:
        application = make(*arguments)

        def patched() -> Any:
            from lora_drop_runtime import Batch, BundleError

            add, tick = Batch.add, Batch.tick

            def marking(self: Any, prompt: Any, *rest: Any, **options: Any) -> int:
                self.is_broken = prompt[0] == BROKEN
                return add(self, prompt, *rest, **options)

            def failing(self: Any) -> Any:
                if self.is_broken:
                    raise BundleError("The device is lost.")
                return tick(self)

            Batch.add, Batch.tick = marking, failing
            return application()

        return patched

    return breakable


def main() -> None:
    import ray
    from lora_drop_serve import ray_app
    from ray import serve
    from ray.cluster_utils import Cluster

    ray_app._application = _breakable(ray_app._application)
    ray_app.HEALTH_SECONDS = 0.5  # so that what fails is replaced soon

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"num_cpus": 3, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    unused = {"no_monitor": True, "include_log_monitor": False}  # processes of the head, of a second each
    cluster = Cluster(initialize_head=True, head_node_args={**options, **unused})
    try:
        node = cluster.add_node(**options)
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_app.build(json.loads(sys.argv[1])), name="bundle")
        _say([f"http://127.0.0.1:{port}", cluster.address])
        commands = {
            "replicas": lambda: [_replicas(one) for one in (cluster.head_node, node)],
            "running replicas": lambda: _running(serve.status()),
            "replicas of the head": lambda: _replicas(cluster.head_node),
            "kill a replica": lambda: _kill(_replicas(cluster.head_node)),
            "kill a node": lambda: _kill(_processes(node)),
            # Not until all of it is gone: Ray takes seconds to forget a replica that no node had room for
            "end the application": lambda: serve.delete("bundle", _blocking=False),
        }
        for line in sys.stdin:
            _say(commands[line.strip()]())
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()

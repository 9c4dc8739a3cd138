"""The example for Kubernetes: its YAML, and that what it says of the server is so."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from lora_drop_runtime.command_line import add_options, settings_of
from lora_drop_runtime.errors import InputError
from lora_drop_serve.key import KEY_VARIABLE, usable_key
from lora_drop_serve.server import _FLUSH_SECONDS
from lora_drop_tools.serve import ServeSettings

from tests.support.serving import Served

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples/kubernetes/lora-drop.yaml"


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """By their kind."""
    return {one["kind"]: one for one in yaml.safe_load_all(FILE.read_text())}


@pytest.fixture(scope="module")
def pod(objects: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = objects["Deployment"]["spec"]["template"]
    return found


@pytest.fixture(scope="module")
def server(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["spec"]["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def settings(server: dict[str, Any]) -> ServeSettings:
    """As the command reads the options: the image's, and those behind them."""
    docker = (ROOT / "examples/docker/Dockerfile").read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", docker, re.MULTILINE)[0])
    assert entry[1:3] == ["serve", "/bundle"]
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_options(parser, ServeSettings)
    given = parser.parse_args([*entry[3:], *server["args"]])
    found: ServeSettings = settings_of(ServeSettings, given)
    return found


def test_each_kind_is_there_once(objects: dict[str, Any]) -> None:
    documents = list(yaml.safe_load_all(FILE.read_text()))
    assert [(one["kind"], one["apiVersion"]) for one in documents] == [
        ("Secret", "v1"),
        ("Deployment", "apps/v1"),
        ("Service", "v1"),
    ]
    assert all(one["metadata"]["name"] == "lora-drop" for one in documents)


def test_labels_and_ports_meet(objects: dict[str, Any], pod: dict[str, Any], server: dict[str, Any]) -> None:
    labels = pod["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] in ports
    annotations = pod["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"  # without it the others are left unread
    assert annotations["prometheus.io/port"] == str(ports["http"])
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert [(one["name"] in volumes, one["mountPath"]) for one in server["volumeMounts"]] == [(True, "/bundle")]


def test_the_options_are_the_servers(settings: ServeSettings, server: dict[str, Any]) -> None:
    assert (settings.host, settings.port) == ("0.0.0.0", server["ports"][0]["containerPort"])
    assert settings.log_requests
    assert str(settings.threads) == server["resources"]["requests"]["cpu"]


def test_the_key_is_the_secrets_and_an_empty_one_starts_nothing(
    objects: dict[str, Any], server: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (variable,) = server["env"]
    where = variable["valueFrom"]["secretKeyRef"]
    assert (variable["name"], where["name"]) == (KEY_VARIABLE, objects["Secret"]["metadata"]["name"])
    key = objects["Secret"]["stringData"][where["key"]]
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(InputError, match="is empty"):
        usable_key(None, "--api-key")


def test_probes_ask_routes_that_there_are(served: Served, pod: dict[str, Any], server: dict[str, Any]) -> None:
    probes = {name: server[name]["httpGet"] for name in server if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/health",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}
    paths = [pod["metadata"]["annotations"]["prometheus.io/path"], *(probe["path"] for probe in probes.values())]
    assert [served.http.get(path).status_code for path in paths] == [200] * 4


def test_times_are_in_order(pod: dict[str, Any], server: dict[str, Any], settings: ServeSettings) -> None:
    """Others hear of the end before the delay is over, and nothing is killed before the grace is."""
    ready = server["readinessProbe"]
    assert (ready["periodSeconds"] + ready["timeoutSeconds"]) * ready["failureThreshold"] <= settings.drain_delay
    needed = settings.drain_delay + settings.grace + _FLUSH_SECONDS
    assert needed < pod["spec"]["terminationGracePeriodSeconds"]


def test_memory_is_what_the_rule_says(server: dict[str, Any]) -> None:
    """The section's own numbers, in MiB."""
    section = (ROOT / "docs/serving.md").read_text().split("## On Kubernetes\n", 1)[1].split("\n## ", 1)[0]
    assert len(section.splitlines()) <= 40
    said = re.search(r"2 × (\d+) \+ (\d+) \+ (\d+) = ([\d ]+) MiB", section)
    assert said is not None
    weights, caches, rest, total = (int(number.replace(" ", "")) for number in said.groups())
    assert 2 * weights + caches + rest == total
    resources = server["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert total <= int(resources["limits"]["memory"].removesuffix("Gi")) * 1024

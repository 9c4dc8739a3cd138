"""What the wheel asks of pip: which extra brings what, and that none brings two packages of ONNX Runtime. And what the
wheel and the source distribution hold.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from lora_drop_runtime.engines.ort.package import EXTRAS
from lora_drop_runtime.engines.ort.providers import RAGGED_ROWS_SINCE
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ENGINES = set(EXTRAS)


def built(kind: str, out: Path, root: Path = ROOT) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(built("wheel", tmp_path_factory.mktemp("wheel"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def requirements(wheel) -> list[Requirement]:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def of_extras(requirements: list[Requirement], *extras: str) -> dict[str, Requirement]:
    """What pip installs for extras, those that they name included."""
    found: dict[str, Requirement] = {}
    todo = ["", *extras]
    for extra in todo:
        for requirement in requirements:
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            if requirement.name == "lora-drop-export":
                todo += [name for name in sorted(requirement.extras) if name not in todo]
            else:
                found[requirement.name] = requirement
    return found


@pytest.mark.parametrize(
    ("extras", "engines"),
    [
        ((), set()),
        (("cpu",), {"onnxruntime"}),
        (("cuda",), {"onnxruntime-gpu"}),
        (("export",), set()),
        (("export", "cpu"), {"onnxruntime"}),
        (("export", "cuda"), {"onnxruntime-gpu"}),
        (("dev",), {"onnxruntime"}),
        (("bench", "eval", "serve", "tensorrt", "tensorrt-rtx"), set()),
    ],
)
def test_each_extra_brings_one_onnx_runtime_at_most(requirements, extras, engines):
    found = of_extras(requirements, *extras)
    assert found.keys() & ENGINES == engines
    assert {"numpy", "tokenizers", "jinja2"} <= found.keys()
    assert ("torch" in found) == ("export" in extras)


def test_versions_are_those_that_the_runtime_checks(requirements):
    found = of_extras(requirements, "cpu", "cuda")
    cpu, cuda = found["onnxruntime"], found["onnxruntime-gpu"]
    assert str(cpu.specifier) == f">={'.'.join(map(str, RAGGED_ROWS_SINCE))}"
    assert not cuda.specifier.contains("1.30.0")  # CUDA graphs and placements were tried with 1.31
    assert cuda.specifier.contains("1.31.0")
    assert cuda.extras == {"cuda", "cudnn"}


def test_the_tests_own_requirements_are_in_dev(requirements):
    assert {"pytest", "pytest-xdist", "hypothesis", "hatchling", "mypy", "ruff"} <= of_extras(
        requirements, "dev"
    ).keys()


def test_the_wheel_types_all_its_packages(wheel):
    packages = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert packages == {"lora_drop_export", "lora_drop_runtime", "lora_drop_serve", "lora_drop_tools"}
    assert {f"{package}/py.typed" for package in packages} <= set(wheel.namelist())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_the_source_distribution_holds_the_repository_and_nothing_else(tmp_path):
    """Neither bundles nor environments that lie in a checkout."""
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {name for name in listed if (ROOT / name).exists()}
    for name in (*names, "engines/weights/model.safetensors", "env/pyvenv.cfg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes() if name in names else b"")
    with tarfile.open(built("sdist", tmp_path / "dist", tmp_path / "tree")) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert held == names | {"PKG-INFO"}

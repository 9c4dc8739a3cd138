"""Which ONNX Runtime is installed, and what is said where it is none, an old one, or two in one folder.

Each in a fresh interpreter, with a folder of stand-ins in the place of site-packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lora_drop_runtime import InputError, NoDeviceError
from lora_drop_runtime.engines.ort import package
from lora_drop_runtime.engines.ort.providers import check_available, rtx_device

from lora_drop_export.check import verify
from lora_drop_export.console import Console

IMPORT = """
import sys
from lora_drop_runtime.engines.ort.package import import_onnxruntime
from lora_drop_runtime.errors import InputError
sys.path[:] = [sys.argv[1], *(path for path in sys.path if "-packages" not in path)]
try:
    print(import_onnxruntime().__version__)
except InputError as error:
    print(error)
"""
WORKS = "__version__ = '1.32.0'\nclass InferenceSession: pass\n"
BROKEN = "raise ImportError('libonnxruntime.so.1: cannot open shared object file')\n"


def said(site: Path, module: str | None, *packages: str) -> list[str]:
    """The lines of what import_onnxruntime gives or says; `module` is the content of onnxruntime/__init__.py."""
    site.mkdir()
    if module is not None:
        (site / "onnxruntime").mkdir()
        (site / "onnxruntime" / "__init__.py").write_text(module)
    for name in packages:
        info = site / f"{name.replace('-', '_')}-1.32.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.32.0\n")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT, site],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


REAL = """
import numpy, onnx, sys
from lora_drop_runtime.engines.ort.package import import_onnxruntime
x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(session.run(None, {"x": numpy.ones(1, numpy.float32)})[0][0])
"""


def test_it_tells_nobody_that_it_is_used(tmp_path):
    """ONNX Runtime 1.29 and newer reports to its maker, and keeps an identifier in the user's home. The environment is
    bare: it is silent by itself where it sees a test or CI."""
    done = subprocess.run(
        [sys.executable, "-c", REAL],
        env={"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.stdout == "-1.0\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_user_may_let_it_tell(tmp_path, monkeypatch):
    reads = WORKS.replace("'1.32.0'", "'1.32.' + __import__('os').environ['ORT_DISABLE_TELEMETRY']")
    monkeypatch.delenv(package.TELEMETRY_OFF)
    assert said(tmp_path / "off", reads, "onnxruntime") == ["1.32.1"]
    monkeypatch.setenv(package.TELEMETRY_OFF, "0")
    assert said(tmp_path / "on", reads, "onnxruntime") == ["1.32.0"]


def test_one_that_works(tmp_path):
    for number, name in enumerate(package.EXTRAS):
        assert said(tmp_path / str(number), WORKS, name) == ["1.32.0"]


def test_none(tmp_path):
    fact, note, hint = said(tmp_path / "site", None)
    assert fact == "ONNX Runtime is not installed."
    assert "No module named 'onnxruntime'" in note
    assert "pip install 'lora-drop-export[cpu]'" in hint
    assert "pip install 'lora-drop-export[cuda]'" in hint


def test_a_folder_that_an_uninstalled_package_left(tmp_path):
    """Two were installed and one was removed, with the files that both had written."""
    fact, note, hint = said(tmp_path / "site", "", "onnxruntime-gpu")
    assert fact == "The installed ONNX Runtime does not work."
    assert "onnxruntime-gpu is installed" in note
    assert hint == "Hint: pip uninstall -y onnxruntime-gpu; then pip install 'lora-drop-export[cuda]'."


def test_two_that_broke_each_other(tmp_path):
    fact, note, hint = said(tmp_path / "site", BROKEN, "onnxruntime", "onnxruntime-gpu")
    assert fact == "The installed ONNX Runtime does not work."
    assert "libonnxruntime.so.1: cannot open" in note
    assert "onnxruntime and onnxruntime-gpu are both installed and write into one folder." in note
    assert "pip uninstall -y onnxruntime onnxruntime-gpu; then" in hint
    assert "'lora-drop-export[cpu]' or 'lora-drop-export[cuda]'" in hint


def test_one_that_is_too_old(tmp_path):
    fact, note, hint = said(tmp_path / "site", WORKS.replace("1.32", "1.24"), "onnxruntime-gpu")
    assert fact == "The installed ONNX Runtime is too old."
    assert "1.24.0; 1.25 or newer" in note
    assert hint == "Hint: pip install --upgrade onnxruntime-gpu"


@pytest.mark.parametrize(
    ("packages", "hint"),
    [
        ({"onnxruntime"}, "pip uninstall -y onnxruntime && pip install 'lora-drop-export[cuda]'"),
        ({"onnxruntime-gpu"}, ": pip install 'lora-drop-export[cuda]'"),
        ({"onnxruntime", "onnxruntime-gpu"}, "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'lora-drop-"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_provider_that_the_package_has_not(monkeypatch, packages, hint, dtype):
    """Where both are installed, the one that came last has the folder: CUDA is not there though its package is."""
    monkeypatch.setattr(package, "installed_packages", lambda: sorted(packages))
    with pytest.raises(NoDeviceError) as caught:
        check_available("cuda", SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"]), dtype)
    assert "'cuda' was asked for, the installed ONNX Runtime has cpu." in caught.value.note
    assert ("both installed" in caught.value.note) == (len(packages) == 2)
    assert hint in caught.value.hint
    assert ("--provider cpu" in caught.value.hint) == (dtype == "float16")


@pytest.mark.parametrize(("dtype", "offered"), [("float16", True), ("bfloat16", False)])
def test_the_cpu_is_offered_where_it_runs_the_graphs(monkeypatch, dtype, offered):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(NoDeviceError) as caught:
        rtx_device(SimpleNamespace(), dtype)
    assert ("--provider cpu" in caught.value.hint) == offered


def test_graphs_of_a_gpus_target_are_then_not_compared(monkeypatch, capsys):
    """An export for TensorRT alone needs no ONNX Runtime, and must not fail at its end for that."""

    def no_device(*_: object, provider: str | None, **__: object) -> None:
        assert provider is None
        raise NoDeviceError("x", note="There is no GPU.")

    def not_installed() -> None:
        raise InputError("ONNX Runtime is not installed.", note="No module named 'onnxruntime'.")

    monkeypatch.setattr(verify, "compare", no_device)
    monkeypatch.setattr(verify, "import_onnxruntime", not_installed)
    found = verify.verify_target(None, "tensorrt-rtx", provider=None, runs_on_cpu=True, console=Console())
    assert found == ({"status": "not run", "reason": "There is no GPU."}, None)
    assert "ONNX Runtime is not installed." in capsys.readouterr().err

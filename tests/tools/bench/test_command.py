"""`lora-drop bench` on tiny bundles."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import json
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_tools.bench.arms import SessionOptions
from lora_drop_tools.bench.bench import bench
from lora_drop_tools.bench.memory import measure_memory
from lora_drop_tools.bench.plots import _draw_kv_saving
from lora_drop_tools.bench.result import Request
from lora_drop_tools.bench.settings import BenchSettings
from lora_drop_tools.cli import main
from lora_drop_tools.shared import costs, machine
from lora_drop_tools.shared.bundles import weight_dtype

from tests.support.costs import request_ceiling
from tests.tools.bench.conftest import held

bench_module = importlib.import_module("lora_drop_tools.bench.bench")  # the name in the package is the function


def test_command_end_to_end(
    bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    written = tmp_path / "figures.json"
    options = ["--k", "1,3", "--contexts", "8,24", "--batches", "1,2", "--new-tokens", "12", "--repeats", "2"]
    arguments = ["bench", *map(str, bundles), *options, "--threads", "1", f"--json={written}"]
    monkeypatch.setattr(sys, "argv", ["/home/jo/bin/lora-drop", *arguments])
    code = main(arguments)
    text = written.read_text()
    for secret in ("/home/jo", str(tmp_path), str(bundles[0].parent), platform.release()):
        assert secret not in text
    data = json.loads(text)
    assert data["command"].startswith(f"lora-drop bench {bundles[0].name} ")
    assert data["command"].endswith("--threads 1 --json=figures.json")
    assert code == (1 if data["problems"] else 0)  # real times of a model of nothing: either may be
    printed = capsys.readouterr()
    assert "context 24, batch 2, repeat 2 of 2" in printed.err
    for text in ("── context 8, batch 1 ──", "rho0.5 ρ=0.50 k=3", "Eq. 16", "Eq. 11", "PSS MB"):
        assert text in printed.out
    assert [(row["bundle"], row["k"], row["context"], row["rows"]) for row in data["rows"]] == [
        (bundle, k, context, rows)
        for rows in (1, 2)
        for context in (8, 24)
        for bundle in ("rho0.25", "rho0.5")
        for k in (0, 1, 3)
    ]
    for row in data["rows"]:
        manifest = Bundle.open(next(path for path in bundles if path.name == row["bundle"])).manifest
        kept, dropped = costs.kv_bytes(manifest, row["context"], 11, row["k"])
        assert (row["kv_bytes"]["kept"], row["kv_bytes"]["dropped"]) == (row["rows"] * kept, row["rows"] * dropped)
        assert row["ceiling"] == request_ceiling(manifest, row["context"], 11, row["k"], row["rows"])
        assert 0 < row["overhead_share"] < 1
        assert sum(step["steps"] for step in row["steps"].values()) == 11
        if row["k"] == 0:
            assert row["speedups"] == [1, 1]
    assert len(data["raw"]) == len(data["rows"])
    assert all(len(run["step_seconds"]) == 11 for entry in data["raw"] for run in entry["runs"])
    assert data["machine"]["versions"]["onnxruntime"]
    assert data["bandwidth"]["threads"] == data["threads"] == 1
    assert [(one["bundle"], one["k"]) for one in data["memory"]] == [
        (name, k) for name in ("rho0.25", "rho0.5") for k in (3, 0)
    ]
    assert data["weight_dtype"] == "float32"


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_above_the_ceiling(
    share: float,
    bundles: list[Path],
    tmp_path: Path,
    scripted: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The results are written and printed, then the command ends with 1; with a warning where bytes bound nothing."""
    scripted({0: 0.010, 3: 0.004})
    manifest = Bundle.open(bundles[1]).manifest
    moved = costs.bytes_of_steps(manifest, 8, costs.periodic_kinds(11, 0), 1, manifest.plan.refresh_policy)
    rate = sum(moved) / len(moved) / 0.010 / share
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: machine.Bandwidth(rate, threads, 1, "max", {}))
    written = tmp_path / "figures.json"
    options = ["--k", "3", "--contexts", "8", "--new-tokens", "12", "--repeats", "2", "--json", str(written)]
    code = main(["bench", str(bundles[1]), *options])
    printed = capsys.readouterr()
    if share == 0.3:
        assert code == 0
        assert "The full schedule reads at 30% of the machine's bandwidth" in printed.out + printed.err
        return
    assert code == 1
    assert "error: A speed-up is above what the bytes allow." in printed.err
    assert "Note: rho0.5 (ρ 0.50, k = 3, context 8, batch 1): 2.500× is above the ceiling of 1." in printed.err
    assert "Hint: " in printed.err
    assert "2.500×" in printed.out
    data = json.loads(written.read_text())
    assert len(data["problems"]) == 1
    assert data["rows"][1]["speedup"] == pytest.approx(2.5)
    assert any("10.0% of a step is not the engine's" in text for text in data["warnings"])
    assert "not measured" in printed.out  # PSS, as without /proc


def test_what_was_measured_is_written_whoever_reads_the_tables(
    bundles: list[Path], tmp_path: Path, scripted: Callable[..., None]
) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    scripted({0: 0.01, 1: 0.01})
    settings = BenchSettings(
        k=(1,), contexts=(8,), new_tokens=12, repeats=2, json_file=tmp_path / "a.json", plots=tmp_path / "p"
    )
    with pytest.raises(BrokenPipeError):
        bench(bundles, settings, out=Gone())
    assert json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list((tmp_path / "p").iterdir())


def test_a_prompt_chunk_that_does_not_fit_is_not_timed(bundles: list[Path], scripted: Callable[..., None]) -> None:
    """The ceiling by operations takes one of all rows' tokens behind the context, which nobody asked for."""
    scripted({0: 0.01, 1: 0.01})
    limits = Bundle.open(bundles[0]).manifest.limits
    result = {}
    for context in (8, limits.max_seq_len - 12):
        settings = BenchSettings(
            k=(1,), contexts=(context,), new_tokens=12, batches=(8,), repeats=2, policy="backfill", threads=1
        )
        rows = bench(bundles, settings, out=io.StringIO()).rows
        result[context] = [row.operations_ceiling is None for row in rows if row.k]
    assert result == {8: [False, False], limits.max_seq_len - 12: [True, True]}


def test_memory_is_measured_beside_files_of_the_users(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of theirs may have the name of one that Python brings."""
    (tmp_path / "statistics.py").write_text("raise ImportError('shadowed')")
    monkeypatch.chdir(tmp_path)
    request, options = Request(8, 1, 5), SessionOptions("skip", threads=1)
    opened = Bundle.open(bundles[0])
    (found,) = measure_memory("b", opened, [1], request, np.zeros((1, 8), np.int64), options)
    assert found.pss
    assert max(found.pss.values()) > 1 << 20


def test_below_the_ceiling(bundles: list[Path], scripted: Callable[..., None]) -> None:
    scripted({0: 0.0100, 1: 0.0097, 3: 0.0096})
    out = io.StringIO()
    result = bench(bundles, BenchSettings(k=(1, 3), new_tokens=12, repeats=2), out=out)
    assert {row.context for row in result.rows} == {116}  # by default 128 and 2048; the bundles allow 128 with 12 new
    assert [round(row.speedup, 3) for row in result.rows[:3]] == [1, 1.031, 1.042]
    assert not result.problems
    assert out.getvalue().startswith("model ")


def test_foreign_load_is_told(bundles: list[Path], scripted: Callable[..., None], monkeypatch: Any) -> None:
    scripted({0: 0.01, 3: 0.01})
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 1.0, 1.0))  # of a minute that is over: it says nothing
    for cores, told in ((0.7, True), (0.05, False)):
        monkeypatch.setattr(machine, "foreign_cores", lambda *_, cores=cores: cores)
        out = io.StringIO()
        bench(bundles[0], BenchSettings(k=(3,), contexts=(8,), new_tokens=12, repeats=2), out=out)
        assert ("warning: Other processes kept 0.70 cores busy" in out.getvalue()) == told
        assert f"others     {cores:.2f} cores were kept busy" in out.getvalue()
        assert "load" not in out.getvalue()


def test_too_much_for_the_memory_is_told(bundles: list[Path], scripted: Callable[..., None], monkeypatch: Any) -> None:
    scripted({0: 0.01, 3: 0.01})
    monkeypatch.setattr(bench_module, "measure_memory", held({"total": 6 * 10**9}))
    facts = machine.machine_facts() | {"memory_bytes": 8 * 10**9}
    monkeypatch.setattr(machine, "machine_facts", lambda: facts)
    result = bench(bundles, BenchSettings(k=(3,), contexts=(8,), new_tokens=12, repeats=2), out=io.StringIO())
    assert any("held 12.0 GB together" in text for text in result.warnings)


def test_plots(bundles: list[Path], tmp_path: Path, scripted: Callable[..., None]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    scripted({0: 0.0100, 1: 0.0097, 3: 0.0096})
    settings = BenchSettings(k=(1, 3), contexts=(8,), new_tokens=12, repeats=2, plots=tmp_path / "p")
    bench(bundles, settings, out=io.StringIO())
    files = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert files == [f"{name}_context8_batch1.png" for name in ("kv_saving", "latency", "speedup")]
    assert all((tmp_path / "p" / name).read_bytes().startswith(b"\x89PNG") for name in files)


@pytest.mark.parametrize(("policy", "saving"), [("skip", 0.25 * 0.75), ("backfill", 0)])
def test_the_line_of_equation_16_is_the_policys(
    policy: str, saving: float, bundles: list[Path], scripted: Callable[..., None]
) -> None:
    """Of 2 of 8 layers dropped at k = 3; only `skip` saves K/V."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib, of the extra `bench`, is not installed")
    scripted({0: 0.0100, 3: 0.0096})
    settings = BenchSettings(k=(3,), contexts=(8,), new_tokens=12, repeats=2, policy=policy)
    axes = figure.Figure().add_subplot()
    _draw_kv_saving(axes, bench(bundles, settings, out=io.StringIO()).rows)
    (equation,) = [line for line in axes.lines if line.get_label() == "k = 3, Eq. 16"]
    assert equation.get_xdata()[-1] == 0.25
    assert equation.get_ydata()[-1] == pytest.approx(100 * saving)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--contexts", "120"], "The bundle does not allow what is to be measured."),
        (["--contexts", "128"], "The bundle does not allow what is to be measured."),
        (["--contexts", "8", "--batches", "9"], "The bundle does not allow what is to be measured."),
        (["--contexts", "0"], "--contexts is too small."),
        (["--contexts", "8", "--batches", "0"], "--batches is too small."),
        (["--contexts", "8", "--k", "40"], "There are too few new tokens to measure."),
        (["--contexts", "8", "--k", "-1"], "--k is too small."),
        (["--contexts", "8", "--repeats", "1"], "--repeats is too small."),
        (["--contexts", "8,x"], "The command line is not understood."),
        (["--contexts", "8", "--target", "tensorrt"], "The bundle cannot run on that target."),
        (["--contexts", "8", "--peers"], "The peers have no model to load."),
        (["--contexts", "8", "--peers", "nobody", "--model", "x"], "Unknown peer."),
        (["--contexts", "8", "--peers", "--model", "nowhere.gguf"], "The model for the peers cannot be read."),
        (["--contexts", "8", "--json", "nowhere/at/all.json"], "The results cannot be written."),
    ],
)
def test_refused_before_any_work(
    options: list[str],
    fact: str,
    bundles: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(machine, "read_bandwidth", work)
    monkeypatch.setattr(Session, "open", work)
    assert main(["bench", str(bundles[0]), "--new-tokens", "13", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {fact}")
    assert "\nNote: " in error
    assert "\nHint: " in error


def test_figures_without_matplotlib_are_refused(bundles: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="Figures need matplotlib"):
        bench(bundles, BenchSettings(contexts=(8,), new_tokens=14, plots=Path("plots")))


def test_bundles_of_one_model(bundles: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        bench([bundles[0], bundles[0]], BenchSettings(contexts=(8,)))
    other = Path(shutil.copytree(bundles[1], tmp_path / "other"))
    text = (other / MANIFEST_NAME).read_text()
    fingerprint = Bundle.open(other).manifest.model.fingerprint
    (other / MANIFEST_NAME).write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(InputError, match="not of one model"):
        bench([bundles[0], other], BenchSettings(contexts=(8,)))
    with pytest.raises(InputError, match="no bundle"):
        bench([], BenchSettings())


def test_weight_dtype(bundles: list[Path]) -> None:
    model = Bundle.open(bundles[0]).manifest.model
    assert weight_dtype(model) == "float32"
    half = dataclasses.replace(model, dtype="float16")
    assert weight_dtype(half) == "float16"
    quantized = type("Facts", (), {"dtype": "float32", "weight_dtype": "int4"})()
    assert weight_dtype(quantized) == "int4"

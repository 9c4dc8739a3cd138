"""`lora-drop inspect` on a real bundle: what it prints, and that `--check` finds a changed byte.

The model has 8 layers, hidden size 64, 4/2 heads of 16, an MLP of 96 and 131 tokens: the figures are worked out here.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.errors import BundleError
from lora_drop_tools import inspect
from lora_drop_tools.cli import main

from lora_drop_export.targets.trt.build import EngineBuilder
from lora_drop_export.targets.trt.options import BuilderOptions
from tests.support.bundles import family, make_bundle, save_adapters


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 4 and 6 of 8 dropped, k = 3, 128 tokens."""
    return make_bundle("llama", tmp_path_factory.mktemp("inspect") / "bundle", drop_ratio=0.5).root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


ENGINE_BYTES = {"refresh": 3 << 20, "lora": 1 << 20}


def described(bundle: Path, **options: bool) -> str:
    out = io.StringIO()
    assert inspect(bundle, out=out, **options) == Bundle.open(bundle).manifest
    return out.getvalue()


def change(bundle: Path, **changes: object) -> None:
    """Exchange entries of the manifest; plan and limits are given as their own changes."""
    path = bundle / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for key, value in changes.items():
        manifest[key] = manifest[key] | value if isinstance(value, dict) and value else value
    path.write_text(json.dumps(manifest))


def row(text: str, start: str) -> str:
    """The one line that starts with `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_model_and_plan(made: Path) -> None:
    text = described(made)
    assert "(llama, 8 layers, d 64, 4/2 heads, float32)" in row(text, "model")
    assert row(text, "layers").split() == ["layers", "████·█·█", "█", "kept,", "·", "dropped", "on", "LoRA", "steps"]
    assert row(text, "drop list").split(maxsplit=2)[2] == "4, 6: 2 of 4 eligible, ρ 0.50, ρ_eff 0.250"
    assert row(text, "surrogate").split(maxsplit=1)[1] == "residual, no adapters"
    assert row(text, "schedule").split(maxsplit=1)[1] == "k = 3: 3 LoRA steps, then a refresh; policy skip"
    assert row(text, "limits").split(maxsplit=1)[1] == "128 tokens, prompts of 127, batches of 8"


def test_sizes_are_those_on_disk(made: Path) -> None:
    sizes = described(made).split("size on disk")[1].split("targets")[0]
    for name in ("refresh.onnx", "lora.onnx", "ort", "weights", "tokenizer"):
        path = made / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size_bytes = sum(file.stat().st_size for file in files)
        printed, unit = row(sizes, f"  {name} ").split()[1:]
        assert float(printed) == pytest.approx(size_bytes / {"MiB": 2**20, "KiB": 2**10}[unit], abs=0.051), name
    assert row(sizes, "  weights ").split()[1:] == [
        "1.0",
        "MiB",
    ]  # 8 layers of 30848, head and embedding of 131 · 64, one norm


def test_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes on disk are the files'; resident are the engines and, as inputs, the weights once.

    Engines of other sizes than the library's, which takes seconds for each: nothing looks into them.
    """
    monkeypatch.setattr(EngineBuilder, "build", lambda _, proto, __: bytes(ENGINE_BYTES[proto.graph.name]))
    ada = BuilderOptions(compute_capabilities=("8.9",))
    shared, constants = (
        make_bundle("llama", tmp_path / sharing, targets=("ort", "tensorrt-rtx"), weight_sharing=sharing, builder=ada)
        for sharing in ("inputs", "constants")
    )
    weights = (shared.root / "weights" / "model.safetensors").stat().st_size
    for bundle, extra in ((shared, weights), (constants, 0)):
        text = described(bundle.root).split("targets")[1].split("predicted")[0]
        files = {kind: bundle.root / "tensorrt-rtx" / f"{kind}.engine" for kind in ENGINE_BYTES}
        assert {kind: file.stat().st_size for kind, file in files.items()} == ENGINE_BYTES
        engines = sum(ENGINE_BYTES.values())
        disk = sum(file.stat().st_size for file in (bundle.root / "tensorrt-rtx").iterdir())
        on_disk, _, resident, *_ = row(text, "  tensorrt-rtx ").split()[1:]
        assert float(on_disk) == pytest.approx(disk / 2**20, abs=0.051)
        assert float(resident) == pytest.approx((engines + extra) / 2**20, abs=0.1)
    assert "weights once, as inputs of both engines" in described(shared.root)
    assert "in each engine its own" in described(constants.root)


def test_predictions(made: Path) -> None:
    text = described(made)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    entry = 2 * 2 * 16
    outside = 131 * 64 + 64 + 64
    assert "(prompt, then as many decode steps)" in text  # N new tokens take N − 1
    kept, dropped = 64 + 64, 64 + 16  # prompt 64, 64 decode steps of which 16 refreshes
    full = outside + 8 * (layer + (kept + 1) * entry)
    refresh = outside + 6 * (layer + (kept + 1) * entry) + 2 * (layer + (dropped + 1) * entry)
    lora = outside + 6 * (layer + (kept + 1) * entry)
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["64"]]
    ceiling = 4 * full / (refresh + 3 * lora)
    saved = 1 - (6 * kept + 2 * dropped) / (8 * kept)
    assert line.split() == [
        "64",
        *(f"{4 * refresh / 2**20:.1f}", "MiB", f"{4 * lora / 2**20:.1f}", "MiB"),
        f"{ceiling:.2f}×",
        f"{1 / (0.75 + 0.25 / 4):.2f}×",  # Eq. 9 without adapters: γ = 0
        *(f"{4 * 8 * kept * entry / 2**20:.1f}", "→", f"{4 * (6 * kept + 2 * dropped) * entry / 2**20:.1f}", "MiB"),
        *(f"({saved:.1%}", "saved)"),
    ]
    assert "Eq. 10: at most 1.231× with ρ_eff 0.250" in text  # 4 / (4 − 0.75)
    assert (
        "Eq. 16, K/V of generated tokens saved: 18.8% under skip; 0.0% under backfill, lossless" in text
    )  # 0.25 · 0.75
    assert "Eq. 11: one token in 4 takes a refresh, so the p95 latency is that of a refresh" in text


def test_p95_of_a_wide_window(copied: Path) -> None:
    change(copied, plan={"k": 19})
    assert "one token in 20 takes a refresh, so the p95 latency is that of a LoRA step" in described(copied)
    change(copied, plan={"k": 18})
    assert "one token in 19 takes a refresh, so the p95 latency is that of a refresh" in described(copied)


def test_two_prompt_lengths_where_there_is_room(copied: Path) -> None:
    for longest, expected in ((2047, ["128", "1024"]), (500, ["128", "500"]), (100, ["100"])):
        change(copied, limits={"max_seq_len": 2048, "max_prompt_len": longest}, model={"context_length": 2048})
        prompts = [line.split()[0] for line in described(copied).splitlines() if "saved)" in line]
        assert prompts == expected


def test_verification_is_printed_as_it_went(copied: Path) -> None:
    assert described(copied).splitlines()[-1].split(maxsplit=1) == ["ort", "not run"]
    change(copied, verification={"ort": {"status": "passed", "steps": 10, "max_abs_error": 2.34e-6}})
    verified = described(copied).splitlines()[-1]
    assert verified.split(maxsplit=1) == ["ort", "passed, 10 steps, max abs error 2.3e-06"]
    change(copied, verification={"ort": {"status": "failed", "steps": 10, "max_abs_error": 0.5}})
    assert "failed, 10 steps" in described(copied)
    change(copied, targets={}, verification={})
    text = described(copied)
    assert "graphs only, nothing to run" in text
    assert "passed" not in text


def test_drafts_that_are_looked_up_take_no_lora_steps(tmp_path: Path) -> None:
    """A refresh that accepts all k of them makes k + 1 tokens for the bytes of one and, hardly, of theirs."""
    text = described(make_bundle("llama", tmp_path / "none", drop_ratio=0.0, policy="lossless").root)
    prompt, _, _, lora_step, ceiling, by_macs, *_ = row(text, "      64 ").split()
    assert (prompt, lora_step, ceiling, by_macs) == ("64", "–", "4.00×", "–")
    assert "Eq. 10: –; Eq. 16" in text


def test_other_plans(tmp_path: Path) -> None:
    source = family("llama")
    root = make_bundle("llama", tmp_path / "none", drop_ratio=0.0, k=0).root
    text = described(root)
    assert "████████" in text
    assert "none: 0 of 4 eligible, ρ 0.00, ρ_eff 0.000" in text
    plan = dataclasses.replace(Bundle.open(root).manifest.plan, sites=(3, 5), surrogate="recurrent", rank=4)
    adapters = save_adapters(tmp_path / "adapters", plan, 64, source.checkpoint.fingerprint())
    root = make_bundle("llama", tmp_path / "fitted", drop_layers=(3, 5), surrogate="recurrent", adapters=adapters).root
    text = described(root, check=True)
    assert "███·█·██" in text
    assert row(text, "surrogate").split(maxsplit=1)[1] == "recurrent, rank 4"
    flip(root / "weights" / "adapters.safetensors", -1)
    with pytest.raises(BundleError, match=r"weights/adapters\.safetensors"):
        inspect(root, check=True, out=io.StringIO())


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────


def flip(file: Path, position: int) -> None:
    """One other byte, the same size."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_command(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made)]) == 0
    out, err = capsys.readouterr()
    assert out == described(made)
    assert "recorded hash" not in out
    assert err == ""


def test_check_passes_on_a_whole_bundle(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made), "--check"]) == 0
    out, err = capsys.readouterr()
    count = sum(file.is_file() for file in made.rglob("*")) - 1  # all but the manifest
    assert out == described(made) + f"all {count} files have their recorded hash\n"
    assert err == ""


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("refresh.onnx", 100),
        ("lora.onnx", -1),
        ("ort/steps.onnx", 500),
        ("weights/model.safetensors", 20),  # in the header
        ("weights/config.json", 3),
    ],
)
def test_check_finds_a_changed_byte(copied: Path, capsys: pytest.CaptureFixture[str], name: str, position: int) -> None:
    flip(copied / name, position)
    assert main(["inspect", str(copied)]) == 0  # same size, so opening does not see it
    capsys.readouterr()
    assert main(["inspect", str(copied), "--check"]) == 2
    out, err = capsys.readouterr()
    assert "recorded hash" not in out
    fact, note, hint = err.splitlines()
    assert fact == "error: A file of the bundle has changed."
    assert note == f"Note: {name} does not have the recorded hash."
    assert hint.startswith("Hint: Copy the bundle again")


def test_check_counts_changed_files(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lora.onnx", "refresh.onnx", "ort/steps.onnx"):
        flip(copied / name, 9)
    assert main(["inspect", str(copied), "--check"]) == 2
    assert "Note: lora.onnx does not have the recorded hash, nor have 2 others." in capsys.readouterr().err


def test_a_damaged_bundle_is_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*parts: str) -> None:
        assert main(["inspect", str(copied)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        fact, note, hint = err.splitlines()
        assert fact.startswith("error: ")
        assert note.startswith("Note: ")
        assert hint.startswith("Hint: ")
        for part in parts:
            assert part in err

    lora = copied / "lora.onnx"
    data = lora.read_bytes()
    lora.write_bytes(data[:-1])
    refused("wrong size", "lora.onnx", f"{len(data) - 1} bytes", f"{len(data)}")
    lora.unlink()
    refused("missing", "lora.onnx", f"{len(data)} bytes")
    change(copied, format_version=99)
    refused("format version", "version 99", "version 5")
    (copied / MANIFEST_NAME).write_text("{")
    refused("damaged", MANIFEST_NAME)
    (copied / MANIFEST_NAME).unlink()
    refused("no bundle here", MANIFEST_NAME)

"""An export is there as a whole or not at all, and an existing bundle stays until the new one is ready."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_drop_tools.cli
import pytest
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError, VerificationError

import lora_drop_export.check.verify
from lora_drop_export.check.figures import Tolerance
from lora_drop_export.cli import main
from lora_drop_export.decoder.loaded import load_model
from lora_drop_export.staging import directory
from tests.support.bundles import family, make_bundle
from tests.support.models import SIZES

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Exports take the tiny Llama's trace, made once."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: family("llama").traced)


@pytest.fixture
def place(tmp_path) -> Path:
    """The only directory that an export may touch: `engines` will be in it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def arguments(out: Path, *more: object) -> list[str]:
    model = family("llama").directory
    return [str(a) for a in ("--model", model, "--out", out, "--max-seq-len", 64, *more)]


def tokens(root: Path) -> list[int]:
    with Session.open(root) as session:
        return session.generate([[7, 3, 11, 19]], 9)[0].tolist()


def snapshot(directory: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a directory; its own time may change, since a temporary sibling comes and goes."""
    entries = {}
    for path in directory.rglob("*"):
        stat = path.lstat()
        size = 0 if path.is_dir() else stat.st_size
        entries[str(path.relative_to(directory))] = stat.st_mode, size, stat.st_mtime_ns, stat.st_ino
    return entries


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# ── exports that fail ──────────────────────────────────────────────────────────────────────────────────────────

PLACES = {  # where an export may end early, from its beginning to its end
    "opening": "lora_drop_export.compiler.export.open_checkpoint",
    "tracing": "lora_drop_export.compiler.export.trace",
    "weights": "lora_drop_export.compiler.export.store_weights",
    "surgery": "lora_drop_export.compiler.export.lora_step_from_refresh",
    "lowering": "lora_drop_export.targets.ort.lower.ort_from_neutral",
    "tokenizer": "lora_drop_export.compiler.export.copy_tokenizer",
    "records": "lora_drop_export.compiler.export.file_records",
    "verification": "lora_drop_export.compiler.export.verify",
}


@pytest.fixture(params=[False, True], ids=["new", "forced"])
def forced(request) -> bool:
    """Whether there is a bundle at --out already."""
    return request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[int]]:
    """A bundle to copy, and what it generates."""
    root = make_bundle("llama", tmp_path_factory.mktemp("whole") / "b").root
    return root, tokens(root)


@pytest.fixture
def check_untouched(place, forced, whole) -> Callable[[], None]:
    """Afterwards the place is as before, and a bundle that was there works."""
    before: dict[str, Any] = {}
    if forced:
        shutil.copytree(whole[0], place / "engines")
        before = snapshot(place)

    def check() -> None:
        assert snapshot(place) == before
        if before:
            assert tokens(place / "engines") == whole[1]

    return check


def at_every_place(first_is_forced: bool) -> pytest.MarkDecorator:
    """In turns with and without a bundle at --out."""
    cases = [(where, bool(index % 2) != first_is_forced) for index, where in enumerate(PLACES)]
    return pytest.mark.parametrize(("where", "forced"), cases)


@at_every_place(first_is_forced=False)
def test_exception_in_the_middle(place, monkeypatch, check_untouched, where):
    """Our own bugs are not dressed up; they leave nothing behind either."""
    monkeypatch.setattr(PLACES[where], raising(RuntimeError("in the middle")))
    with pytest.raises(RuntimeError, match="in the middle"):
        main(arguments(place / "engines", "--force"))
    check_untouched()


@at_every_place(first_is_forced=True)
def test_interrupted(place, monkeypatch, capsys, check_untouched, where):
    monkeypatch.setattr(PLACES[where], raising(KeyboardInterrupt()))
    assert main(arguments(place / "engines", "--force")) == 130
    assert "interrupted" in capsys.readouterr().err
    check_untouched()


def test_interrupted_between_two_graphs(place, monkeypatch, check_untouched):
    """Half the files are written."""
    write_bytes, written = Path.write_bytes, []

    def second_fails(path: Path, data: bytes) -> int:
        written.append(path.name)
        if path.name == "lora.onnx":
            raise KeyboardInterrupt
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", second_fails)
    assert main(arguments(place / "engines", "--force")) == 130
    assert written == ["refresh.onnx", "lora.onnx"]
    check_untouched()


def test_verification_error(place, monkeypatch, capsys, check_untouched):
    error = VerificationError("It disagrees.", note="1 and 2.", hint="Look.")
    monkeypatch.setattr("lora_drop_export.compiler.export.verify", raising(error))
    assert main(arguments(place / "engines", "--force")) == 1
    assert capsys.readouterr().err.endswith("error: It disagrees.\nNote: 1 and 2.\nHint: Look.\n")
    check_untouched()


def test_bundle_that_disagrees_with_pytorch(place, monkeypatch, capsys, check_untouched):
    """The real verification, which no bundle can pass with this tolerance."""
    monkeypatch.setitem(lora_drop_export.check.verify.TOLERANCES, "float32", Tolerance(max_error=0.0, min_cosine=1.0))
    assert main(arguments(place / "engines", "--force")) == 1
    printed = capsys.readouterr()
    assert "error: The bundle on ort disagrees with PyTorch.\nNote: Step " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    check_untouched()


def other_values(file: Path) -> None:
    """As a training run does it: the same tensors at the same places."""
    data = bytearray(file.read_bytes())
    data[-4096:] = bytes(4096)
    file.write_bytes(data)


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": other_values,
    "shorter": lambda file: os.truncate(file, file.stat().st_size // 2),
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("forced", [True], indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_that_changes_during_the_export(
    place, tmp_path, monkeypatch, capsys, check_untouched, change
) -> None:
    model = shutil.copytree(family("llama").directory, tmp_path / "model")
    weights = model / "model.safetensors"

    def traced(*_: object, **__: object) -> Any:
        CHANGES[change](weights)
        return family("llama").traced

    monkeypatch.setattr("lora_drop_export.compiler.export.trace", traced)
    assert main([*arguments(place / "engines", "--force"), "--model", str(model)]) == 2
    what = "removed" if change == "removed" else "written or replaced"
    said = f"error: The checkpoint changed while it was read.\nNote: {weights} was {what} meanwhile.\nHint: "
    assert said in capsys.readouterr().err
    check_untouched()


def test_checkpoint_that_changes_while_a_tool_reads_it(tmp_path) -> None:
    model = shutil.copytree(family("llama").directory, tmp_path / "model")

    with pytest.raises(InputError, match="The checkpoint changed while it was read"):
        load_model(str(model), check=lambda _: other_values(model / "model.safetensors"))


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_out_that_appears_during_the_export(place, monkeypatch, capsys, force):
    """Someone else's files at --out are not replaced, with or without --force."""

    def make_notes(bundle: Bundle, **_: object) -> Bundle:
        (place / "engines").mkdir()
        (place / "engines" / "notes.txt").write_text("mine")
        return bundle

    monkeypatch.setattr("lora_drop_export.compiler.export.verify", make_notes)
    assert main(arguments(place / "engines", *force)) == 2
    assert "error: The output directory" in capsys.readouterr().err
    assert list(snapshot(place)) == ["engines", "engines/notes.txt"]


def test_bundle_that_appears_during_the_export(place, monkeypatch, capsys):
    """Another export was faster."""
    monkeypatch.setattr(
        "lora_drop_export.compiler.export.verify",
        lambda bundle, **_: (make_bundle("llama", place / "engines"), bundle)[1],
    )
    assert main(arguments(place / "engines", "--drop-layers", "5")) == 2
    assert "exists already" in capsys.readouterr().err
    assert Bundle.open(place / "engines").manifest.plan.dropped_layers == (4, 6)
    assert [path.name for path in place.iterdir()] == ["engines"]


# ── exports that succeed ───────────────────────────────────────────────────────────────────────────────────────


def test_force_exchanges_a_bundle(place):
    old = make_bundle("llama", place / "engines", drop_layers=(4,), rank=2)
    inode = old.root.stat().st_ino
    opened = Session.open(old.root)  # a session of the old bundle goes on
    assert main(arguments(place / "engines", "--force", "--drop-layers", "3,5,6", "--k", 2)) == 0
    new = Bundle.open(place / "engines")
    assert new.manifest.plan.dropped_layers == (3, 5, 6)
    assert new.manifest.plan.k == 2
    assert new.root.stat().st_ino != inode
    assert [path.name for path in place.iterdir()] == ["engines"]
    assert not (new.root / "weights" / "adapters.safetensors").exists()
    assert not new.check_hashes()
    with opened:
        assert opened.generate([[7, 3, 11, 19]], 9)[0].shape == (9,)
    assert len(tokens(new.root)) == 9


def test_force_through_a_link(place):
    """The link stays, the bundle that it leads to is exchanged."""
    make_bundle("llama", place / "disk" / "bundle")
    (place / "engines").symlink_to("disk/bundle")
    assert main(arguments(place / "engines", "--force", "--drop-layers", "5")) == 0
    assert (place / "engines").is_symlink()
    assert Bundle.open(place / "disk" / "bundle").manifest.plan.dropped_layers == (5,)
    assert [path.name for path in (place / "disk").iterdir()] == ["bundle"]
    assert sorted(path.name for path in place.iterdir()) == ["disk", "engines"]


def test_force_without_a_bundle(place):
    assert main(arguments(place / "a" / "b" / "engines", "--force")) == 0
    assert Bundle.open(place / "a" / "b" / "engines")
    assert [path.name for path in (place / "a" / "b").iterdir()] == ["engines"]


def test_the_bundle_can_be_read_by_others(place):
    """The temporary directory's private mode does not stay."""
    assert main(arguments(place / "engines")) == 0
    for path in ((place / "engines"), *(place / "engines").rglob("*")):
        assert path.stat().st_mode & 0o444 == 0o444
        assert not path.is_dir() or path.stat().st_mode & 0o111 == 0o111


# ── exports that are killed ────────────────────────────────────────────────────────────────────────────────────


def kill_when(command: list[str], ready: Callable[[], bool]) -> None:
    """Start a command in a process of its own and kill it once something is there."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not ready():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def staging(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name != "engines"]


def test_killed_at_the_beginning(place):
    command = [sys.executable, "-m", "lora_drop_export.cli", *arguments(place / "engines")]
    kill_when(command, lambda: bool(staging(place)))
    assert not (place / "engines").exists()
    (left,) = staging(place)
    assert left.name.startswith(".engines.")  # hidden, and its name says whose it is
    assert main(arguments(place / "engines")) == 0
    assert len(tokens(place / "engines")) == 9
    assert staging(place) == []


# ── what a bundle says of itself ───────────────────────────────────────────────────────────────────────────────


def inspected(root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert lora_drop_tools.cli.main(["inspect", str(root), *more]) == 0
    return capsys.readouterr().out


def test_verification_is_recorded(place, capsys):
    out = place / "engines"
    assert main(arguments(out, "--target", "ort", "--k", 2)) == 0
    printed = capsys.readouterr()
    assert "against eager PyTorch, k = 2" in printed.err
    assert "k = 2, policy skip" in printed.out
    manifest = Bundle.open(out).manifest
    (details,) = json.loads((out / "verify.json").read_text())
    assert details["target"] == "ort"
    assert details["k"] == 2
    steps = details["steps"]
    assert [s["kind"] for s in steps] == ["prefill", *(["lora", "lora", "refresh"] * 3)[: len(steps) - 1]]
    assert len(steps) >= 1 + 2 * 3  # two whole cycles
    assert all(s["passed"] for s in steps)
    assert manifest.verification == {
        "ort": {
            "status": "passed",
            "steps": len(steps),
            "max_abs_error": max(s["max_abs_error"] for s in steps),
            "min_cosine": min(s["cosine"] for s in steps),
        }
    }
    assert "verify.json" in manifest.files
    assert f"ort           passed, {len(steps)} steps" in inspected(out, capsys)


def test_not_verified(place, capsys):
    out = place / "engines"
    assert main(arguments(out, "--no-verify")) == 0
    assert "not verified (--no-verify)" in capsys.readouterr().err
    assert Bundle.open(out).manifest.verification == {}
    assert not (out / "verify.json").exists()
    text = inspected(out, capsys)
    assert "ort           not run" in text
    assert "passed" not in text


def test_graphs_only(place, capsys):
    out = place / "engines"
    assert main(arguments(out, "--target", "none")) == 0
    printed = capsys.readouterr()
    assert "nothing was executed, so nothing was verified" in printed.err
    assert "lora-drop generate" not in printed.out
    manifest = Bundle.open(out).manifest
    assert manifest.targets == {}
    assert manifest.verification == {}
    assert {path.name for path in out.iterdir()} == {
        MANIFEST_NAME, "refresh.onnx", "lora.onnx", "weights", "tokenizer"
    }  # fmt: skip
    text = inspected(out, capsys)
    assert "graphs only, nothing to run" in text
    assert "passed" not in text


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is open")
@pytest.mark.parametrize("more", [("--rank", 3), ("--dtype", "int8", "--target", "openvino", "--kv-dtype", "int8")])
def test_no_file_of_a_bundle_is_open_when_it_takes_its_place(place, monkeypatch, more):
    """Windows renames no directory that has one, be it mapped alone."""
    renamed = []

    def rename_new(source: Path, target: Path) -> None:
        found = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines()]
        found += [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        assert [name for name in found if name.startswith(f"{source}/")] == []
        renamed.append(target)
        os.rename(source, target)

    monkeypatch.setattr(directory, "rename_new", rename_new)
    out = place / "engines"
    assert main(arguments(out, *more)) == 0
    assert renamed == [out]


@pytest.mark.parametrize("more", [(), ("--target", "none"), ("--rank", 3, "--surrogate", "recurrent")])
def test_manifest_is_self_describing(place, more):
    out = place / "engines"
    options = ("--drop-layers", "3,6", "--k", 5, "--always-first", 2, "--max-prompt-len", 40, "--max-batch", 3)
    assert main(arguments(out, *options, *more)) == 0
    data = json.loads((out / MANIFEST_NAME).read_text())
    assert data["format_version"] == 5
    model, plan = data["model"], data["plan"]
    assert (plan["sites"], plan["k"], plan["num_layers"]) == (["3", "6"], 5, SIZES["num_hidden_layers"])
    assert (plan["always_first"], plan["always_last"]) == (2, 1)
    assert plan["surrogate"] == ("recurrent" if "recurrent" in more else "residual")
    assert plan["rank"] == (3 if "--rank" in more else 0)
    assert data["limits"] == {"max_seq_len": 64, "max_prompt_len": 40, "max_batch": 3}
    assert model["model_type"] == "llama"
    assert model["dtype"] == "float32"
    assert model["fingerprint"] == family("llama").checkpoint.fingerprint()
    assert (model["vocab_size"], model["hidden_size"]) == (SIZES["vocab_size"], SIZES["hidden_size"])
    assert (model["num_heads"], model["kv_heads"], model["head_dim"]) == (4, 2, 16)
    assert data["targets"] == ({} if "none" in more else {"ort": {"steps": "ort/steps.onnx"}})
    for package in ("torch", "transformers", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "lora-drop-export"):
        assert data["versions"][package] == importlib.metadata.version(package)
    # Every file but the manifest, with its size and the hash of its content
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    del files[MANIFEST_NAME]
    assert set(data["files"]) == set(files)
    for name, record in data["files"].items():
        content = files[name].read_bytes()
        assert record["size_bytes"] == len(content), name
        assert record["sha256"] == hashlib.sha256(content).hexdigest(), name


def test_manifest_opens_without_the_exporter(place):
    """A bundle is read by the runtime alone: in a process where torch and transformers cannot be imported."""
    assert main(arguments(place / "engines")) == 0
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'lora_drop_export'): sys.modules[name] = None\n"
        "from lora_drop_runtime import Session\n"
        "with Session.open(sys.argv[1]) as session: print(session.generate([[7, 3, 11, 19]], 9)[0].tolist())\n"
    )
    moved = shutil.move(place / "engines", place / "moved")
    command = [sys.executable, "-c", script, moved]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(done.stdout) == tokens(place / "moved")

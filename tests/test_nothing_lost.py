"""Every command that writes, against files that are not its own and against a disk that takes no more."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lora_drop_tools.cli
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError
from lora_drop_tools.shared import machine

import lora_drop_export.cli
from tests.support.bundles import family, make_bundle
from tests.support.models import FAMILIES
from tests.support.profiles import saved
from tests.support.tokenizers import character_tokenizer

DIRECTORIES = ("export", "add-target", "fit", "profile")
FILES = ("compare", "eval", "bench")
FIT = ("--drop-layers", "3,5", "--window", 32, "--batch", 2, "--closed-form-tokens", 256, "--threads", 1)
PROFILE = ("--tokens", 64, "--sensitivity-tokens", 32, "--window", 32, "--rankings", "influence")
EVAL = ("--window", 32, "--prompt", 8, "--windows", 1, "--k", 1, "--threads", 1)
BENCH = ("--k", 1, "--contexts", 8, "--new-tokens", 8, "--repeats", 2, "--threads", 1)
Run = Callable[..., int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs: a model with a tokenizer, a text of its words, a bundle."""
    root = tmp_path_factory.mktemp("made")
    saved(FAMILIES["llama"](), root / "model")
    (root / "words").write_text(" ".join(f"w{n}" for n in random.Random(0).choices(range(131), k=3000)))
    (root / "text").write_text("the tide is low and the boats wait. " * 20)
    character_tokenizer(make_bundle("llama", root / "bundle").root)
    return root


@pytest.fixture
def run(made: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command whose result goes to `out`."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: family("llama").traced)
    monkeypatch.setattr(importlib.import_module("lora_drop_tools.bench.bench"), "measure_memory", lambda *_: [])
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**22)

    def run(name: str, out: Path, *more: object) -> int:
        model, bundle = made / "model", made / "bundle"
        arguments: dict[str, tuple[object, ...]] = {
            "export": ("--model", model, "--out", out, "--max-seq-len", 64, "--no-verify"),
            "add-target": ("--add-target", "ort", "--out", out, "--no-verify"),
            "fit": ("fit", model, "--text", made / "words", "--out", out, *FIT),
            "profile": ("profile", model, "--text", made / "words", "--out", out, *PROFILE),
            "compare": ("compare", bundle, "--threads", 1, "--json", out),
            "eval": ("eval", bundle, "--text", made / "text", *EVAL, "--json", out),
            "bench": ("bench", bundle, *BENCH, "--json", out),
        }
        main = lora_drop_export.cli.main if name in ("export", "add-target") else lora_drop_tools.cli.main
        return main([str(argument) for argument in (*arguments[name], *more)])

    return run


def make_old(run: Run, name: str, out: Path) -> None:
    """An earlier result of a command."""
    if name == "add-target":
        make_bundle("llama", out, targets=("none",))
    elif name == "fit":
        assert run("fit", out, "--rank", 2, "--steps", 0) == 0
    elif name == "profile":
        out.mkdir()
        profile = {"fingerprint": "", "layers": [{}], "rankings": {}, "drop_lists": []}
        (out / "profile.json").write_text(json.dumps(profile))
    else:
        assert run(name, out) in ((0, 1) if name == "bench" else (0,))  # real times of a model of nothing


def held(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


# ── files that are not ours ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_file_of_the_user_s_inside_a_result(run: Run, name: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    make_old(run, name, out)
    (out / "notes.txt").write_text("mine")
    before = held(tmp_path)
    force = () if name == "add-target" else ("--force",)
    assert run(name, out, *force) == 2
    assert f"{out} has 1 entry that is not of this " in capsys.readouterr().err
    assert held(tmp_path) == before
    (out / "notes.txt").unlink()
    assert run(name, out, *force, *(("--steps", 0) if name == "fit" else ())) == 0
    assert os.listdir(tmp_path) == ["out"]


PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
LOOKALIKES = {  # a directory of the user's that has a file of our marker's name
    "a text": ("export", {"lora_drop.json": "drop the LoRA idea", "thesis.tex": "mine"}),
    "JSON": ("export", {"lora_drop.json": '{"format_version": 2, "files": {"thesis.tex": {"size_bytes": 4}}}'}),
    "a list": ("export", {"lora_drop.json": "[1]"}),
    "PEFT": ("fit", {"adapter_config.json": json.dumps(PEFT), "adapter_model.safetensors": "weights"}),
    "PEFT with fit.json": ("fit", {"adapter_config.json": json.dumps(PEFT), "fit.json": "{}"}),
    "another profile": ("profile", {"profile.json": '{"name": "me"}'}),
    "a profile of Chrome's": ("profile", {"profile.json": '{"drop_lists": [], "layers": [], "rankings": {}}'}),
}


@pytest.mark.parametrize("what", LOOKALIKES)
def test_a_directory_with_a_file_of_our_marker_s_name(run: Run, what: str, tmp_path: Path, capsys) -> None:
    name, files = LOOKALIKES[what]
    (tmp_path / "out").mkdir()
    for file, text in files.items():
        (tmp_path / "out" / file).write_text(text)
    before = held(tmp_path)
    assert run(name, tmp_path / "out", "--force") == 2
    assert "so --force will not replace it" in capsys.readouterr().err
    assert held(tmp_path) == before


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_user_s_at_json(run: Run, name: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    for text in ("my notes", '{"rows": []}', "[1, 2]"):
        out.write_text(text)
        assert run(name, out) == 2
        assert "--json is not a result of this command" in capsys.readouterr().err
        assert held(tmp_path) == {"out.json": text.encode()}
    out.write_text("")  # as mktemp makes it
    for _ in range(2):  # the second time over the first one's
        assert run(name, out) in (0, 1)
        assert json.loads(out.read_bytes())
    assert os.listdir(tmp_path) == ["out.json"]


def test_figures_of_the_user_s_at_plots(run: Run, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    plots = tmp_path / "plots"
    assert run("eval", tmp_path / "json", "--plots", plots) == 0
    (plots / "holiday.png").write_bytes(b"\x89PNG mine")
    assert run("eval", tmp_path / "json", "--plots", plots) == 0  # over those of the first time
    assert (plots / "holiday.png").read_bytes() == b"\x89PNG mine"
    (plots / "offsets.png").write_bytes(b"\x89PNG mine")
    before = held(tmp_path)
    capsys.readouterr()
    assert run("eval", tmp_path / "json", "--plots", plots) == 2
    assert "offsets.png is not touched" in capsys.readouterr().err
    assert held(tmp_path) == before


@pytest.mark.parametrize("option", ["--json", "--plots", "--out"])
@pytest.mark.parametrize("name", ["new", "weights", "weights/new"])
def test_results_inside_a_bundle(run: Run, option: str, name: str, made: Path, tmp_path: Path, capsys) -> None:
    """It could be opened no more, or not be replaced."""
    before = held(made)
    assert run("eval", tmp_path / "json", option, made / "bundle" / name) == 2
    assert f"The results at {option} would lie inside a bundle." in capsys.readouterr().err
    assert (held(made), held(tmp_path)) == (before, {})


@pytest.mark.parametrize("name", ["fit", "profile"])
def test_directories_inside_a_bundle(run: Run, name: str, made: Path, capsys) -> None:
    before = held(made)
    assert run(name, made / "bundle" / "weights" / "new") == 2
    assert "The results at --out would lie inside a bundle." in capsys.readouterr().err
    assert held(made) == before


@pytest.mark.parametrize(
    ("name", "option", "more"),
    [("fit", "--log-dir", ("--steps", 1)), ("bench", "--peer-cache", ("--peers", "transformers", "--model", "model"))],
)
def test_what_is_kept_beside_a_result_inside_a_bundle(
    run: Run, name, option, more, made: Path, tmp_path: Path, capsys
) -> None:
    if name == "fit":
        pytest.importorskip("tensorboard", reason="tensorboard, of the extra `fit`, is not installed")
    before = held(made)
    assert run(name, tmp_path / "result", *more, option, made / "bundle" / "new") == 2
    assert f"The results at {option} would lie inside a bundle." in capsys.readouterr().err
    assert (held(made), held(tmp_path)) == (before, {})


def test_json_to_a_device_and_through_a_link(run: Run, tmp_path: Path) -> None:
    """A device is written to, not replaced; of a link the file that is meant."""
    (tmp_path / "link").symlink_to("figures")
    assert run("eval", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "figures").read_text())
    (tmp_path / "null").symlink_to(os.devnull)
    assert run("eval", tmp_path / "null") == 0
    assert Path(os.devnull).is_char_device()
    assert sorted(os.listdir(tmp_path)) == ["figures", "link", "null"]


@pytest.mark.parametrize(
    ("name", "out", "inner"),
    [("export", ".", ""), ("add-target", ".", ""), ("add-target", "..", "weights"), ("fit", "../out", "")],
)
def test_inside_the_result(run: Run, name: str, out: str, inner: str, tmp_path: Path, capsys, monkeypatch) -> None:
    make_old(run, name, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out" / inner)
    before = held(tmp_path)
    assert run(name, Path(out), *(() if name == "add-target" else ("--force",))) == 2
    assert f"cd {tmp_path}, and --out out" in capsys.readouterr().err
    assert held(tmp_path) == before


# ── a disk that takes no more ──────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """As `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("export", (500, 5_000, 100_000)),
        ("add-target", (500,)),
        ("fit", (50, 1_000)),
        ("profile", (500,)),
        *((name, (100,)) for name in FILES),
    ],
)
def test_files_that_may_not_grow(run: Run, name: str, limits: tuple[int, ...], tmp_path: Path, capsys) -> None:
    """At several places of a command: what was there is there, and nothing is beside it."""
    out = tmp_path / "out"
    make_old(run, name, out)
    before = held(tmp_path)
    for limit in limits:
        capsys.readouterr()
        with largest_file(limit):
            code = run(name, out, *(("--force",) if name in ("export", "fit", "profile") else ()))
        assert "error: A file would be larger than is allowed here." in capsys.readouterr().err, limit
        assert code == 2
        assert held(tmp_path) == before
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_no_room_for_temporary_files(format: str, made: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Python tries to write four bytes to each directory that it knows."""
    if format == "gguf":
        monkeypatch.setattr("lora_drop_export.checkpoint.open.gguf_reader", lambda _: tempfile.gettempdir())
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(tempfile, "tempdir", None)  # what it has found so far
    command = ["--model", file, "--out", tmp_path / "out"]
    main = lora_drop_export.cli.main
    if format == "safetensors":
        command = ["fit", made / "model", "--text", made / "words", "--out", tmp_path / "out", *FIT]
        main = lora_drop_tools.cli.main
    with largest_file(0):
        assert main([str(argument) for argument in command]) == 2
    printed = capsys.readouterr().err
    assert "error: There is no room for temporary files.\nNote: " in printed
    assert "TMPDIR" in printed
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(("name", "words"), [("compare", "prefill"), ("eval", "perplexity"), ("bench", "tokens/s")])
def test_tables_of_what_no_disk_takes(run: Run, name: str, words: str, capsys) -> None:
    """What was measured is told, and the table of `compare` stands on standard error."""
    assert run(name, Path("/dev/full")) == 2
    printed = capsys.readouterr()
    table = printed.err if name == "compare" else printed.out
    assert words in table
    assert "error: The results cannot be written.\nNote: /dev/full: No space left on device." in printed.err


def test_results_that_eval_keeps(run: Run, tmp_path: Path, capsys) -> None:
    """Those that were kept stay, and it goes on from there."""
    with largest_file(400):
        assert run("eval", tmp_path / "json", "--out", tmp_path / "kept", "--windows", 4) == 2
    assert "error: The results cannot be kept." in capsys.readouterr().err
    assert run("eval", tmp_path / "json", "--out", tmp_path / "kept", "--windows", 4) == 0


# ── a fit that is taken up again ───────────────────────────────────────────────────────────────────────────────


def test_a_forced_fit_goes_on_by_resume(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    """Without --force once more; before that the old adapters are at --out."""
    out = tmp_path / "out"
    make_old(run, "fit", out)
    old = held(out)
    options = ("--rank", 3, "--steps", 3)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("fit", out, *options, "--force") == 130
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert held(out) == old
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial"]
    assert run("fit", out, *options, "--resume") == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    assert os.listdir(tmp_path) == ["out"]


def test_a_user_s_directory_where_an_unfinished_fit_would_be(run: Run, tmp_path: Path, capsys) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "settings.json").write_text('{"mine": 1}')
    before = held(tmp_path)
    assert run("fit", tmp_path / "out", "--steps", 1, "--force") == 2
    assert "will not replace it" in capsys.readouterr().err
    assert held(tmp_path) == before


# ── every byte is looked at ────────────────────────────────────────────────────────────────────────────────────


def test_a_flipped_byte_in_any_file(run: Run, tmp_path: Path, capsys) -> None:
    """At the beginning, in the middle, at the end; a checkpoint that was copied, one that was linked."""
    for mode in ("copy", "link"):
        out = tmp_path / mode
        assert run("export", out, "--weights", mode) == 0
        with Session.open(out, check=True, threads=1):
            pass
    shutil.copytree(tmp_path / "link", tmp_path / "out")  # its weights are the checkpoint's own no more
    for out in (tmp_path / "copy", tmp_path / "out"):
        for name, record in Bundle.open(out).manifest.files.items():
            whole = (out / name).read_bytes()
            for position in {0, record.size_bytes // 2, record.size_bytes - 1}:
                data = bytearray(whole)
                data[position] ^= 1
                (out / name).write_bytes(data)
                with pytest.raises(BundleError, match=f"{name} does not have the recorded hash"):
                    Session.open(out, check=True)
                assert Bundle.open(out).check_hashes() == [name]
            capsys.readouterr()
            assert lora_drop_tools.cli.main(["inspect", str(out), "--check"]) == 2
            assert f"{name} does not have the recorded hash" in capsys.readouterr().err
            (out / name).write_bytes(whole)
    assert lora_drop_tools.cli.main(["inspect", str(tmp_path / "out"), "--check"]) == 0

"""Commands on closed and full streams, narrow terminals and names that are no text: exit codes, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lora_drop_runtime.command_line import run_command

from tests.support.bundles import record_again
from tests.support.tokenizers import character_tokenizer

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("", "runtime", "tools"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    from tests.support.bundles import make_bundle

    return make_bundle("llama", tmp_path_factory.mktemp("streams") / "bundle", drop_ratio=0.5).root


def shell(line: str, bundle: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of bash; `$RUN` is `lora-drop`, `$EXPORT` is `lora-drop-export`, `$B` a bundle."""
    names = {"RUN": f"{sys.executable} -m lora_drop_tools", "EXPORT": f"{sys.executable} -m lora_drop_export"}
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": PATHS, "B": str(bundle), **names, **environment}
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment, cwd="/", timeout=600)
    assert b"Traceback" not in done.stderr, done.stderr
    assert b"Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("$RUN inspect $B >/dev/full", 2, b"No space left on device"),
        ("$RUN inspect $B >/dev/full 2>/dev/full", 2, b""),
        ("$RUN inspect /nowhere 2>/dev/full", 2, b""),
        ("$RUN --help >/dev/full", 2, b"No space left on device"),
        ("$RUN inspect $B >&-", 0, b""),
        ("$RUN inspect /nowhere 2>&-", 2, b""),
        ("$RUN generate $B --prompt-file - <&-", 2, b"no tokenizer"),
        ("$RUN inspect $'/tmp/\\xff'", 2, b"no bundle here"),
        ("$RUN inspect $B | exec 0<&-; exit ${PIPESTATUS[0]}", 141, b""),
        ("$RUN compare $B --threads 1 2>/dev/full", 0, b""),
        ("$RUN compare $B --threads 1 2>&1 >/dev/null | exec 0<&-; exit ${PIPESTATUS[0]}", 0, b""),
    ],
)
def test_streams_and_names(bundle, line, code, words) -> None:
    done = shell(line, bundle)
    assert done.returncode == code, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("command", ["$RUN inspect ../b", "$EXPORT --model here --out there"])
def test_a_working_directory_that_was_removed(bundle, tmp_path, command) -> None:
    done = shell(f"cd {tmp_path} && cp -r $B b && mkdir gone && cd gone && rmdir ../gone && {command}", bundle)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: The current directory does not exist any more.\nNote: ")
    assert b"\nHint: " in done.stderr


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "$EXPORT --help"),
        ({"PYTHONIOENCODING": "latin-1"}, "$RUN eval --help"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "$RUN eval --help"),
    ],
)  # fmt: skip
def test_narrow_terminals(bundle, environment, line) -> None:
    """What is known has a likeness, and the columns stay."""
    printed = shell("$RUN inspect $B", bundle, **environment).stdout.decode("latin-1")
    assert "# kept" in printed
    assert "rho 0.50" in printed
    assert "K/V full -> LoRA-Drop" in printed
    assert shell(line, bundle, **environment).returncode == 0


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("lora_drop_tools", "numpy"),
        ("lora_drop_tools", "lora_drop_runtime.errors"),
        ("lora_drop_export", "argparse"),
        ("lora_drop_export", "lora_drop_runtime.errors"),
    ],
)
def test_ctrl_c_while_packages_are_imported(bundle, package, module) -> None:
    """What the commands' scripts do, with Ctrl-C at the import of a module."""
    code = (
        "import sys, importlib.abc\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"from {package}.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = shell(f"{sys.executable} -c '{code.replace(chr(39), chr(34))}'", bundle)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize("ignored", [False, True], ids=["told", "ignored"])
def test_sigterm_while_packages_are_imported(ignored) -> None:
    """The first process of a container gets the signal only where it has a handler: 143 is an exit code here, and not
    what a shell says of a process that the system ended."""
    code = (
        "import importlib.abc, os, signal, sys\n"
        f"signal.signal(signal.SIGTERM, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "class Ended(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        '        if name == "numpy": os.kill(os.getpid(), signal.SIGTERM)\n'
        "sys.meta_path.insert(0, Ended())\n"
        "from lora_drop_tools.__main__ import main\n"
        'sys.argv[1:] = ["--version"]\n'
        "sys.exit(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd="/", timeout=600)
    assert (done.returncode, done.stderr) == (0 if ignored else 143, b"")


def test_lines_of_both_streams_stand_in_their_order() -> None:
    """In one pipe, as a log's; a reply's end stood behind what was said of it."""
    say = "lambda _: [print(n, file=(sys.stdout, sys.stderr)[n % 2]) for n in range(4)]"
    code = f"import sys; from lora_drop_runtime.command_line import run_command; run_command({say}, [])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PYTHONPATH": PATHS},
        timeout=600,
    )
    assert done.stdout.split() == [b"0", b"1", b"2", b"3"]


def test_functions_have_the_names_of_their_modules() -> None:
    """Also once the modules are imported."""
    import lora_drop_tools
    import lora_drop_tools.bench.bench

    assert lora_drop_tools.bench is sys.modules["lora_drop_tools.bench.bench"].bench
    assert lora_drop_tools.inspect is sys.modules["lora_drop_tools.inspect"].inspect
    assert {name for name in lora_drop_tools.__all__ if not hasattr(lora_drop_tools, name)} == set()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied", "x")]
)
def test_what_the_system_refuses(capsys, error) -> None:
    def fail(_: object) -> None:
        raise error

    assert run_command(fail, []) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: The system refuses to read or write.\nNote: ")
    assert f"{error.strerror}.\nHint: " in printed


def test_pipes_of_windows_are_utf8(monkeypatch) -> None:
    """Their code page has no Chinese, and other letters at places of its own."""
    told = "Grüße, 中文\n"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(told.encode()), "cp1252"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    for _ in range(2):  # the second finds them read from and written to
        assert run_command(lambda _: print(sys.stdin.read(), end=""), []) == 0
    assert sys.stdout.buffer.getvalue().decode() == told


def test_the_demo_prints_into_any_pipe(tmp_path) -> None:
    """Its table has ρ, which Windows' code pages lack; it comes after minutes."""
    (tmp_path / "fetch_model.py").write_text("import sys\ndef fetch_model(to): print('ρ'); sys.exit(7)\n", "utf-8")
    code = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path(sys.argv[1], run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": PATHS, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", code, str(ROOT / "examples" / "demo.py")]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 7, done.stderr
    assert done.stdout


def test_a_reader_that_went_away_on_windows(monkeypatch) -> None:
    """Which says «Invalid argument» of that, and of much else."""

    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(OSError, match="Invalid argument"):
        run_command(fail, [])
    monkeypatch.setattr(sys.stdout, "flush", fail)
    assert run_command(lambda _: print("gone"), []) == 141


def test_too_little_memory(capsys) -> None:
    def fail(_: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    assert run_command(fail, []) == 2
    assert "too little memory" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), FileNotFoundError(2, "x", "y")])
def test_a_bug_of_ours_is_seen(error) -> None:
    """It is not dressed up as an error of the user's."""

    def fail(_: object) -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(fail, [])


@pytest.mark.parametrize("pasted", [False, True])
def test_a_long_question_is_typed_whole(bundle, tmp_path, pasted) -> None:
    """A terminal's own lines end after 4095 bytes; a text of several lines that is pasted is one question."""
    pty, readline = pytest.importorskip("pty"), pytest.importorskip("readline")
    if pasted and "GNU" not in readline.__doc__:
        pytest.skip("libedit takes the lines of a pasted text one by one")
    root = shutil.copytree(bundle, tmp_path / "b")
    character_tokenizer(root)
    (root / "tokenizer/chat_template.jinja").write_text("{{ messages[-1]['content'] }}", encoding="utf-8")
    record_again(root)
    ours, theirs = pty.openpty()
    question = b"\x1b[200~" + b"a b\n" * 1100 + b"\x1b[201~" if pasted else b"a b " * 1100
    command = [sys.executable, "-m", "lora_drop_tools", "chat", str(root), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": PATHS, "TERM": "xterm", "INPUTRC": os.devnull}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        printed = b""
        while not printed.endswith(b"> "):
            printed += os.read(ours, 1)
        threading.Thread(target=os.write, args=(ours, question + b"\r"), daemon=True).start()
        printed = b""
        while b"Hint: " not in printed and b"\n> " not in printed:
            printed += os.read(ours, 4096)
        running.kill()  # a signal that comes just before readline waits is kept until a key
    os.close(ours)
    assert b"Note: It has 4400 tokens" in printed

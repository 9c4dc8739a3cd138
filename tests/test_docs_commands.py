"""The commands that README and docs/tools.md show work as they stand there, one after the other, and what the pages say
of the Python interface and of options is so.

A tiny model stands in for the named one; the commands that would take minutes of a real one get smaller sizes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lora_drop_runtime import Batch, Session
from lora_drop_tools.cli import main as lora_drop

from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main as lora_drop_export
from tests.support.bundles import make_bundle, save_adapters, traced_once
from tests.support.tokenizers import with_tokenizer

ROOT = Path(__file__).parents[1]
NAMED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "MODEL")
SMALLER = {
    "profile": "--tokens 512 --sensitivity-tokens 256 --rankings sensitivity",
    "fit": "--closed-form-tokens 1024 --steps 2",
    "eval": "--windows 2",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def commands_of(page: str, heading: str) -> list[list[str]]:
    """The words of each command in the first block of code under a heading."""
    section = (ROOT / page).read_text().split(f"## {heading}\n", 1)[1]
    block = re.search(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert block
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lora-drop")]


def run(words: list[str], model: Path) -> int:
    words = [str(model) if word in NAMED else word for word in words]
    if words[0] == "lora-drop-export":
        return lora_drop_export(words[1:])
    assert words[0] == "lora-drop"
    return lora_drop([*words[1:], *SMALLER.get(words[1], "").split()])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = with_tokenizer("llama", tmp_path_factory.mktemp("model"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.mark.usefixtures("no_figures")
def test_readme_and_tools(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traced = traced_once("llama", open_checkpoint(str(model), tmp_path / "scratch"), "float32")
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_: traced)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("t1 t2\n"))  # for `chat`
    for name in ("train.txt", "held-out.txt"):
        Path(name).write_text(" ".join(f"t{i * i % 127}" for i in range(6000)), encoding="utf-8")
    commands = commands_of("README.md", "Use it") + commands_of("docs/tools.md", "Better text in four commands")
    assert [words[1] for words in commands if words[0] == "lora-drop"] == [
        "generate",
        "chat",
        "profile",
        "fit",
        "eval",
    ]
    for words in commands:
        code = run(words, model)
        assert code == 0, (words, capsys.readouterr().err)


def test_lines_are_as_long_as_a_reader_wants() -> None:
    """But those of tables and commands, and a link alone."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        long = [line for line in text.splitlines() if len(line) > 120 and line[0] != "|" and " " in line.strip()]
        assert not long, page


def test_sessions_and_batches_are_opened_as_the_pages_say() -> None:
    found = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name, method, given in re.findall(r"\b(Session|Batch)(\.open)?\(([^()]*=[^()]*)\)", page.read_text()):
            known = inspect.signature({"Session": Session, "Batch": Batch}[name].open).parameters
            assert method, f"{page.name}: {name}({given}) lacks what open finds"
            assert set(re.findall(r"(\w+)=", given)) <= set(known), f"{page.name}: {name}.open({given})"
            found += 1
    assert found > 5


def test_what_a_session_does_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle("llama", tmp_path / "engines", rank=4)
    described = bundle.manifest.model
    save_adapters(tmp_path / "adapters", bundle.manifest.plan, described.hidden_size, described.fingerprint)
    section = (ROOT / "docs/run.md").read_text(encoding="utf-8").split("## Python\n", 1)[1]
    block = re.search(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert block
    monkeypatch.chdir(tmp_path)
    ids = {"prompt_ids": [7, 3], "ids_a": [7, 3], "ids_b": [11]}
    arrays = {"input_ids": np.array([[7, 3]]), "lengths": np.array([2]), "token_ids": np.array([5])}
    exec(block[1], ids | arrays)


@pytest.mark.parametrize(
    ("page", "main", "words"),
    [
        ("export.md", lora_drop_export, ()),
        ("run.md", lora_drop, ("generate",)),
        ("run.md", lora_drop, ("chat",)),
        ("serving.md", lora_drop, ("serve",)),
    ],
)
def test_every_option_has_a_row(
    page: str, main: Callable[[list[str]], int], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        main([*words, "--help"])
    options = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--version"}
    rows = re.findall(r"^\| (`--.*?) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert options
    assert options <= {name for row in rows for name in re.findall(r"--[\w-]+", row)}

"""Any command line ends in success, in an error of three parts, or in the work that it asks for: every option of every
command with values that nobody meant.

The work itself is replaced by a sentinel, so that what runs is parsing and checking alone. A refusal changes nothing on
disk; what a command keeps before its work, such as the file of `eval --out`, is there only when all checks are passed.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lora_drop_tools.cli
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lora_drop_runtime.command_line import given_path

import lora_drop_export.cli
from tests.refusals.conftest import PARTS, snapshot
from tests.support.bundles import save_adapters
from tests.support.models import SIZES

CASES = 350
HEALTH = list(HealthCheck)  # nothing is drawn slowly here, whatever the machine


class Passed(BaseException):
    """All checks are passed: the work would begin."""


def passed(*_: object, **__: object) -> None:
    raise Passed


WORK = (  # what takes seconds, or a machine
    "lora_drop_export.compiler.export.trace",
    "lora_drop_export.compiler.add_target.build_target",
    "lora_drop_export.decoder.loaded.resolve_tensors",
    "lora_drop_export.check.verify.reference_of",
    "lora_drop_runtime.decoding.opening.open_engine",
    "lora_drop_tools.shared.machine.read_bandwidth",
)


def commands() -> dict[str, tuple[Callable[[list[str]], int], argparse.ArgumentParser]]:
    """Name → main function and parser; `export` for the one that has no name of its own."""
    found = {"export": (lora_drop_export.cli.main, lora_drop_export.cli._parser())}
    parser = lora_drop_tools.cli._parser()
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    ours = {name: own for name, own in subparsers.choices.items() if name != lora_drop_tools.cli.HARNESS}
    return found | {name: (lora_drop_tools.cli.main, own) for name, own in ours.items()}


COMMANDS = commands()
OPTIONS = {
    name: [action for action in parser._actions if action.option_strings] for name, (_, parser) in COMMANDS.items()
}
NEEDED = {  # a command line that passes
    "export": ["--model", "model", "--out", "out"],
    "generate": ["bundle", "--prompt", "t1 t2", "--max-new-tokens", "8"],
    "chat": ["bundle", "--max-new-tokens", "8"],
    "serve": ["bundle", "--port", "0"],
    "inspect": ["bundle"],
    "compare": ["bundle"],
    "bench": ["bundle", "--new-tokens", "16"],
    "eval": ["bundle", "--text", "text.txt", "--window", "24", "--prompt", "8"],
    "profile": ["model", "--text", "text.txt", "--out", "out", "--window", "32", "--tokens", "64",
                "--sensitivity-tokens", "32"],
    "fit": ["model", "--text", "text.txt", "--out", "out", "--window", "32"],
}  # fmt: skip
NUMBERS = [
    *("0", "1", "3", "-1", "65", "4097", "99999999", "3000000000", "9" * 400, "-" + "9" * 400, "1e400", "0.5", "-0.0"),
    *("1e-320", "nan", "inf", "-inf", "0x10", "1_0", "٣", "1.5.5", "4,5", "4,,5", "4,4", ",", "3,-1", "1,nan"),
]
PATHS = [
    *(".", "..", "model", "bundle", "adapters", "list.json", "text.txt", "latin.txt", "empty", "nope", "nope/at/all"),
    *("text.txt/x", "bundle/lora_drop.json", "/dev/null", "/dev/null/x", "/proc/nope/x", "a" * 300, "~", "-", "out"),
    *("~nobody/x", "Ünïcode 🦙", "\udcff", "model\n"),
]
WORDS = [
    *("", " ", "x", "ort", "none", "tensorrt", "tensorrt-rtx", "int4", "bf16", "copy", "link", "cpu", "cuda", "meta"),
    *("cuda:99", "skip", "backfill", "skip,backfill", "skip,skip", "anchor", "attn_mlp", "piqa", "piqa,piqa", "8.6"),
    *("llama.cpp", "llama.cpp=/bin/sh", "temporal", "--", "--help", "a=b", "%s", "{}"),
]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(PATHS), st.sampled_from(WORDS), TEXT)

KINDS: dict[Any, Any] = {int: NUMBERS, float: NUMBERS, given_path: PATHS}  # what reads an option → what it may mean


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str]]:
    """A command and its arguments: what it needs, or not, and some of its options."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    line = list(NEEDED[name]) if draw(st.integers(0, 9)) else draw(st.lists(VALUES, max_size=2))
    for action in draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=4)):
        flag = draw(st.sampled_from(action.option_strings))
        if action.nargs == 0:
            line.append(flag)
            continue
        kind = KINDS.get(action.type)
        value = draw(VALUES if kind is None or draw(st.booleans()) else st.sampled_from(kind))
        if action.choices and draw(st.booleans()):
            value = draw(st.sampled_from([str(choice) for choice in action.choices]))
        line += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    if not draw(st.integers(0, 9)):
        line.insert(draw(st.integers(0, len(line))), draw(st.sampled_from(["--", "extra", "-z", "--no-such", "-"])))
    return name, line


@pytest.fixture(scope="module")
def work(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with what the command lines name, the current one; the work of all commands is replaced."""
    from lora_drop_runtime.bundle.bundle import Bundle

    work = tmp_path_factory.mktemp("work")
    shutil.copytree(place / "model", work / "model")
    shutil.copytree(place / "bundle", work / "bundle")
    manifest = Bundle.open(place / "bundle").manifest
    save_adapters(work / "adapters", manifest.plan, SIZES["hidden_size"], manifest.model.fingerprint)
    (work / "list.json").write_text(json.dumps({"drop_layers": [4, 6]}))
    (work / "text.txt").write_text(" ".join(f"t{i % 100}" for i in range(2000)))
    (work / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (work / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in WORK:
            patch.setattr(name, passed)
        catalogue = importlib.import_module("lora_drop_tools.eval.tasks.catalogue")
        patch.setattr(catalogue, "_manager", lambda *_: SimpleNamespace(task_index={}))  # lm-eval's takes seconds
        patch.setattr("torch.set_num_threads", lambda threads: None)
        patch.setattr("huggingface_hub.snapshot_download", absent)
        patch.chdir(work)
        yield work


def absent(*_: object, **__: object) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("offline")


def put_back(work: Path, before: dict[str, Any]) -> None:
    """Remove what came since."""
    for path in sorted(work.rglob("*"), reverse=True):
        if str(path.relative_to(work)) not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def end_of(work: Path, before: dict[str, Any], name: str, line: list[str]) -> int | None:
    """A command's exit code, None where its work would have begun; fails where it ends in another way."""
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("t1 t2"))
        patch.setattr("sys.stdout", printed)
        patch.setattr("sys.stderr", errors)
        try:
            code = COMMANDS[name][0](line if name == "export" else [name, *line])
        except Passed:
            put_back(work, before)
            before.update(snapshot(work))  # directories and files that it has touched
            return None
        except SystemExit as ended:  # --help and --version
            code = int(ended.code or 0)
    said = errors.getvalue()
    assert code == 0 or (code == 2 and PARTS.search(said)), said
    assert snapshot(work) == before
    return code


def test_any_command_line(work: Path) -> None:
    ends, before = Counter[str](), snapshot(work)

    @settings(max_examples=CASES, derandomize=True, deadline=None, database=None, suppress_health_check=HEALTH)
    @given(command_lines())
    @example(("export", [*NEEDED["export"], "--threads", "99999999"]))
    @example(("export", [*NEEDED["export"], "--out", "a" * 300]))
    @example(("export", [*NEEDED["export"], "--drop-list", "model\n"]))
    @example(("export", ["--model=--", "--out", "out"]))
    @example(("inspect", ["a" * 300]))
    @example(("export", ["--out", "bundle", "--add-target", "tensorrt-rtx"]))
    @example(("generate", ["bundle", "--prompt", "\udcff"]))
    @example(("bench", [*NEEDED["bench"], "--model", "model"]))
    @example(("bench", [*NEEDED["bench"], "--provider="]))
    @example(("eval", [*NEEDED["eval"], "--out", "results", "--text", "list.json"]))
    @example(("fit", [*NEEDED["fit"], "--device", "meta"]))
    def run(case: tuple[str, list[str]]) -> None:
        ends[f"{case[0]} {end_of(work, before, *case)}"] += 1

    run()
    assert ends.total() >= CASES
    for name in COMMANDS:  # each was refused some of them, and passed with others
        assert ends[f"{name} 2"], ends
        assert ends[f"{name} None"] or name == "inspect", ends

"""What the packages need and export, each time in a fresh interpreter.

The runtime and its commands work where none of the exporter's packages is installed; the exporter's commands then say
which extra is missing.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.text import TextCodec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.support.bundles import make_bundle, record_again

ROOT = Path(__file__).parents[2]
# What these tests stand beside, also in a second clone, whose packages are not the installed ones
TREE = os.pathsep.join(str(ROOT / part) for part in (".", "runtime", "tools"))
EXPORT_ONLY = (
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnx_graphsurgeon",
    "polygraphy",
    "ml_dtypes",
    "rich",
    "huggingface_hub",
)
PROMPTS = ["Hello world", "The quick"]

# As if the packages were not installed: no finder finds them
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

BLOCKED = {blocked!r}
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def python(code: str, *arguments: object, blocked: tuple[str, ...] = EXPORT_ONLY) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter where some packages are missing and warnings are errors."""
    source = WITHOUT.replace("{blocked!r}", repr(blocked)) + code
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={"PYTHONPATH": TREE, "PYTHONIOENCODING": "utf-8", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        cwd="/",
        timeout=600,
    )


def printed(code: str, *arguments: object, blocked: tuple[str, ...] = EXPORT_ONLY) -> str:
    done = python(code, *arguments, blocked=blocked)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with a tokenizer that has exactly the model's 131 tokens."""
    root = make_bundle("llama", tmp_path_factory.mktemp("imports") / "bundle", drop_ratio=0.5).root
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=131,
        initial_alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ"],  # printable ASCII, space, newline
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello world, the quick brown fox jumps over the lazy dog. " * 9] * 9, trainer)
    assert tokenizer.get_vocab_size() == 131
    (root / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    (root / "tokenizer" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    )
    record_again(root)
    return root


def continued(bundle: Path, prompts: list[str]) -> list[str]:
    """The texts that the session gives here, where every package is installed."""
    codec = TextCodec.open(bundle / "tokenizer")
    with Session.open(bundle, threads=1) as session:
        return [codec.decode(row) for row in session.generate([codec.encode(p) for p in prompts], 8)]


# ── the runtime alone ──────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = """
import lora_drop_runtime, sys
before = set(sys.modules)
import lora_drop_tools, lora_drop_tools.cli, lora_drop_export, lora_drop_export.cli
roots = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
print(*sorted(roots - {"__main__"}))
"""
    found = set(printed(code, blocked=()).split())
    assert {"lora_drop_runtime", "lora_drop_tools", "lora_drop_export", "numpy"} <= found
    assert not found & {"onnxruntime", "tokenizers", "jinja2", "fastapi", "uvicorn", *EXPORT_ONLY}


def test_evaluate_is_read_where_a_task_asks_for_it(tmp_path: Path) -> None:
    """The real one takes seconds, since it imports transformers."""
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/__init__.py").write_text("from .loading import load\nprint('read')")
    (tmp_path / "evaluate/loading.py").write_text("def load(path):\n    return path")
    code = """
sys.path.insert(0, sys.argv[1])
from lora_drop_tools.eval.tasks.code_eval import CODE_EVAL, replaced
with replaced():
    print("nothing was asked")
assert "evaluate" not in sys.modules
for _ in range(2):
    with replaced():
        import evaluate
        assert evaluate.load("code_eval") is CODE_EVAL
        assert evaluate.load("another") == "another"
    assert evaluate.load("code_eval") == "code_eval"
"""
    assert printed(code, tmp_path, blocked=()) == "nothing was asked\nread\n"


def test_importing_the_runtime_starts_nothing() -> None:
    code = """
import os, sys, threading
environment = dict(os.environ)
import lora_drop_runtime
assert "onnxruntime" not in sys.modules
assert threading.active_count() == 1
assert dict(os.environ) == environment
print("ok")
"""
    done = python(code)
    assert (done.stdout, done.stderr) == ("ok\n", "")


def test_generate_without_the_exporters_packages(bundle: Path) -> None:
    code = """
import io, json
import lora_drop_runtime, lora_drop_tools
from lora_drop_tools.cli import main
out = io.StringIO()
settings = lora_drop_tools.GenerateSettings(max_new_tokens=8, threads=1)
one = lora_drop_tools.generate(sys.argv[1], sys.argv[2], settings, out=out)
batch = lora_drop_tools.generate(sys.argv[1], sys.argv[2:], settings, out=io.StringIO())
chat = lora_drop_tools.generate(sys.argv[1], [sys.argv[2]], settings, chat=True, out=io.StringIO())
lora_drop_tools.inspect(sys.argv[1], check=True, out=io.StringIO())
with lora_drop_runtime.Session.open(sys.argv[1], threads=1) as session:
    tokens = list(session.stream([1, 2, 3], 5))
found = sorted({name.partition(".")[0] for name in sys.modules} & set(BLOCKED))
texts = [completion.text for completion in one + batch + chat]
print(json.dumps([out.getvalue(), texts, len(tokens), found]))
"""
    streamed, texts, count, found = json.loads(printed(code, bundle, *PROMPTS).splitlines()[-1])
    expected = continued(bundle, PROMPTS)
    asked = continued(bundle, [f"<|start|>{PROMPTS[0]}<|end|>"])
    assert streamed == expected[0] + "\n"
    assert texts == [expected[0], *expected, *asked]
    assert all(expected)
    assert count == 5
    assert found == []


def test_commands_without_the_exporters_packages(bundle: Path) -> None:
    code = "from lora_drop_tools.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = python(code, "generate", bundle, "--prompt", PROMPTS[0], "--max-new-tokens", 8, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout == continued(bundle, PROMPTS[:1])[0] + "\n"
    assert "8 tokens in" in done.stderr
    assert "inspect" in printed("import lora_drop_tools.cli\n" + code, "--help")


# ── the exporter's commands ────────────────────────────────────────────────────────────────────────────────────

EXPORT = "from lora_drop_export.cli import main\nsys.exit(main(sys.argv[1:]))"
COMPARE = "from lora_drop_tools.cli import main\nsys.exit(main(sys.argv[1:]))"
# One after the other in one interpreter, which has imported none of them in between
EACH = """
for BLOCKED in [BLOCKED, *((name,) for name in ("torch", "transformers", "onnx", "polygraphy", "rich"))]:
    assert main(sys.argv[1:]) == 2
    assert not [name for name in BLOCKED if name in sys.modules]
    print(*BLOCKED, file=sys.stderr)
"""


def assert_names_the_extra(command: str, *arguments: object) -> None:
    """Where all packages are missing, and where only one is, which is found out before minutes of work."""
    done = python(command.replace("sys.exit(main(sys.argv[1:]))", EACH), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert len(said) == 4 * 6
    for fact, note, hint, blocked in zip(*(said[part::4] for part in range(4)), strict=True):
        assert fact == "error: The exporter's packages are not installed."
        assert note.removeprefix("Note: ").split()[0] in blocked.split()
        assert "is missing" in note
        assert hint == "Hint: pip install 'lora-drop-export[export]'"


def test_export_without_its_packages(tmp_path: Path) -> None:
    assert_names_the_extra(EXPORT, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_compare_without_its_packages(bundle: Path) -> None:
    assert_names_the_extra(COMPARE, "compare", bundle)


# Where its package says that it is installed, the message is that it does not work
NO_ENGINE = ("onnxruntime",)


def test_commands_without_onnx_runtime(bundle: Path, tmp_path: Path) -> None:
    """Before the work: the checkpoint, which is not there either, has not been looked for."""
    commands = (
        (COMPARE, "generate", bundle, "--prompt", "Hello"),
        (EXPORT, "--model", tmp_path / "model", "--out", tmp_path / "out"),
    )
    for command, *arguments in commands:
        done = python(command, *arguments, blocked=NO_ENGINE)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        fact, note, hint = done.stderr.splitlines()
        assert fact == "error: The installed ONNX Runtime does not work."
        assert "No module named 'onnxruntime'" in note
        assert "pip install 'lora-drop-export[cpu]'" in hint
    assert list(tmp_path.iterdir()) == []


def test_commands_that_need_no_engine(bundle: Path) -> None:
    done = python(COMPARE, "inspect", bundle, "--check", blocked=NO_ENGINE)
    assert done.returncode == 0, done.stderr


def test_help_needs_none_of_them() -> None:
    assert "--drop-ratio" in printed(EXPORT, "--help")


# ── public names ───────────────────────────────────────────────────────────────────────────────────────────────

PACKAGES = "lora_drop_runtime", "lora_drop_tools", "lora_drop_export"
MODULES = "lora_drop_export.cli", "lora_drop_export.compiler.export", "lora_drop_tools.compare"
# Each in a fork of one interpreter, which has imported of other packages what takes long, and nothing of ours
ALL = """
import importlib, os
import onnx_graphsurgeon, onnx_ir, onnxscript.rewriter, polygraphy.comparator

def check(packages):
    for package in map(importlib.import_module, packages):
        for name in package.__all__:
            value = getattr(package, name)
            assert callable(value), f"{name} is {value!r}"
            assert value.__name__ == name
        namespace = {}
        exec(f"from {package.__name__} import *", namespace)
        assert set(package.__all__) <= set(namespace)
        assert len(package.__all__) == len(set(package.__all__))

packages, modules = (names.split() for names in sys.argv[1:])
assert not [name for name in sys.modules if name.startswith("lora_drop")]
for first in packages + modules:
    if not (child := os.fork()):
        importlib.import_module(first)
        sys.exit(check(packages if first in modules else [first]))
    assert os.waitpid(child, 0)[1] == 0, first
    print(first, flush=True)  # a fork would say it again
"""


def test_all_names_are_there_and_are_what_they_say() -> None:
    """Also where a module of the same name came first: a package's attribute is then the module."""
    assert printed(ALL, " ".join(PACKAGES), " ".join(MODULES), blocked=()).split() == [*PACKAGES, *MODULES]


def test_public_names() -> None:
    names = {
        "lora_drop_runtime": "Batch BundleError Constraint DropPlan EntropySchedule Event InputError LastLogits "
        "LoraDropError MarginSchedule ModelError NoDeviceError PeriodicSchedule PlanError SamplingOptions Schedule "
        "Session StepKind VerificationError",
        "lora_drop_tools": "BenchSettings ChatSettings CompareSettings EvalSettings FitSettings GenerateSettings "
        "ProfileSettings ServeSettings bench calibrate chat compare eval fit generate inspect profile reproduce serve",
        "lora_drop_export": "BuilderOptions ExportOptions add_target export",
    }
    for package, expected in names.items():
        assert sorted(importlib.import_module(package).__all__) == expected.split()

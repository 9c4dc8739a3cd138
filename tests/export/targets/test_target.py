"""A toy target: a row in the table of targets, a class in the manifest, an engine, and nothing else has to know it."""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime
import pytest
from lora_drop_runtime import Session, StepKind
from lora_drop_runtime.bundle import manifest as manifests
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, OtherEntry, TargetEntry
from lora_drop_runtime.engines.engine import copy_arrays
from lora_drop_runtime.engines.open import ENGINES
from lora_drop_runtime.errors import BundleError, InputError
from lora_drop_tools.inspect import describe

import lora_drop_export
from lora_drop_export.cli import main
from lora_drop_export.compiler.add_target import add_target
from lora_drop_export.compiler.options import ExportOptions
from lora_drop_export.targets import target as table
from tests.support.bundles import PROMPTS, family, make_bundle

STEPS = ("refresh", "lora")


@dataclass(frozen=True)
class ToyEntry(TargetEntry):
    graphs: tuple[str, ...]
    colour: str | None = None

    def resident(self, stored_bytes: int) -> tuple[int, str]:
        return 2 * stored_bytes, "the weights, once for each step"


class ToyTarget:
    """Runs the neutral graphs as they are."""

    name = "toy"
    what = "the neutral graphs"
    quantized_weights = ()
    quantized_dtypes = ()
    symmetric_weights = False
    channel_weights = True
    cache_dtypes = MappingProxyType({"int8": ("float32",)})
    scales_per_head = False

    def check(self, options, targets):
        if self.name in targets and options.threads == 13:
            raise InputError("The toy does not like 13 threads.", note="13 were given.", hint="Use 12.")

    def check_caches(self, caches, options):
        pass

    def check_dtype(self, dtype, weights, options):
        pass

    def takes_kept(self, form):
        return False

    def dtype(self, of_checkpoint):
        return "float16"

    def build(self, root, manifest, graphs, options, console, earlier):
        files = [f"toy/{kind}.onnx" for kind in STEPS]
        for (kind, proto), file in zip(graphs.items(), files, strict=True):
            assert file == f"toy/{kind.value}.onnx"
            (root / file).write_bytes(proto.SerializeToString())
        return ToyEntry(tuple(files), None if earlier is None else "green")

    def provider(self, dtype):
        return None

    def runs_on_cpu(self, entry, dtype):
        return False


class ToyEngine:
    """The runtime's `Engine` over ToyEntry's graphs: numpy arrays in, numpy arrays out, a copy each."""

    target = "toy"
    chooses_tokens = batched_chunks = idle_rows = warms_up = runs_cycles = False
    block_slots = None
    many_requests = True
    prefill_chunk = None
    verified_tokens = None

    def __init__(self, bundle: Bundle) -> None:
        entry = bundle.target("toy")[1]
        assert isinstance(entry, ToyEntry)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.root))
        self.sessions = {
            kind: onnxruntime.InferenceSession((bundle.root / file).read_bytes(), options)
            for kind, file in zip((StepKind.REFRESH, StepKind.LORA), entry.graphs, strict=True)
        }

    def slots(self, needed):
        return needed

    def allocate(self, name, shape, dtype):
        return np.zeros(shape, dtype)

    allocate_resident = allocate

    def read(self, buffer):
        return buffer

    def copy(self, source, target, slots):
        copy_arrays(source, target, slots)

    def prepare(self, kind, inputs, outputs):
        def step():
            results = self.sessions[kind].run(list(outputs), inputs)
            for buffer, values in zip(outputs.values(), results, strict=True):
                buffer[...] = values

        return step

    def beside(self):
        return self

    def notes(self):
        return []

    def close(self):
        self.sessions.clear()


@pytest.fixture
def toy(monkeypatch):
    """The three places where a target is told: its row, its entry, its engine."""
    monkeypatch.setitem(table.TARGETS, "toy", ToyTarget())
    monkeypatch.setitem(manifests.ENTRIES, "toy", ToyEntry)
    monkeypatch.setitem(ENGINES, "toy", lambda bundle, *_: ToyEngine(bundle))


@pytest.fixture
def traced(monkeypatch):
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: family("llama").traced)


def entry_in_json(root: Path) -> object:
    return json.loads((root / MANIFEST_NAME).read_text())["targets"]["toy"]


@pytest.mark.usefixtures("toy", "traced")
def test_a_toy_target_is_exported(tmp_path, capsys):
    """By name, with its own graphs and entry; what has no value is not in the manifest."""
    out = tmp_path / "b"
    command = ["--model", str(family("llama").directory), "--out", str(out), "--max-seq-len", "64"]
    assert main([*command, "--target", "toy", "--dtype", "fp32", "--no-verify"]) == 0
    bundle = Bundle.open(out)
    assert bundle.target(None) == ("toy", ToyEntry(("toy/refresh.onnx", "toy/lora.onnx")))
    assert entry_in_json(out) == {"graphs": ["toy/refresh.onnx", "toy/lora.onnx"]}
    for kind in STEPS:
        assert (out / "toy" / f"{kind}.onnx").read_bytes() == (out / f"{kind}.onnx").read_bytes()
        assert f"toy/{kind}.onnx" in bundle.manifest.files
    printed = capsys.readouterr().out
    assert "dropped layers: 4, 6" in printed
    assert "--prompt" not in printed  # without a tokenizer
    assert any("toy" in line and "the weights, once for each step" in line for line in describe(bundle))
    assert bundle.check_hashes() == []


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("options", [{}, {"surrogate": "recurrent", "rank": 2}])
def test_a_toy_target_is_verified_and_runs(options, tmp_path):
    """The verification opens it as any other target; its tokens are those of ONNX Runtime's."""
    made = make_bundle("llama", tmp_path / "b", max_seq_len=64, **options)
    added = add_target(made.root, ["toy"])
    assert added.manifest.verification["toy"]["status"] == "passed"
    assert {result["target"] for result in json.loads((made.root / "verify.json").read_text())} == {"toy"}
    tokens = []
    for target in ("ort", "toy"):
        with Session.open(made.root, target=target) as session:
            tokens.append([row.tolist() for row in session.generate(PROMPTS, 11, stop_token_ids=())])
    assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("toy")
def test_a_toy_target_is_added(tmp_path):
    made = make_bundle("llama", tmp_path / "b")
    added = add_target(made.root, ["toy"], ExportOptions(verify=False))
    assert list(added.manifest.targets) == ["ort", "toy"]
    assert entry_in_json(made.root) == {"graphs": ["toy/refresh.onnx", "toy/lora.onnx"], "colour": "green"}
    assert added.manifest.targets["ort"] == made.manifest.targets["ort"]


@pytest.mark.usefixtures("toy", "traced")
def test_its_row_decides_what_is_refused(tmp_path, capsys):
    command = ["--model", str(family("llama").directory), "--out", str(tmp_path / "b"), "--target", "toy"]
    for more, words in (
        (
            ["--dtype", "int4"],
            "The target cannot take int4 weights.\nNote: --dtype int4 works only with ort or openvino or tensorrt or "
            "tensorrt-rtx; toy",
        ),
        (["--threads", "13"], "The toy does not like 13 threads."),
        (["--alias"], "--alias applies only to the attention plugin."),
    ):
        assert main([*command, *more]) == 2
        assert words in capsys.readouterr().err
    ExportOptions(targets=("toy",), kv_dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("toy", "traced")
@pytest.mark.parametrize(
    ("targets", "dtype"), [(("toy",), "float16"), (("toy", "ort"), "float32"), (("none",), "float32")]
)
def test_the_dtype_is_what_the_first_row_of_the_table_wants(targets, dtype):
    from lora_drop_export.compiler.facts import activations_dtype

    found = activations_dtype(family("llama").checkpoint, ExportOptions(targets=targets), quantized=False)
    assert found == dtype


@pytest.mark.parametrize(
    ("targets", "dtype"),
    [(("tensorrt-rtx",), "bfloat16"), (("ort", "tensorrt-rtx"), "float32"), (("none",), "float32")],
)
def test_the_dtype_beside_quantized_weights(targets, dtype):
    """What only the CPU computes in where it is among the targets; a bundle without any may get the CPU's later."""
    from lora_drop_export.compiler.facts import activations_dtype

    source = family("llama").checkpoint
    assert activations_dtype(source, ExportOptions(targets=targets, dtype="int4"), quantized=True) == dtype


def test_a_target_that_this_version_does_not_know_stays_as_it_is(tmp_path):
    """The bundle's other targets can be opened, and changed. One that is built again stays the first, which runs."""
    made = make_bundle("llama", tmp_path / "b")
    data = json.loads((made.root / MANIFEST_NAME).read_text())
    data["targets"]["toy"] = {"graphs": [["a", None], {"b": 1}]}
    (made.root / MANIFEST_NAME).write_text(json.dumps(data))
    opened = Bundle.open(made.root)
    assert isinstance(opened.manifest.targets["toy"], OtherEntry)
    assert json.loads(opened.manifest.to_json()) == data
    again = add_target(made.root, ["ort"], ExportOptions(force=True, verify=False))
    assert list(again.manifest.targets) == ["ort", "toy"]
    assert entry_in_json(made.root) == data["targets"]["toy"]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("damage", [{}, {"graphs": [], "size": 3}, 3, []])
def test_an_entry_that_is_not_its_class_is_damage(tmp_path, damage):
    root = shutil.copytree(make_bundle("llama", tmp_path / "a").root, tmp_path / "b")
    data = json.loads((root / MANIFEST_NAME).read_text())
    data["targets"]["toy"] = damage
    (root / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="manifest is damaged"):
        Bundle.open(root)


def test_nobody_else_asks_which_target_it_is():
    """Outside the targets' own folders no name of a target is compared with anything."""
    package = Path(lora_drop_export.__file__).parent
    files = [file for file in package.rglob("*.py") if "targets" not in file.relative_to(package).parts]
    assert len(files) > 40
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not compared & set(table.TARGETS), f"{file}:{node.lineno}"

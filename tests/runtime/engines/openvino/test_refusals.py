"""What target openvino cannot serve is refused: exit code 2, fact, Note and Hint, and no traceback."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_drop_tools.cli
import onnx
import pytest
import transformers
from lora_drop_runtime import Session
from lora_drop_runtime.engines.openvino import compiled
from lora_drop_runtime.engines.openvino.package import import_openvino
from lora_drop_runtime.errors import BundleError, InputError
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_drop_export.cli
from lora_drop_export.checkpoint.open import open_checkpoint
from tests.support.bundles import Family, make_bundle, record_again
from tests.support.decoding import assert_refused
from tests.support.models import SIZES

from .test_engine import FOUR, TARGETS, with_layers
from .test_formats import PLAN, source

STEPS, WEIGHTS = "openvino/steps.onnx", "weights/model.safetensors"
PARTS = re.compile(r"^error: .+\nNote: .+\nHint: .+\n\Z", re.MULTILINE)
GENERATE = ("--prompt", "t1", "--max-new-tokens", "1")


def with_tokenizer(made_from: Family, place: Path) -> Family:
    """A family whose checkpoint has a tokenizer, for the command line."""
    model = place / "model"
    made_from.model.save_pretrained(model)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    return dataclasses.replace(made_from, directory=model, checkpoint=open_checkpoint(str(model), place / "scratch"))


@pytest.fixture(scope="module")
def made_from(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return with_tokenizer(with_layers(4), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(made_from: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(made_from, tmp_path_factory.mktemp("whole") / "b", targets=TARGETS, rank=2, **FOUR).root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A bundle that the test may damage."""
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command that must be refused, and returns its message."""

    def run(main: Callable[[list[str]], int], *arguments: object, words: tuple[str, ...]) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        message = PARTS.search(said)
        assert message, said
        for word in words:
            assert word in message[0]
        return message[0]

    return run


@pytest.fixture
def generating_refused(refused: Callable[..., str], root: Path) -> Callable[..., str]:
    def run(*words: str, options: tuple[str, ...] = ()) -> str:
        return refused(lora_drop_tools.cli.main, "generate", root, *GENERATE, *options, words=words)

    return run


# ── what is installed ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_bundle_itself_runs(root: Path) -> None:
    assert lora_drop_tools.cli.main(["generate", str(root), *GENERATE]) == 0


def test_no_openvino(generating_refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """The other target of the bundle runs all the same."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    generating_refused("OpenVINO is not installed", "pip install 'lora-drop-export[openvino]'", "--target ort")
    assert lora_drop_tools.cli.main(["generate", str(root), *GENERATE, "--target", "ort"]) == 0


def test_no_openvino_at_the_export(
    refused: Callable[..., str], made_from: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the trace."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: pytest.fail("it was traced"))
    options = "--model", made_from.directory, "--out", tmp_path / "out", "--target", "openvino"
    refused(lora_drop_export.cli.main, *options, words=("OpenVINO is not installed", "--target ort"))
    assert not (tmp_path / "out").exists()


def test_openvino_tells_nobody_that_it_is_used(tmp_path: Path) -> None:
    """With openvino-telemetry beside it, it reports its import, and keeps an identifier in the user's home, unless it
    sees CI. Others may import openvino-telemetry afterwards."""
    code = (
        "import sys; from lora_drop_runtime.engines.openvino.package import import_openvino as get; get().Core()\n"
        "assert 'openvino_telemetry' not in sys.modules; import openvino_telemetry"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_an_uninstalled_package_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("openvino.Core")
    assert_refused(import_openvino, "OpenVINO is not installed, or does not work.", "Core")


@pytest.mark.parametrize("version", ["2026.3.0-1-releases/2026/3", "2026.5.0", "2027.4.1", "2025.4.0", "2024.6.0"])
def test_another_version(version: str, generating_refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvino.__version__", version)
    generating_refused("another version", f"It is {version.split('-')[0]};", "2026.4 or newer", "below 2026.5")


@pytest.mark.parametrize("version", ["2026.4.0-1-releases/2026/4", "2026.4.9"])
def test_versions_that_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvino.__version__", version)
    assert import_openvino().__version__ == version


# ── what is asked for ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_provider(provider: str, generating_refused: Callable[..., str], root: Path) -> None:
    """Whether it is the first target of the bundle or the one that is asked for."""
    for options in ((), ("--target", "openvino")):
        words = "Target openvino takes no execution provider.", repr(provider), "--provider"
        generating_refused(*words, options=("--provider", provider, *options))
    with pytest.raises(InputError, match="no execution provider"):
        Session.open(root, provider=provider)


def test_halves_that_it_does_not_compute_in(
    refused: Callable[..., str], made_from: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the trace."""
    monkeypatch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: pytest.fail("it was traced"))
    options = "--model", made_from.directory, "--out", tmp_path / "out", "--target", "openvino", "--dtype", "fp16"
    refused(lora_drop_export.cli.main, *options, words=("does not compute in that dtype", "float16", "--dtype fp32"))
    assert not (tmp_path / "out").exists()


# ── damaged bundles ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_graph_that_has_changed(generating_refused: Callable[..., str], root: Path) -> None:
    """Of the same size, but not of the recorded hash."""
    content = bytearray((root / STEPS).read_bytes())
    content[len(content) // 2] ^= 1
    (root / STEPS).write_bytes(content)
    generating_refused("A graph of the bundle has changed.", STEPS)


def test_a_graph_of_another_size(generating_refused: Callable[..., str], root: Path) -> None:
    content = (root / STEPS).read_bytes()
    (root / STEPS).write_bytes(content[:-100])
    generating_refused("has the wrong size", STEPS, str(len(content)), str(len(content) - 100))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"\x08\x0bnot a graph",
        lambda content: b"\xff" * 99,
        lambda content: bytes(len(content)),
    ],
    ids=["nothing", "its begin", "half", "all but a byte", "text", "ones", "zeros"],
)
def test_bytes_that_are_no_graph(
    damage: Callable[[bytes], bytes], generating_refused: Callable[..., str], root: Path
) -> None:
    """Recorded as they lie: the bundle was written so."""
    (root / STEPS).write_bytes(damage((root / STEPS).read_bytes()))
    record_again(root)
    generating_refused(STEPS)


def weight_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """In a graph and in the graphs within it."""
    found = []
    for node in graph.node:
        if node.op_type == "Weight":
            found.append(node)
        for attribute in node.attribute:
            found += weight_nodes(attribute.g)
    return found


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"offset": 10**9}, ("reads", "1000000000", "which has")),
        ({"size": 10**9}, ("1000000000", "which has")),
        ({"offset": -8}, ("-8",)),
        ({"size": -8}, ("-8",)),
        ({"size": 4}, (STEPS, "of 4 bytes")),
        ({"location": "../secret"}, ("'../secret'", "not in the manifest")),
        ({"location": "/etc/passwd"}, ("'/etc/passwd'", "not in the manifest")),
        ({"location": "weights/../weights/model.safetensors"}, ("not in the manifest",)),
        ({"shape": [3, 5]}, (STEPS, "[3, 5]")),
        ({"shape": [2**20, 2**20]}, (STEPS, "[1048576, 1048576]")),
        ({"shape": [-1, 5]}, (STEPS, "[-1, 5]")),
        ({"dtype": "float99"}, (STEPS, "float99")),
    ],
    ids=str,
)
def test_weights_that_a_graph_names(
    attributes: dict[str, Any],
    words: tuple[str, ...],
    which: int,
    generating_refused: Callable[..., str],
    root: Path,
) -> None:
    """Beyond their file, in another one, or of another size than their shape."""
    model = onnx.load(root / STEPS, load_external_data=False)
    node = weight_nodes(model.graph)[which]
    for name, value in attributes.items():
        set_attribute(node, name, value)
    (root / STEPS).write_bytes(model.SerializeToString())
    record_again(root)
    generating_refused(*words)


def test_weights_that_are_missing(generating_refused: Callable[..., str], root: Path) -> None:
    """Both on the disk and in the manifest, or on the disk alone."""
    (root / WEIGHTS).unlink()
    generating_refused("A file of the bundle is missing.", WEIGHTS)
    record_again(root)
    generating_refused("names weights that are not there", WEIGHTS, "not in the manifest")


def test_weights_that_are_cut_short(generating_refused: Callable[..., str], root: Path) -> None:
    content = (root / WEIGHTS).read_bytes()
    (root / WEIGHTS).write_bytes(content[: len(content) // 2])
    generating_refused("has the wrong size", WEIGHTS)
    record_again(root)
    generating_refused("names weights that are not there", f"has {len(content) // 2} bytes")


def test_a_failed_opening_leaves_nothing_that_others_share(root: Path) -> None:
    """The next one compiles anew, and works once the file is whole."""
    content = (root / STEPS).read_bytes()
    (root / STEPS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError):
        Session.open(root, threads=1)
    (root / STEPS).write_bytes(content)
    with Session.open(root, threads=1) as session:
        assert len(session.generate([1, 2], 3, stop_token_ids=())[0]) == 3


# ── processors ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = make_bundle(source("qwen2", "bfloat16"), tmp_path / "b", targets=("openvino",), dtype="bfloat16", **PLAN)
    monkeypatch.setattr(compiled, "_computes_halves", lambda *_: False)
    call = lambda: Session.open(bundle.root, threads=1)  # noqa: E731
    assert_refused(call, "This processor cannot compute in bfloat16.", "OpenVINO", error=BundleError)


def test_a_processor_without_paged_attention(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """ARM without SVE; the bundle is whole, and exporting it again would not help."""
    reason = "[CPU] PagedAttentionExtension node with name 'node' AttentionExecutor creation fails with precision f32"

    class Core:
        def compile_model(self, *_: Any) -> Any:
            raise RuntimeError(f"Exception from src/inference/src/cpp/core.cpp:125:\n{reason}\n")

    monkeypatch.setattr(compiled, "_processor", lambda _: Core())
    call = lambda: Session.open(root, threads=1)  # noqa: E731
    assert_refused(call, "OpenVINO has no paged attention for this processor.", reason, error=BundleError)


def test_a_processor_that_openvino_does_not_offer_bfloat16_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled for it then."""
    ov = import_openvino()

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8", "BIN"]

    monkeypatch.setattr(compiled, "_processor", lambda _: Core())
    assert not compiled._computes_halves(ov, {})


@pytest.mark.parametrize("probe", [lambda ov: compiled._computes_halves(ov, {}),
                                   lambda ov: compiled._rounds_rightly(ov, 32, {})])  # fmt: skip
@pytest.mark.parametrize("result", ["nothing", "zeros", "error"])
def test_probes_see_kernels_that_compute_wrongly(
    probe: Callable[[Any], bool], result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty product, another one, or none."""
    ov = import_openvino()

    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["BF16"]

        def compile_model(self, model: Any, *_: Any) -> Callable[[list[Any]], list[Any]]:
            if result == "error":
                raise RuntimeError("no kernel")
            columns = model.output(0).partial_shape[1].get_length()
            rows = 0 if result == "nothing" else 1
            return lambda inputs: [inputs[0][:1, :1].repeat(columns, 1)[:rows] * 0]

    monkeypatch.setattr(compiled, "_processor", lambda _: Core())
    assert probe(ov) is False


def test_a_product_that_is_not_rounded_has_no_kernel_that_rounds() -> None:
    """On ARM OpenVINO computes in float32, whatever it is told."""
    told = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    assert compiled._rounds_rightly(import_openvino(), 32, told) is False


def test_a_processor_without_kernels_of_8_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slower, and said; with exact products nobody asks."""
    bundle = make_bundle(source("qwen2"), tmp_path / "b", targets=("openvino",), dtype="int8", **PLAN)
    asked: list[Any] = []
    monkeypatch.setattr(compiled, "_rounds_rightly", lambda *rest: asked.append(rest))
    with Session.open(bundle.root, threads=1) as session:
        (note,) = session.engine_notes()
        assert "no kernels that round activations to 8 bits" in note
        properties = session._engine.compiled.model
        assert properties.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert len(asked) == 1
    engine = compiled.compiled_model(bundle, "openvino", compiled.Settings(1, exact=True))
    assert engine.notes == []
    assert len(asked) == 1

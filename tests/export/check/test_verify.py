"""The verification finds faults: each mutant of a good bundle must fail it."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import onnx
import pytest
from lora_drop_runtime import VerificationError
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.safetensors_file import read_tensors
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import BundleError, InputError
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_tools.cli import main

from lora_drop_export.check.figures import TOLERANCES, compare_logits, print_table
from lora_drop_export.check.runners import execution
from lora_drop_export.check.verify import compare
from lora_drop_export.compiler.verify import verify
from lora_drop_export.console import Console
from tests.support.bundles import family, fitted_adapters, make_bundle, record_again


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A bundle with adapters that matter."""
    root = tmp_path_factory.mktemp("verify")
    options = {"surrogate": "recurrent", "injection": "attn_mlp", "k": 2}
    adapters = fitted_adapters(family("llama"), root / "a", **options)
    return make_bundle("llama", root / "good", adapters=adapters, **options)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "fill"])
def test_good_bundle_passes(good, policy):
    """Every step kind occurs, two cycles at least, and the figures are far inside the tolerance."""
    result = compare(good, threads=1, policy=policy)
    assert result.policy == ("backfill" if policy == "lossless" else policy)  # whose single steps are comparable
    assert result.passed
    kinds = [step.kind for step in result.steps]
    assert kinds[0] == "prefill"
    assert kinds.count("refresh") >= 2
    assert kinds.count("lora") >= 4
    assert max(step.max_rel_error for step in result.steps) < result.tolerance.max_error / 10


@pytest.mark.parametrize(("asked", "run"), [("skip", "backfill"), ("backfill", "skip")])
def test_a_session_of_another_policy_is_noticed(good, asked, run, monkeypatch):
    genuine = Session.open
    monkeypatch.setattr(Session, "open", lambda path, **options: genuine(path, **{**options, "policy": run}))
    assert not compare(good, threads=1, policy=asked).passed


@pytest.mark.parametrize(("max_seq_len", "kinds"), [(2, 0), (4, 2), (6, 4), (11, 9), (12, 9)])
def test_the_verification_is_as_long_as_the_bundle_allows(max_seq_len, kinds, tmp_path, capsys):
    """k = 3: two cycles and a step are nine; a prompt of one token leaves room for `max_seq_len` − 2."""
    bundle = make_bundle("llama", tmp_path / "b", k=3, max_seq_len=max_seq_len)
    result = compare(bundle, threads=1)
    assert result.passed
    assert [step.kind for step in result.steps] == ["prefill", *(["lora"] * 3 + ["refresh"]) * 2, "lora"][: kinds + 1]
    print_table(result, Console())
    said = " ".join(capsys.readouterr().err.split())
    assert ("refresh steps were not compared" in said) == (kinds == 2)
    assert ("refresh and lora steps were not compared" in said) == (kinds == 0)


def test_verify_writes_what_it_found(good, tmp_path):
    root = shutil.copytree(good.root, tmp_path / "b")
    verified = verify(Bundle.open(root), console=Console(), threads=1)
    assert verified.manifest.verification["ort"]["status"] == "passed"
    assert Bundle.open(root).manifest == verified.manifest
    (report,) = json.loads((root / "verify.json").read_text())
    assert len(report["steps"]) == verified.manifest.verification["ort"]["steps"]


def rewire(root, step, change) -> None:
    """Change one step of a bundle's graph for ONNX Runtime, and the size that the manifest says."""
    path = root / "ort" / "steps.onnx"
    model = onnx.load(path, load_external_data=False)
    branch = {"lora": "then_branch", "refresh": "else_branch"}[step]
    change(next(a.g for a in model.graph.node[0].attribute if a.name == branch))
    path.write_bytes(model.SerializeToString())
    record_again(root)


def nodes_of(graph):
    """With those of the graphs within it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def swap_weights(graph) -> None:
    """Two weights of the same shape trade places, as a wrong offset would do."""
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"]
    trade = dict(zip(names, reversed(names), strict=True))
    for node in graph.node:
        node.input[:] = [trade.get(name, name) for name in node.input]


def swap_caches(graph) -> None:
    found = [n for n in nodes_of(graph) if n.op_type == "GroupQueryAttention" and "past_key.1" in n.input]
    assert found
    for node in found:
        node.input[3], node.input[4] = node.input[4], node.input[3]


def wrong_length_group(graph) -> None:
    """A dropped layer counts slots like a kept one."""
    for node in nodes_of(graph):
        for i, name in enumerate(node.input):
            node.input[i] = {"len_dropped": "len_kept", "last_dropped": "last_kept"}.get(name, name)


def no_base(graph) -> None:
    """A surrogate without its base."""
    (node,) = [n for n in graph.node if "surrogate.4.mlp" in n.name and n.op_type == "Add"]
    node.input[1] = node.input[0]


def state_of_another_layer(graph) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "past_state.4.mlp":
                node.input[i] = "past_state.6.mlp"


@pytest.mark.parametrize(
    ("graph", "change"),
    [
        ("refresh", swap_weights),
        ("lora", swap_weights),
        ("refresh", swap_caches),
        ("lora", swap_caches),
        ("refresh", wrong_length_group),
        ("lora", no_base),
        ("lora", state_of_another_layer),
    ],
)
def test_mutant_graph_fails(graph, change, good, tmp_path):
    root = shutil.copytree(good.root, tmp_path / "b")
    rewire(root, graph, change)
    with pytest.raises(VerificationError, match=r"disagrees|cannot be executed"):
        verify(Bundle.open(root), console=Console(), threads=1)


def no_zero_points(graph) -> None:
    node = next(n for n in graph.node if n.op_type == "MatMulNBits" and n.input[3])
    node.input[3] = ""


def scales_of_another(graph) -> None:
    for node, other in itertools.pairwise([n for n in graph.node if n.op_type == "MatMulNBits"][1:6:4]):
        node.input[2], other.input[2] = other.input[2], node.input[2]


def cache_scales_swapped(graph) -> None:
    layer = next(n.input[3] for n in nodes_of(graph) if n.op_type == "GroupQueryAttention")
    for node in (n for n in nodes_of(graph) if n.op_type == "GroupQueryAttention" and n.input[3] == layer):
        node.input[12], node.input[13] = node.input[13], node.input[12]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Bundle:
    return make_bundle("llama", tmp_path_factory.mktemp("int4") / "b", dtype="int4", kv_dtype="int8", drop_layers=(4,))


def test_quantized_bundle_passes(quantized):
    """With float32 kernels as close as float weights are; what runs is close in its median."""
    result = compare(quantized, threads=1)
    assert result.passed
    assert result.rounded_cosine is not None
    assert result.rounded_cosine > 0.99


@pytest.mark.parametrize("change", [no_zero_points, scales_of_another, cache_scales_swapped])
def test_mutant_of_a_quantized_bundle_fails(change, quantized, tmp_path):
    root = shutil.copytree(quantized.root, tmp_path / "b")
    rewire(root, "refresh", change)
    with pytest.raises(VerificationError, match=r"disagrees|cannot be executed"):
        verify(Bundle.open(root), console=Console(), threads=1)


def test_mutant_adapter_fails_nowhere_but_is_another_model(good, tmp_path):
    """The reference computes with the bundle's own weights, so other adapters are no disagreement."""
    root = shutil.copytree(good.root, tmp_path / "b")
    path = root / "weights" / "adapters.safetensors"
    ref = read_tensors(path)["surrogate.4.mlp.lora_B"]
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, np.float32, ref.size_bytes // 4, ref.offset_bytes)
    values *= 2
    path.write_bytes(data)
    assert compare(Bundle.open(root), threads=1).passed


def test_compare_command(good, tmp_path, capsys):
    """`lora-drop compare` prints the table, writes JSON, and exits with 1 on a disagreement."""
    given = ["--k", "1", "--policy", "backfill", "--json", str(tmp_path / "r.json"), "--threads", "1"]
    assert main(["compare", str(good.root), *given]) == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert (said["k"], said["policy"], good.manifest.plan.policy) == (1, "backfill", "skip")
    root = shutil.copytree(good.root, tmp_path / "b")
    rewire(root, "lora", swap_caches)
    assert main(["compare", str(root), "--threads", "1"]) == 1
    assert "error: The bundle on ort disagrees with PyTorch." in capsys.readouterr().err


def test_figures_that_are_no_numbers_are_json(good, tmp_path):
    """Which knows no NaN: parsers other than Python's refuse the file."""
    root = shutil.copytree(good.root, tmp_path / "b")
    weights = root / "weights" / "model.safetensors"
    ref = read_tensors(weights)["model.layers.2.mlp.down_proj.weight"]
    data = bytearray(weights.read_bytes())
    np.frombuffer(data, np.float32, 1, ref.offset_bytes)[:] = np.nan
    weights.write_bytes(data)
    assert main(["compare", str(root), "--k", "1", "--json", str(tmp_path / "r.json"), "--threads", "1"]) == 2
    text = (tmp_path / "r.json").read_text()
    steps = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["steps"]
    assert {(step["max_abs_error"], step["cosine"], step["passed"]) for step in steps} == {(None, None, False)}


def test_near_ties_are_named():
    """Two best logits closer than the error: no failure, but counted; further apart: a failure."""
    tolerance = TOLERANCES["float32"]
    theirs = np.array([[1.0, 1.0 + 1e-6, -3.0]], np.float32)
    ours = np.array([[1.0 + 2e-6, 1.0, -3.0]], np.float32)
    tie = compare_logits(0, "lora", ours, theirs, tolerance)
    assert (tie.passed, tie.near_ties, tie.top1_agreement) == (True, 1, 0.0)
    wrong = compare_logits(0, "lora", theirs[:, ::-1], theirs, tolerance)
    assert (wrong.passed, wrong.near_ties) == (False, 0)
    assert not compare_logits(0, "lora", np.full_like(theirs, np.nan), theirs, tolerance).passed


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (BundleError("Fact.", note="Exception: std::bad_alloc", hint="Hint."), InputError),
        (RuntimeError("std::bad_alloc"), InputError),
        (MemoryError("Unable to allocate"), MemoryError),
        (RuntimeError("no such operator"), VerificationError),
    ],
    ids=["bundle", "engine", "numpy", "bug"],
)
def test_too_little_memory_is_no_wrong_bundle(raised: Exception, expected: type[Exception]) -> None:
    """It was said to be a bug, with exit code 1."""
    with pytest.raises(expected) as refused, execution("ort"):
        raise raised
    if isinstance(refused.value, InputError):
        assert refused.value.exit_code == 2
        assert refused.value.hint == "Free memory, or raise the limit on it (ulimit -v)."

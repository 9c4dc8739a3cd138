"""Weights and caches of other formats than float32 on target openvino: against PyTorch, the oracle and target ort."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lora_drop_runtime import Session
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import CHANNEL
from lora_drop_runtime.engines.openvino import compiled
from lora_drop_runtime.engines.openvino.engine import OpenVinoEngine
from lora_drop_runtime.engines.openvino.package import import_openvino
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from lora_drop_export.check.verify import compare
from lora_drop_export.checkpoint.open import open_checkpoint
from lora_drop_export.cli import main
from tests.support import oracle
from tests.support.bundles import Family, make_bundle, oracle_plan, traced_family
from tests.support.decoding import padded
from tests.support.models import build, llama

from .test_engine import TARGETS, VOCAB, assert_near

# Two blocks of 128 in a row, so that zero points of 4 bits fill whole bytes
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}
PLAN = {"drop_layers": (1,), "always_first": 0, "always_last": 0, "surrogate": "recurrent"}
EXACT, ROUNDED = 2e-4, 0.95  # of the largest |logit|; the least cosine, in the median as the exporter judges it
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (40, 1, 7)]
STEPS = np.random.default_rng(0).integers(0, VOCAB, (5, 3))
K = 2


def small(name: str) -> Any:
    """Two families, one tied and one not. Matrices of the tests' models are made for a hidden size of 64; such wide
    ones would make every rounding a large one."""
    if name == "llama":
        model = llama(**SMALL, tie_word_embeddings=False)
    else:
        classes = transformers.Qwen2ForCausalLM, transformers.Qwen2Config
        model = build(*classes, seed=9, **SMALL, tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 0.3
    return model


@functools.cache
def source(name: str, dtype: str = "float32") -> Family:
    return traced_family(f"openvino.{name}", small(name), dtype)


def logits_of(session: Session) -> list[np.ndarray]:
    """Of the prompts, and of each step [B, V]."""
    found = [session.prefill(*padded(PROMPTS), max_new_tokens=len(STEPS) + 1, k=K).copy()]
    return found + [session.step(column).copy() for column in STEPS]


def oracle_logits(bundle: Bundle, made_from: Family) -> list[np.ndarray]:
    """The same by the oracle, in float32 on the weights that the bundle stores."""
    model = copy.deepcopy(made_from.model)
    stored = open_checkpoint(str(bundle.root / "weights"), bundle.root.parent / "scratch")
    values = {name: torch.from_numpy(np.array(ref.read(), np.float32)) for name, ref in stored.tensors.items()}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    rows = [
        oracle.decode_row(model, oracle_plan(bundle), prompt, STEPS[:, row].tolist(), K)
        for row, prompt in enumerate(PROMPTS)
    ]
    return [torch.stack(step).numpy() for step in zip(*rows, strict=True)]


def median_cosine(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    a, b = np.concatenate(ours).astype(np.float64), np.concatenate(theirs).astype(np.float64)
    return float(np.median((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def zero_point_types(session: Session) -> set[str]:
    """Of the compiled model's matrix products: in other types than the stored one they have a slow kernel."""
    engine = session._engine
    assert isinstance(engine, OpenVinoEngine)
    nodes = engine.compiled.model.get_runtime_model().get_ops()
    products = [node for node in nodes if node.get_rt_info()["layerType"] == "FullyConnected"]
    points = [node.input_value(4) for node in products if node.get_input_size() > 4]
    return {point.get_element_type().to_string() for point in points}


# ── float32 ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_float32(name: str, tmp_path: Path) -> None:
    bundle = make_bundle(source(name), tmp_path / "b", targets=TARGETS, **PLAN)
    with Session.open(bundle.root, threads=1) as ours, Session.open(bundle.root, target="ort", threads=1) as theirs:
        assert compare(bundle, target="openvino", threads=1).passed
        for a, b in zip(logits_of(ours), logits_of(theirs), strict=True):
            assert_near(a, b)
        one = [session.generate([PROMPTS[0]], 24, k=K, stop_token_ids=())[0].tolist() for session in (ours, theirs)]
        assert one[0] == one[1]


def test_an_export_from_the_command_line(tmp_path: Path, capsys) -> None:
    """Quantized weights; its verification is the exporter's own."""
    made_from, out = source("qwen2"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_drop_export.compiler.export.trace", lambda *_, **__: made_from.traced)
        options = "--drop-layers 1 --always-first 0 --always-last 0 --max-seq-len 48 --threads 1 --target openvino"
        formats = "--dtype int4 --quantization rtn --block-size 128"
        arguments = ["--model", str(made_from.directory), "--out", str(out), *options.split(), *formats.split()]
        assert main(arguments) == 0
    manifest = Bundle.open(out).manifest
    assert manifest.verification["openvino"]["status"] == "passed"
    assert manifest.verification["openvino"]["rounded_cosine"] > ROUNDED
    assert manifest.model.weight_dtype == "int4"


# ── quantized weights ──────────────────────────────────────────────────────────────────────────────────────────

QUANTIZED = [
    ("llama", {"dtype": "int4", "quantization": "search", "block_size": 32}, False),
    ("qwen2", {"dtype": "int4", "quantization": "search", "block_size": 128}, False),
    ("qwen2", {"dtype": "int4", "quantization": "rtn", "block_size": 64}, True),
    ("llama", {"dtype": "int8", "block_size": 32}, True),
    ("llama", {"dtype": "int4", "quantization": "search", "block_size": CHANNEL}, True),
    ("qwen2", {"dtype": "int8", "block_size": CHANNEL}, True),
]


@pytest.mark.parametrize(
    ("name", "options", "symmetric"),
    QUANTIZED,
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_quantized_weights(name: str, options: dict[str, Any], symmetric: bool, tmp_path: Path) -> None:
    """With exact products the oracle's logits on the stored weights; with rounded ones near them."""
    made_from = source(name)
    targets = ("openvino",) if options["block_size"] == CHANNEL else TARGETS
    bundle = make_bundle(made_from, tmp_path / "b", targets=targets, **options, **PLAN)
    assert bundle.manifest.quantization["symmetric"] is symmetric
    assert bundle.manifest.quantization["block_size"] == options["block_size"]
    wanted = oracle_logits(bundle, made_from)
    exact = Session(bundle, OpenVinoEngine(bundle, threads=1, exact=True), PeriodicSchedule(K))
    for step, (ours, theirs) in enumerate(zip(logits_of(exact), wanted, strict=True)):
        assert_near(ours, theirs, f"step {step}", EXACT)
    if "ort" in targets:
        with Session.open(bundle.root, target="ort", threads=1) as theirs:
            assert median_cosine(logits_of(theirs), wanted) > ROUNDED
    with Session.open(bundle.root, threads=1) as rounded:
        assert median_cosine(logits_of(rounded), wanted) > ROUNDED
        if options["dtype"] == "int4":
            assert zero_point_types(rounded) == {"u4"}  # of the head too, where it is the embedding
        verified = compare(bundle, target="openvino", threads=1)  # while both models are still compiled
    exact.close()
    assert verified.passed, verified
    assert verified.rounded_cosine is not None


@pytest.mark.parametrize(
    ("blocks", "group"), [((32,), 32), ((64, 128), 64), ((128, 64), 64), ((256,), 128), ((192,), 64), ((136,), 16)]
)
def test_activations_share_a_scale_within_every_block(blocks: tuple[int, ...], group: int) -> None:
    """At most 128 of them, and at least 16."""
    from lora_drop_runtime.engines.openvino.conversion import Conversions
    from openvino import opset13 as op

    made = Conversions(lambda *_: np.zeros(0), [], 2)
    for block in blocks:
        weight, scales = op.constant(np.ones((4, 1, block), np.uint8)), op.constant(np.ones((4, 1, 1), np.float32))
        inputs = [one.output(0) for one in (op.parameter([-1, block], np.float32), weight, scales)]
        attributes = {"quantized": 1, "gated": 0}
        get = attributes.__getitem__
        made._linear(SimpleNamespace(get_input=inputs.__getitem__, get_input_size=lambda: 3, get_attribute=get))
    assert made.group == group


def test_without_kernels_of_8_bits_products_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the session says so, whoever shares its compiled model."""
    made_from = source("llama")
    bundle = make_bundle(made_from, tmp_path / "b", targets=("openvino",), dtype="int4", **PLAN)
    monkeypatch.setattr(compiled, "_rounds_rightly", lambda *_: False)
    with Session.open(bundle.root, threads=1) as session, Session.open(bundle.root, threads=1) as other:
        for one in (session, other):
            (note,) = one.engine_notes()
            assert "8 bits" in note
        for ours, theirs in zip(logits_of(session), oracle_logits(bundle, made_from), strict=True):
            assert_near(ours, theirs, tolerance=EXACT)


# ── caches of 8 bits ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("qwen2", "int8")])
def test_int8_caches(name: str, dtype: str, tmp_path: Path) -> None:
    """OpenVINO rounds the entry of each token and head by a scale of its own, which lies beside it.

    Caches that are not rounded pass the verification at float32's tolerance. Those that are, against the oracle, which
    rounds nothing: a value of an entry is off by half of 1/255 of the entry's range at most.
    Target ort rounds by the scales of calibrated channels, so both are only near each other.
    """
    made_from = source(name)
    options = {"targets": TARGETS, "dtype": dtype, **PLAN}
    bundle = make_bundle(made_from, tmp_path / "b", kv_dtype="int8", **options)
    wanted = oracle_logits(bundle, made_from)
    engine = OpenVinoEngine(bundle, threads=1)
    assert compare(bundle, target="openvino", threads=1).passed
    rounding = Session(bundle, engine, PeriodicSchedule(K))
    found = logits_of(rounding)
    assert median_cosine(found, wanted) > 0.999
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert_near(ours, theirs, f"step {step}", 0.1)
    entry = 2 * 2 * (64 + 8)  # K and V of 2 heads of 64 bytes, and a scale and a zero point in float32
    assert [pool.block_bytes for pool in engine.pools] == [32 * 2 * entry, 32 * 1 * entry]
    rounding.prefill(np.ones((1, 32), np.int64), max_new_tokens=1)
    held = rounding.kv_bytes()
    assert (held["kept"], held["dropped"]) == (32 * 2 * 2 * 2 * 64, 32 * 1 * 2 * 2 * 64)  # the values alone
    assert held["allocated"] == sum(pool.block_bytes for pool in engine.pools)
    rounding.close()
    with Session.open(bundle.root, target="ort", threads=1) as theirs:
        # Its products of int8 weights round activations as well
        assert median_cosine(found, logits_of(theirs)) > (0.999 if dtype == "float32" else ROUNDED)


def test_forks_and_truncations_of_int8_caches(tmp_path: Path) -> None:
    """What is in a block is copied as it is: both forks go on as one that ran alone, to the last bit."""
    bundle = make_bundle(source("llama"), tmp_path / "b", targets=("openvino",), kv_dtype="int8", **PLAN)
    with Session.open(bundle.root, k=K, threads=1) as session, Session.open(bundle.root, k=K, threads=1) as alone:
        for one in (session, alone):
            one.prefill(np.array([PROMPTS[0]]), max_new_tokens=30)
        fork = session.fork()
        for token in range(8):
            fork.step([100 - token])
            assert np.array_equal(session.step([token]), alone.step([token]))
        for one in (session, alone):
            one.truncate(35)
        for token in range(8):
            fork.step([token])
            assert np.array_equal(session.step([50 + token]), alone.step([50 + token]))
        fork.close()


# ── bfloat16 ───────────────────────────────────────────────────────────────────────────────────────────────────


def has_halves() -> bool:
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.skipif(not has_halves(), reason="this processor does not compute in bfloat16 (OpenVINO says so)")
def test_bfloat16(tmp_path: Path) -> None:
    """Norms and biases of qwen2 are in bfloat16 as well."""
    made_from = source("qwen2", "bfloat16")
    bundle = make_bundle(made_from, tmp_path / "b", targets=("openvino",), dtype="bfloat16", **PLAN)
    verified = compare(bundle, target="openvino", threads=1)
    assert verified.passed, verified
    wanted = oracle_logits(bundle, made_from)
    with Session.open(bundle.root, threads=2) as session:  # where gated MLPs are one kernel
        assert median_cosine(logits_of(session), wanted) > 0.999
    with Session.open(bundle.root, threads=1) as session:
        assert median_cosine(logits_of(session), wanted) > 0.999
        entry = 2 * 2 * 64 * 2  # K and V of 2 heads of 64
        assert session.kv_bytes()["kept"] == (sum(map(len, PROMPTS)) + STEPS.size) * 2 * entry
        assert session._engine.pools[0].block_bytes == 32 * 2 * entry

"""The plugin form of the graphs with the plugin's kernel, on the CPU, against the oracle.

ONNX's reference evaluator runs the graph that TensorRT's parser gets; its SkipWriteKVAttention nodes call the kernel's
source as tests/support/kernel_build.py builds it, through the C interface that the TensorRT glue calls as well.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lora_drop_export.targets.trt.lower import trt_from_neutral
from lora_drop_export.targets.trt.target import static_slots
from plugins.kernels.binding import load_library
from tests.support import oracle
from tests.support.bundles import PROMPTS, family, make_bundle, more_family, oracle_plan, traced_family
from tests.support.kernel_build import host_kernels
from tests.support.models import gemma3
from tests.support.plugin_ops import plugin_ops

K = 2
STEPS = 7
TOLERANCE = 3e-5  # of the row's largest |logit|, as in tests/export/test_against_oracle.py


@pytest.fixture(scope="module")
def kernel() -> ctypes.CDLL:
    return load_library(host_kernels())


def attention_op(library: ctypes.CDLL) -> type[OpRun]:
    """SkipWriteKVAttention as an operator of the reference evaluator; its caches are updated in place."""
    attend = plugin_ops(library)["SkipWriteKVAttention"]

    class SkipWriteKVAttention(OpRun):
        op_domain = "lora_drop"

        def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
            output, *_ = attend(*map(torch.from_numpy, inputs), **attributes)
            return output.numpy(), inputs[3], inputs[4]

    return SkipWriteKVAttention


HALVES = {"drop_layers": ("3.attn", "4.mlp", "5")}
SOURCES = {
    "gemma3": lambda: traced_family("gemma3", gemma3(), "float32"),
    "gpt_oss": lambda: more_family("gpt_oss"),
}
SECOND_OF_TWO = {"drop_layers": ("1",), "always_first": 0, "always_last": 0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3", SECOND_OF_TWO),
        ("gpt_oss", SECOND_OF_TWO),
        ("llama", HALVES),
        ("qwen3", {"policy": "fill", **HALVES}),
    ],
    ids=["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "halves", "fill"],
)
def test_plugin_graph_decodes_like_the_oracle(name, options, kernel, tmp_path):
    """A ragged prefill and two cycles: RoPE, norms of q and k, softcap and windows inside the plugin.

    What a LoRA step writes under `fill` has no attention: a plain TensorScatter stands beside the plugin's nodes.
    """
    options = {"targets": ("none",), "k": K, "max_seq_len": 24, "max_prompt_len": 8, **options}
    source = SOURCES[name]() if name in SOURCES else family(name)
    bundle = make_bundle(source, tmp_path / "b", **options)
    plan, model = bundle.manifest.plan, bundle.manifest.model
    slots = static_slots(plan, bundle.manifest.limits)
    runs, weights = {}, {}
    for kind in StepKind:
        neutral = onnx.load(bundle.root / f"{kind.value}.onnx", load_external_data=False)
        lowered = trt_from_neutral(neutral, slots, form="plugin")
        rotated = [out for node in lowered.proto.graph.node if node.op_type == "RotaryEmbedding" for out in node.output]
        written = {node.input[1] for node in lowered.proto.graph.node if node.op_type == "TensorScatter"}
        assert set(rotated) <= written  # the plugin rotates all that it attends to
        runs[kind] = ReferenceEvaluator(lowered.proto, new_ops=[attention_op(kernel)])
        for weight, entry in lowered.weights.items():
            parts = [(bundle.root / f).read_bytes()[offset : offset + size] for f, offset, size in entry.parts]
            weights[weight] = np.frombuffer(bytearray(b"".join(parts)), entry.dtype).reshape(entry.shape)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    ids = np.zeros((len(PROMPTS), lengths.max()), np.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    caches = {
        f"past_{part}.{layer}": np.full(
            (
                len(PROMPTS),
                model.kv_heads,
                slots["dropped" if layer in plan.dropped_attentions else "kept"],
                model.head_dim,
            ),
            np.nan,
            np.float32,
        )
        for layer in range(plan.num_layers)
        for part in ("key", "value")
    }
    feed = {"len_kept": np.zeros(3, np.int64), "len_dropped": np.zeros(3, np.int64)} | caches | weights

    def run(kind: StepKind, tokens: np.ndarray, index: np.ndarray) -> np.ndarray:
        wanted = {value.name for value in runs[kind].proto_.graph.input}
        given = {n: v for n, v in (feed | {"input_ids": tokens, "logits_index": index}).items() if n in wanted}
        filled = [f"{part}.{layer}" for layer in plan.dropped_attentions for part in ("key", "value")]
        filled = filled if plan.refresh_policy.fills and kind is StepKind.LORA else []
        logits, next_token, *presents = runs[kind].run(
            ["logits", "next_token", *(f"present_{n}" for n in filled)], given
        )
        for entry, present in zip(filled, presents, strict=True):
            caches[f"past_{entry}"][:] = present
        np.testing.assert_array_equal(next_token, logits.argmax(-1))
        return logits[:, 0]

    forced = np.random.default_rng(3).integers(0, model.vocab_size, (STEPS, len(PROMPTS)))
    ours = [run(StepKind.REFRESH, ids, lengths[:, None] - 1)]
    feed["len_kept"] += lengths
    feed["len_dropped"] += lengths
    for step in range(1, STEPS + 1):
        kind = PeriodicSchedule(K).kind(step)
        ours.append(run(kind, forced[step - 1][:, None], np.zeros((3, 1), np.int64)))
        feed["len_kept"] += 1
        feed["len_dropped"] += kind is StepKind.REFRESH or plan.refresh_policy.fills
    for row, prompt in enumerate(PROMPTS):
        theirs = oracle.decode_row(source.model, oracle_plan(bundle), prompt, forced[:, row].tolist(), K)
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            error = np.abs(a[row] - b.numpy()).max() / np.abs(b.numpy()).max()
            assert error < TOLERANCE, f"row {row}, step {step}: {error:.1e}"
    for name_, cache in caches.items():  # padding of the prefill and what was never reached: not written
        layer = int(name_.rpartition(".")[2])
        written = feed["len_dropped" if layer in plan.dropped_attentions else "len_kept"]
        for row, length in enumerate(written):
            assert np.isfinite(cache[row, :, :length]).all(), name_
            assert np.isnan(cache[row, :, length:]).all(), name_

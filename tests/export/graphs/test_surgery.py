"""What the two neutral graphs hold, and that they compute the algorithm by themselves (plain ONNX, explicit masks)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import LAST_SLOTS, LORA_STEP, NEW_TOKENS, PACKED_STEP, TOTALS
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.graphs.match import is_row_wise
from tests.support import oracle
from tests.support.bundles import PROMPTS, family, first_layers, fitted_adapters, make_bundle, oracle_plan

NEUTRAL = {"targets": ("none",)}


def load(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.root / f"{name}.onnx", load_external_data=False)


def names(values) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("injection", ["block", "attn_mlp"])
@pytest.mark.parametrize("surrogate", ["residual", "recurrent", "anchor", "residual-delta"])
def test_nothing_of_a_dropped_layer_remains(surrogate, injection, rank, tmp_path):
    """Per op type: the refresh graph less its dropped layers' nodes, plus two Gemms and an Add for each surrogate.

    A layer's halves are one surrogate where they start from their input; a Concat brings a change to it.
    """
    options = {"surrogate": surrogate, "injection": injection, "rank": rank, "k": 1, "always_first": 1}
    bundle = make_bundle(first_layers("llama_bias", 5), tmp_path / "b", **NEUTRAL, **options)
    plan = bundle.manifest.plan
    refresh, lora = load(bundle, "refresh"), load(bundle, "lora")
    dropped = len(plan.dropped_layers)
    starts_from_input = surrogate.startswith("residual")
    maps = dropped if starts_from_input else len(plan.sites)
    assert dropped == 2
    ours = [node for node in lora.graph.node if node.name.startswith("surrogate.")]
    assert Counter(node.op_type for node in ours if node.op_type not in ("Reshape", "Constant")) == (
        Counter(Gemm=2 * maps, Add=maps) + Counter({"Concat": maps * plan.has_state * starts_from_input})
        if rank
        else Counter()
    )
    for site in plan.sites:
        reshapes = [n for n in ours if n.name.startswith(f"surrogate.{site}.") and n.op_type == "Reshape"]
        assert len(reshapes) <= 2
    if starts_from_input or rank:  # else what lies before a layer that repeats its state is dead
        n = plan.num_layers
        before = Counter(node.op_type for node in refresh.graph.node)
        after = Counter(node.op_type for node in lora.graph.node if node not in ours)
        for op in ("Attention", "RotaryEmbedding", "RMSNormalization", "MatMul", "TensorScatter", "Sigmoid"):
            outside = before[op] % n  # final norm, lm_head
            assert after[op] == (before[op] - outside) * (n - dropped) // n + outside, op
    gone = tuple(f"model.layers.{i}." for i in plan.dropped_layers)
    weights = names(lora.graph.initializer)
    assert not [name for name in weights if name.startswith(gone)]
    assert [name for name in names(refresh.graph.initializer) if name.startswith(gone)]
    assert len([name for name in weights if ".lora_" in name]) == (2 * maps if rank else 0)
    for value in [*names(lora.graph.input), *names(lora.graph.output)]:
        kind, _, where = value.partition(".")
        if kind.endswith(("_key", "_value")):
            assert int(where) in plan.kept_attentions
    assert "len_dropped" not in names(lora.graph.input)
    assert "len_dropped" in names(refresh.graph.input)


def test_adapters_bring_the_plan_they_were_fitted_for(tmp_path):
    plan = {"drop_layers": (4, 6), "surrogate": "recurrent", "injection": "attn_mlp"}
    adapters = fitted_adapters(family("llama"), tmp_path / "a", **plan)
    found = make_bundle("llama", tmp_path / "b", adapters=adapters, **NEUTRAL).manifest.plan
    assert (found.sites, found.surrogate) == (("4.attn", "4.mlp", "6.attn", "6.mlp"), "recurrent")
    assert found.rank == 4


def test_io_is_the_table(tmp_path):
    """Inputs and outputs stand in the order, dtype and shape of graph_io."""
    bundle = make_bundle("qwen2", tmp_path / "b", surrogate="recurrent", injection="attn_mlp", rank=2)
    for kind in StepKind:
        for file, target in ((kind.value, None), ("ort/steps", "ort")):
            graph = load(bundle, file).graph
            if target:
                own = dict.fromkeys((LORA_STEP, PACKED_STEP), (onnx.TensorProto.BOOL, []))
                own |= dict.fromkeys(TOTALS.values(), (onnx.TensorProto.INT32, []))
                own |= dict.fromkeys((NEW_TOKENS, *LAST_SLOTS.values()), (onnx.TensorProto.INT32, ["batch"]))
                assert [value.name for value in graph.input if value.name in TOTALS.values()] == list(TOTALS.values())
                for value in [value for value in graph.input if value.name in own]:  # which the engine sets
                    kind_of = value.type.tensor_type
                    sizes = [d.dim_param or d.dim_value for d in kind_of.shape.dim]
                    assert (kind_of.elem_type, sizes) == own.pop(value.name)
                    graph.input.remove(value)
                assert not own
            io = bundle.manifest.io(StepKind.REFRESH if target else kind, target)
            for values, specs in ((graph.input, io.inputs), (graph.output, io.outputs)):
                assert names(values) == [spec.name for spec in specs]
                for value, spec in zip(values, specs, strict=True):
                    shape = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                    assert shape == spec.shape, spec.name
                    wanted = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
                    assert value.type.tensor_type.elem_type == wanted, spec.name


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen2"])
def test_graphs_pass_the_checker_and_are_plain(name, tmp_path):
    """The neutral graphs use ONNX's own operators only, fused where the standard has a fused one."""
    bundle = make_bundle(name, tmp_path / "b", **NEUTRAL)
    for kind in ("refresh", "lora"):
        model = load(bundle, kind)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert model.opset_import[0].version == 24
        layers = 8 if kind == "refresh" else len(bundle.manifest.plan.kept_attentions)
        count = Counter(node.op_type for node in model.graph.node)
        assert count["Attention"] == layers
        assert count["TensorScatter"] == count["RotaryEmbedding"] == 2 * layers
        assert count["RMSNormalization"] >= 2 * layers + 1
        assert not [node for node in model.graph.node if node.metadata_props]
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.ClearField("external_data")
                tensor.data_location = onnx.TensorProto.DEFAULT
                tensor.raw_data = bytes(int(np.prod(tensor.dims)) * 4)
        onnx.checker.check_model(model, full_check=True)


class NeutralGraphs:
    """Runs refresh.onnx and lora.onnx as they are, with plain dictionaries: no binding, no lowering, no session."""

    def __init__(self, bundle: Bundle, batch: int, slots: int) -> None:
        self.manifest = bundle.manifest
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.root))
        self.sessions = {
            kind: onnxruntime.InferenceSession((bundle.root / f"{kind.value}.onnx").read_bytes(), options)
            for kind in StepKind
        }
        sizes = {"batch": batch, "slots_kept": slots, "slots_dropped": slots}
        # Poison: what lies past a length must not matter. Not NaN: a dense attention multiplies masked values by 0
        self.values = {
            spec.name: np.full(spec.sized(sizes), 1e4, np.float32)
            for spec in self.manifest.io(StepKind.REFRESH).inputs
            if spec.name.startswith("past_")
        }
        self.len_kept = self.len_dropped = np.zeros(batch, np.int64)

    def run(self, kind: StepKind, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """ids [B, S], lengths [B] real tokens → logits [B, V]."""
        io = self.manifest.io(kind)
        feeds = self.values | {
            "input_ids": ids,
            "len_kept": self.len_kept,
            "len_dropped": self.len_dropped,
            "logits_index": (lengths - 1)[:, None],
        }
        outputs = [spec.name for spec in io.outputs]
        results = self.sessions[kind].run(outputs, {spec.name: feeds[spec.name] for spec in io.inputs})
        self.values |= {
            name.replace("present_", "past_"): value
            for name, value in zip(outputs, results, strict=True)
            if name != "logits"
        }
        self.len_kept = self.len_kept + lengths
        if kind is StepKind.REFRESH:
            self.len_dropped = self.len_dropped + lengths
        return results[0][:, 0]


@pytest.mark.parametrize(
    ("name", "surrogate", "rank"),
    [("llama", "residual", 0), ("gemma2", "residual", 4), ("qwen3", "recurrent", 4), ("phi3", "anchor", 4)],
)
def test_neutral_graphs_against_oracle(name, surrogate, rank, tmp_path):
    """Explicit masks, true lengths: the neutral form alone computes the algorithm, over poisoned caches.

    A row's cache has room for the longest prompt, and padding is never seen.
    """
    adapters = fitted_adapters(family(name), tmp_path / "a", rank, surrogate=surrogate) if rank else None
    bundle = make_bundle(name, tmp_path / "b", surrogate=surrogate, adapters=adapters, **NEUTRAL)
    k, steps = 2, 7
    forced = np.random.default_rng(0).integers(0, 131, (len(PROMPTS), steps))
    lengths = np.array([len(p) for p in PROMPTS])
    padded = np.zeros((len(PROMPTS), lengths.max()), np.int64)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt
    graphs = NeutralGraphs(bundle, len(PROMPTS), int(lengths.max()) + steps)
    ours = [graphs.run(StepKind.REFRESH, padded, lengths)]
    one = np.ones(len(PROMPTS), np.int64)
    for j in range(1, steps + 1):
        kind = StepKind.REFRESH if j % (k + 1) == 0 else StepKind.LORA
        ours.append(graphs.run(kind, forced[:, j - 1 : j], one))
    rows = oracle.run_batch(family(name).model, oracle_plan(bundle, adapters), PROMPTS, forced.tolist(), k)
    for row, theirs in enumerate(rows):
        for step, b in enumerate(theirs):
            error = np.abs(ours[step][row] - b.numpy()).max() / np.abs(b.numpy()).max()
            assert error < 3e-5, f"row {row}, step {step}"


def test_states_are_those_of_the_last_token_that_has_logits(tmp_path):
    """Of several that have, as where drafts are verified; what stands behind it is padding."""
    source = first_layers("llama_bias", 5)
    bundle = make_bundle(source, tmp_path / "b", surrogate="recurrent", k=1, always_first=1, **NEUTRAL)
    graphs, states = NeutralGraphs(bundle, 1, 9), bundle.manifest.plan.states
    ids, none = np.array([[7, 3, 11, 19, 2, 0]]), np.zeros(1, np.int64)
    given = {"input_ids": ids, "len_kept": none, "len_dropped": none, "logits_index": np.array([[2, 4]])}
    feeds = {spec.name: (graphs.values | given)[spec.name] for spec in bundle.manifest.io(StepKind.REFRESH).inputs}
    found = graphs.sessions[StepKind.REFRESH].run([f"present_state.{site}" for site in states], feeds)
    with torch.no_grad():
        stream = source.model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    assert len(found) == 2
    for state, after in zip(found, states.values(), strict=True):
        np.testing.assert_allclose(state[0], stream[int(after) + 1][0, 4].numpy(), atol=1e-4)


def test_what_treats_rows_alike():
    """By hand: an operand of every row, of none or as long as the rows; nothing that reads across tokens."""
    rows = ("batch", "sequence", 8)

    def alike(op, *shapes, **attributes):
        float32 = ir.TensorType(ir.DataType.FLOAT)
        node = ir.node(op, [ir.Value(shape=ir.Shape(shape), type=float32) for shape in shapes], attributes)
        node.outputs[0].shape = ir.Shape(rows)
        return is_row_wise(node)

    assert alike("Add", rows, rows)
    assert alike("Mul", rows, (8,))
    assert alike("LayerNormalization", rows, (8,), axis=-1)
    assert not alike("LayerNormalization", rows, (8,), axis=1)
    assert not alike("Add", rows, ("batch", 1, 8))
    assert not alike("Add", rows, ("sequence", 8))
    assert not alike("Softmax", rows)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen3"])
def test_only_rows_with_logits_go_on_after_the_last_attention(name, tmp_path):
    """A product whose result no attention or cache needs runs on the rows asked for, all others on every token."""
    bundle = make_bundle(name, tmp_path / "b", **NEUTRAL)
    model = load(bundle, "refresh")
    made_by = {output: node for node in model.graph.node for output in node.output}
    needed, queue = set(), [node for node in model.graph.node if node.op_type in ("Attention", "TensorScatter")]
    while queue:
        node = queue.pop()
        for value in node.input:
            if value in made_by and made_by[value].output[0] not in needed:
                needed.add(made_by[value].output[0])
                queue.append(made_by[value])
    products = [node.output[0] for node in model.graph.node if node.op_type == "MatMul"]
    late = [value for value in products if value not in needed]
    assert len(late) >= 4  # attention's output, the MLP's at least two, the head
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in products)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.root))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    sizes = {"batch": 2, "slots_kept": 9, "slots_dropped": 9}
    feeds = {
        spec.name: np.zeros(spec.sized(sizes), np.float32)
        for spec in bundle.manifest.io(StepKind.REFRESH).inputs
        if spec.name.startswith("past_")
    }
    feeds |= {"input_ids": np.ones((2, 7), np.int64), "logits_index": np.array([[6], [3]])}
    feeds |= {name: np.zeros(2, np.int64) for name in ("len_kept", "len_dropped")}
    values = dict(zip(products, session.run(products, feeds), strict=True))
    assert {value: array.shape[1] for value, array in values.items()} == {
        value: 1 if value in late else 7 for value in products
    }

"""The session on the real engine: which memory a step touches, adapters swapped, other providers."""

from __future__ import annotations

import ctypes
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from lora_drop_runtime import BundleError, InputError, NoDeviceError, PeriodicSchedule, PlanError, Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.graph_io import TOTALS
from lora_drop_runtime.engines.ort import engine as engine_ort
from lora_drop_runtime.engines.ort.device_memory import DeviceMemory
from lora_drop_runtime.engines.ort.engine import OrtEngine

from lora_drop_export.compiler.verify import verify
from lora_drop_export.console import Console
from lora_drop_export.targets.trt.options import BuilderOptions
from tests.support.bundles import PROMPTS, first_layers, make_bundle, record_again, save_adapters


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Bundle:
    """float32, without room for adapters."""
    return make_bundle("llama", tmp_path_factory.mktemp("plain") / "b")


def prefill(session: Session, k: int, new_tokens: int = 12) -> np.ndarray:
    lengths = np.array([len(p) for p in PROMPTS])
    padded = np.zeros((len(PROMPTS), lengths.max()), np.int64)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt
    return session.prefill(padded, lengths, max_new_tokens=new_tokens, k=k)


def dropped_buffers(session: Session) -> list[np.ndarray]:
    layers = session.bundle.manifest.plan.dropped_layers
    caches = session._request.caches
    return [caches[f"past_{part}.{layer}"] for layer in layers for part in ("key", "value")]


@pytest.mark.parametrize("surrogate", ["residual", "recurrent", "anchor", "residual-delta"])
def test_lora_step_leaves_dropped_layers_alone(surrogate, tmp_path):
    """NaN in every buffer of a dropped layer: a LoRA step gives the same logits and leaves every bit of them."""
    bundle = make_bundle("llama", tmp_path / "b", surrogate=surrogate, rank=2)
    with Session.open(bundle.root, threads=1) as session:
        prefill(session, k=5)
        clean = [session.step([3, 5, 7]).copy() for _ in range(3)]
        prefill(session, k=5)
        for buffer in dropped_buffers(session):
            buffer.view(np.uint32)[...] = 0x7FC0DEAD  # a NaN that is easy to know again
        for logits in clean:
            assert session.next_step is StepKind.LORA
            np.testing.assert_array_equal(session.step([3, 5, 7]), logits)
        for buffer in dropped_buffers(session):
            assert (buffer.view(np.uint32) == 0x7FC0DEAD).all()


@pytest.mark.parametrize(("drop_ratio", "lora_form"), [(0.0, True), (0.5, False)])
def test_full_schedule_where_nothing_is_dropped(drop_ratio, lora_form, tmp_path):
    """Both steps are one model then, and a token of each row takes the form without Ifs: it adds 1000 to its logits."""
    bundle = make_bundle("llama", tmp_path / "b", drop_ratio=drop_ratio)
    file = bundle.root / bundle.manifest.targets["ort"].steps
    model = onnx.load(file, load_external_data=False)
    (choice,) = model.graph.node
    branch = next(attribute.g for attribute in choice.attribute if attribute.name == "then_branch")
    (logits,) = (value.name for value in branch.output if value.name.endswith("logits"))
    for node in branch.node:
        node.output[:] = [f"{name}.before" if name == logits else name for name in node.output]
    shift = onnx.helper.make_node("Constant", [], ["shift"], value_float=1000.0)
    branch.node.extend([shift, onnx.helper.make_node("Add", [f"{logits}.before", "shift"], [logits])])
    onnx.save(model, file)
    record_again(bundle.root)
    with Session.open(bundle.root, threads=1) as session:
        assert prefill(session, k=0).max() < 500
        steps = [session.step([3, 5, 7]).max() > 500 for _ in range(3)]
    assert steps == [lora_form] * 3


def test_nothing_past_a_length_is_read(tmp_path):
    """NaN in every slot past a row's length, before every step: the logits do not change."""
    bundle = make_bundle("qwen3", tmp_path / "b")
    with Session.open(bundle.root, threads=1) as session:
        prefill(session, k=2)
        clean = [session.step([3, 5, 7]).copy() for _ in range(8)]
        prefill(session, k=2)
        request = session._request
        for logits in clean:
            for name, buffer in request.caches.items():
                layer = int(name.rpartition(".")[2])
                lengths = request.len_dropped if layer in bundle.manifest.plan.dropped_layers else request.len_kept
                for row, length in enumerate(lengths):
                    buffer[row, :, length:] = np.nan
            np.testing.assert_array_equal(session.step([3, 5, 7]), logits)


def test_step_writes_its_slot_only(tmp_path):
    """A step changes exactly slot `len` of each row in each layer that it writes."""
    bundle = make_bundle("qwen2", tmp_path / "b")
    plan = bundle.manifest.plan
    with Session.open(bundle.root, threads=1) as session:
        prefill(session, k=1)
        request = session._request
        for _ in range(4):
            kind = session.next_step
            kept, dropped = request.len_kept.copy(), request.len_dropped.copy()
            before = {name: buffer.copy() for name, buffer in request.caches.items()}
            session.step([3, 5, 7])
            for name, buffer in request.caches.items():
                is_dropped = int(name.rpartition(".")[2]) in plan.dropped_layers
                changed = (buffer != before[name]).any(axis=(1, 3))  # [B, slots]
                wanted = np.zeros_like(changed)
                if not is_dropped or kind is StepKind.REFRESH:
                    wanted[np.arange(3), dropped if is_dropped else kept] = True
                np.testing.assert_array_equal(changed, wanted, err_msg=name)


def test_load_adapters_is_exporting_with_them(tmp_path):
    """Room for adapters, filled at run time, gives the bundle that was exported with them; and back to zero again."""
    options = {"surrogate": "recurrent", "injection": "attn_mlp"}
    empty = make_bundle("llama", tmp_path / "empty", rank=4, **options)
    model, plan = empty.manifest.model, empty.manifest.plan
    adapters = save_adapters(tmp_path / "a", plan, model.hidden_size, model.fingerprint)
    full = make_bundle("llama", tmp_path / "full", adapters=adapters, **options)
    with Session.open(empty.root, threads=1) as ours, Session.open(full.root, threads=1) as theirs:
        prefill(ours, k=3)
        without = ours.step([3, 5, 7]).copy()
        ours.load_adapters(adapters)
        with pytest.raises(InputError, match="no running request"):
            ours.step([3, 5, 7])
        for session in (ours, theirs):
            prefill(session, k=3)
        for _ in range(5):
            ours_logits, theirs_logits = ours.step([3, 5, 7]), theirs.step([3, 5, 7])
            np.testing.assert_array_equal(ours_logits, theirs_logits)
        assert np.abs(without - theirs_logits).max() > 1e-2
    wrong = save_adapters(tmp_path / "w", plan, model.hidden_size, "another model")
    with Session.open(empty.root, threads=1) as session:
        with pytest.raises(PlanError, match="another base model"):
            session.load_adapters(wrong)
        prefill(session, k=3)
        np.testing.assert_array_equal(session.step([3, 5, 7]), without)


def test_sessions_do_not_spin_between_steps(plain):
    """Else the threads of the session that waits take the cores from the one that runs (DECISIONS.md)."""
    with Session.open(plain.root) as session:
        for ort_session in session._engine._sessions.values():
            options = ort_session.get_session_options()
            assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_int4_takes_no_kernels_that_round_a_row_as_a_whole(plain, tmp_path):
    """Those of KleidiAI, which is there on ARM alone, do so without zero points (docs/int4-quality.md)."""
    for bundle, said in ((make_bundle("llama", tmp_path / "b", dtype="int4", quantization="rtn"), "1"), (plain, None)):
        with Session.open(bundle.root) as session:
            options = session._engine._sessions[StepKind.REFRESH].get_session_options()
            if said is None:
                with pytest.raises(RuntimeError, match="does not have configuration"):
                    options.get_session_config_entry("mlas.disable_kleidiai")
            else:
                assert options.get_session_config_entry("mlas.disable_kleidiai") == said


def test_a_step_that_finds_no_memory_is_not_said_to_have_a_damaged_bundle(plain, monkeypatch):
    def run(self, binding, options=None):
        raise RuntimeError("bfc_arena.cc:360 AllocateRawInternal Failed to allocate memory for requested buffer of 9")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run)
    with Session.open(plain.root) as session, pytest.raises(BundleError, match="cannot run a step") as refused:
        session.generate(PROMPTS, max_new_tokens=2)
    assert "AllocateRawInternal" in refused.value.note
    assert refused.value.hint == "Free memory, or raise the limit on it (ulimit -v)."


def test_no_room_for_adapters(plain, tmp_path):
    with Session.open(plain.root) as session, pytest.raises(InputError, match="no room"):
        session.load_adapters(tmp_path)


# ── other providers: no GPU here, so what can be shown is shown with host memory in the place of the device's ──────


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    """float16 with room for adapters, for ort and tensorrt-rtx: engines of four layers take half as long to build."""
    options = {"max_seq_len": 64, "rank": 2, "surrogate": "recurrent", "always_first": 1}
    options |= {"targets": ("ort", "tensorrt-rtx"), "builder": BuilderOptions(compute_capabilities=("8.9",))}
    return make_bundle(first_layers("llama", 4, "float16"), tmp_path_factory.mktemp("half") / "b", **options)


def half_run(engine: OrtEngine, bundle, adapters) -> np.ndarray:
    with Session(bundle, engine, PeriodicSchedule(2)) as session:
        logits = [prefill(session, k=2), *(session.step([3, 5, 7]) for _ in range(5))]
        logits = [step.copy() for step in logits]
        session.load_adapters(adapters)
        logits += [prefill(session, k=2).copy(), *(session.step([3, 5, 7]).copy() for _ in range(5))]
        long = np.random.default_rng(0).integers(0, 131, (2, 40))  # row by row: slices of buffers
        logits.append(np.pad(session.prefill(long, max_new_tokens=2), ((0, 1), (0, 0))))
    return np.stack(logits)


def copies_when_bound(monkeypatch, whole: set[str]) -> None:
    """As a GPU's provider does: host inputs are copied when they are bound, and not looked at again.

    Args:
        whole: those that kernels read on the host, at each run.
    """
    bind, copies = onnxruntime.IOBinding.bind_input, {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        # Host memory: the engine names the dtypes of device memory by number
        if isinstance(element_type, type) and name not in whole:
            size = int(np.prod(shape)) * np.dtype(element_type).itemsize
            copy = np.frombuffer(bytes((ctypes.c_char * size).from_address(buffer_ptr)), np.uint8).copy()
            copies[id(self), name] = copy
            buffer_ptr = copy.ctypes.data
        bind(self, name, device_type, device_id, element_type, shape, buffer_ptr)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", bind_input)


def host_for_cuda(monkeypatch) -> None:
    """Provider `cuda` runs on the CPU, with OrtValues in host memory."""
    monkeypatch.setitem(engine_ort.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(engine_ort.DeviceMemory, "device_type", "cpu")
    upload = DeviceMemory._upload  # a copy, as on a GPU: an OrtValue on the CPU is the mapped file itself
    monkeypatch.setattr(DeviceMemory, "_upload", lambda memory, name, content: upload(memory, name, content.copy()))
    monkeypatch.setattr(engine_ort, "check_runs", lambda *_: None)
    monkeypatch.setattr(engine_ort, "check_placement", lambda *_: None)
    copies_when_bound(monkeypatch, set(TOTALS.values()))


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_buffers_bound_by_address(target, half_bundle, tmp_path, monkeypatch):
    """What runs on a GPU, with OrtValues in host memory: bit for bit what numpy arrays give, and all of it freed.

    It cannot show the CUDA provider's kernels, its copies, or that it is faster.
    """
    plan = half_bundle.manifest.plan
    adapters = save_adapters(tmp_path / "adapters", plan, 64, half_bundle.manifest.model.fingerprint, rank=2)
    monkeypatch.setattr("lora_drop_runtime.decoding.request.PREFILL_CHUNK", 16)
    expected = half_run(OrtEngine(half_bundle, target), half_bundle, adapters)
    host_for_cuda(monkeypatch)
    engine = OrtEngine(half_bundle, target, provider="cuda")
    memory = engine._memory
    assert memory is not None
    np.testing.assert_array_equal(half_run(engine, half_bundle, adapters), expected)
    caches = {name for name in memory._values if name.startswith("past_")}
    assert len(caches) == 2 * half_bundle.manifest.plan.num_layers
    assert "logits" in memory._values
    assert engine._memory is None  # closed
    assert not engine._weights


def test_a_plan_that_keeps_no_attention_runs_on_a_gpu(tmp_path, monkeypatch):
    """No cache says how many slots the kept layers have; the total, which is the capacity there, is an int32."""
    plan = {"drop_ratio": 1.0, "always_first": 0, "always_last": 0}
    bundle = make_bundle(first_layers("llama", 4, "float16"), tmp_path / "b", max_seq_len=64, **plan)
    assert not bundle.manifest.plan.kept_attentions
    with Session.open(bundle.root, threads=1, k=2) as session:
        expected = session.generate(PROMPTS, 6, stop_token_ids=())
    host_for_cuda(monkeypatch)
    with Session.open(bundle.root, provider="cuda", threads=1, k=2) as session:
        for ours, theirs in zip(session.generate(PROMPTS, 6, stop_token_ids=()), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_prompts_run_in_whole_chunks_on_rtx(half_bundle, tmp_path, monkeypatch):
    """Under the profile for prompts, which each run names; the graphs stand for the engines, on the CPU."""
    root = tmp_path / "b"
    shutil.copytree(half_bundle.root, root)
    entry = half_bundle.target("tensorrt-rtx")[1]
    for kind, file in entry.ep_context.items():
        shutil.copy(root / entry.graphs[kind], root / file)
    record_again(root)
    made, seen = DeviceMemory(onnxruntime, None), []
    made.device_type = "cpu"
    run = onnxruntime.InferenceSession.run_with_iobinding

    def running(session, binding, options):
        shape = session.get_inputs()[0].shape
        seen.append((shape[1], options.get_run_config_entry("nv_profile_index")))
        run(session, binding, options)

    def choosing(options, devices, settings):
        assert settings == {"nv_multi_profile_enable": "1"}

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", running)
    monkeypatch.setattr(onnxruntime.SessionOptions, "add_provider_for_devices", choosing)
    monkeypatch.setitem(engine_ort.PROVIDERS, "rtx", "CPUExecutionProvider")
    monkeypatch.setattr(engine_ort, "rtx_device", lambda *_: object())
    monkeypatch.setattr(engine_ort, "DeviceMemory", lambda *_: made)
    with Session.open(root, target="tensorrt-rtx", provider="rtx", k=2) as session:
        session.prefill(np.ones((1, 40), np.int64), max_new_tokens=4)
        for _ in range(3):
            session.step([3])
    profiles = list(entry.refresh_profiles)
    assert entry.refresh_profiles["decode"][1] < 40 <= entry.prefill_chunk
    decode, prompt = str(profiles.index("decode")), str(profiles.index("prefill"))
    assert seen == [("sequence", prompt), (1, "0"), (1, "0"), ("sequence", decode)]


@pytest.mark.parametrize(
    ("target", "provider", "note"),
    [
        ("ort", "cuda", "'cuda' was asked for, the installed ONNX Runtime has cpu"),
        ("ort", "rtx", "'rtx' was asked for; target 'ort' in float16 runs on cpu, cuda"),
        ("tensorrt-rtx", "cuda", "'cuda' was asked for; target 'tensorrt-rtx' in float16 runs on cpu, rtx"),
        ("tensorrt-rtx", "rtx", "NvTensorRTRTXExecutionProvider"),
    ],
)
def test_providers_that_cannot_run_here(target, provider, note, half_bundle):
    with pytest.raises(NoDeviceError) as caught:
        Session.open(half_bundle.root, target=target, provider=provider)
    assert note in caught.value.note
    assert caught.value.hint


def test_float32_does_not_run_on_cuda(plain):
    with pytest.raises(NoDeviceError, match="float32 runs on cpu"):
        Session.open(plain.root, provider="cuda")
    with pytest.raises(BundleError, match="'metal' was asked for"):
        Session.open(plain.root, provider="metal")


def test_half_precision_on_the_cpu_is_said_to_be_slow(half_bundle):
    with Session.open(half_bundle.root, target="ort") as session:
        assert "slowly" in session.engine_notes()[0]


def test_engines_are_wrapped_for_the_rtx_provider(half_bundle):
    """One EPContext node with the engine's inputs and outputs, naming the engine beside it."""
    entry = half_bundle.target("tensorrt-rtx")[1]
    for kind in StepKind:
        graph, wrapped = (
            onnx.load(half_bundle.root / getattr(entry, part)[kind.value], load_external_data=False).graph
            for part in ("graphs", "ep_context")
        )
        (node,) = wrapped.node
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (node.op_type, node.domain) == ("EPContext", "com.microsoft")
        assert attributes["embed_mode"] == 0
        engine = half_bundle.root / "tensorrt-rtx" / attributes["ep_cache_context"].decode()
        assert engine == half_bundle.root / entry.engine(kind)
        assert list(wrapped.input) == list(graph.input)
        assert list(wrapped.output) == list(graph.output)
        assert list(node.input) == [value.name for value in graph.input]


def test_half_precision_graphs_are_compared_on_the_cpu(half_bundle):
    """No GPU: the targets are not run, their graphs agree with PyTorch in float16 as far as float16 goes."""
    verified = verify(half_bundle, console=Console(), threads=1)
    for target in ("ort", "tensorrt-rtx"):
        result = verified.manifest.verification[target]
        if result["status"] == "not run":
            result = result["graphs_on_cpu"]
        assert result["status"] == "passed"
        assert 1e-5 < result["max_abs_error"] < 0.1  # it is float16 that was compared

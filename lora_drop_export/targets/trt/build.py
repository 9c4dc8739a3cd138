"""The graphs of lower.py → serialized engines, by TensorRT-RTX or TensorRT.

Enters: ONNX, the bundle's root for its external weights, profiles, options. Leaves: engine bytes and a timing cache.
One module serves both libraries, whose Python interfaces are the same where it matters:

    tensorrt-rtx   parses, builds and serializes without a GPU, for the compute capabilities that are named; the native
                   form alone, since its parser ends the process on a plugin node
    tensorrt       builds for the GPU of this machine

The native attention gets the lengths of its keys after the parse, for which ONNX has no form that the parser takes: its
mask, which the same graph needs on a CPU, is left out then.

An input that no layer of the parsed network reads is an error, and so is an input of Attention that the parser drops
without a word (nonpad_kv_seqlen): the attention would be computed over something else than was asked.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from lora_drop_runtime.command_line import held_signals
from lora_drop_runtime.engines.trt.library import error_logger
from lora_drop_runtime.engines.trt.plugin import load_plugin
from lora_drop_runtime.errors import ModelError

from lora_drop_export.console import Console, Progress

from .options import BuilderOptions, built_for, check_buildable, compute_capability
from .plugin_form import PLUGIN_NAMESPACE
from .profiles import Profile, optimization_profile, symbolic_dims
from .quantized import sign_weights


def _flags(flags: Any, *names: str) -> int:
    """A bit mask; a flag that the library no longer has is its only behaviour by now."""
    return sum(1 << int(getattr(flags, name)) for name in names if hasattr(flags, name))


def _ignored_inputs(proto: onnx.ModelProto, network: Any) -> list[str]:
    """Inputs that would not count: those that no layer reads, and those of Attention past its mask."""
    read = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors = (layer.get_input(i) for i in range(layer.num_inputs))
        read |= {tensor.name for tensor in tensors if tensor is not None}
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    past_mask = [name for node in proto.graph.node if node.op_type == "Attention" for name in node.input[4:] if name]
    return [name for name in inputs if name not in read] + sorted(set(past_mask))


def _unmask(proto: onnx.ModelProto) -> dict[str, str]:
    """Take the masks without a window away; of each attention, by its values, the input that its mask began with."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    lengths = {}
    for node in proto.graph.node:
        if node.op_type == "Attention":
            lengths[node.input[2]] = makers[node.input[2]].input[2]
            mask = makers.get(node.input[3])
            if mask is not None and mask.op_type != "And":
                del node.input[3:]
    return lengths


def _set_attention(trt: Any, network: Any, lengths: Mapping[str, str]) -> None:
    """Tell attentions their valid slots, and let them be built from smaller layers where there is no kernel for them.

    Token s of S new ones of a row with `length` slots before sees slot c iff c <= length + s. That is what LOWER_RIGHT
    means for `length + S` keys: padding counts, since tokens before it would see too little else. A mask with a sliding
    window stays, beside the lengths.
    """
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    valid: dict[str, Any] = {}  # int32 [B], by the length's name
    for name in sorted(set(lengths.values())):
        sizes = network.add_shape(inputs["input_ids"]).get_output(0)
        tokens = network.add_slice(sizes, (1,), (1,), (1,)).get_output(0)
        total = network.add_elementwise(inputs[name], tokens, trt.ElementWiseOperation.SUM).get_output(0)
        valid[name] = network.add_cast(total, trt.int32).get_output(0)
        valid[name].name = f"valid.{name}"
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to a subclass
            attention = layer.attention
            attention.decomposable = True
            if lengths:
                if attention.mask is None:
                    attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
                attention.key_value_lengths = valid[lengths[attention.get_input(2).name]]


def _progress_monitor(trt: Any, progress: Progress, signals: Sequence[int]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phase that has steps; a signal that is held, or an error in showing, ends the build."""

        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, tuple[int, int]] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                done, total = self.phases[phase_name]
                self.phases[phase_name] = (done + 1, total)
                if phase_name == next(iter(self.phases)):
                    progress(phase_name, done + 1, total)
            except BaseException as error:  # which the library would lose
                self.error = error
            return self.error is None and not signals

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


class EngineBuilder:
    """Builds engines with one of the two libraries; the timing cache passes from one engine to the next.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        root: the bundle, to whose files the graphs' external weights refer.
        timing_cache: of an earlier build, or empty.

    Raises:
        InputError: the library does not build for a compute capability.
        BundleError: it is not installed.
    """

    def __init__(self, target: str, root: Path, options: BuilderOptions, console: Console, timing_cache: bytes = b""):
        self.trt = check_buildable(target, options)
        self.options = options
        self.timing_cache = timing_cache
        self._target, self._root, self._console = target, root, console
        self._logger = error_logger(self.trt)

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def reads_valid_slots(self) -> bool:
        """Whether the native attention takes lengths; without them it reads its caches' whole capacity."""
        return hasattr(getattr(self.trt, "IAttention", None), "key_value_lengths")

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """GPU generations that the engines run on."""
        return built_for(self._target, self.options)

    def parse(self, proto: onnx.ModelProto) -> tuple[Any, Any]:
        """(builder, network) of a graph.

        Raises:
            ModelError: the parser refuses the graph, or would ignore one of its inputs.
        """
        trt = self.trt
        self._logger.clear()
        if any(node.domain == PLUGIN_NAMESPACE for node in proto.graph.node):
            load_plugin(trt)
        builder = trt.Builder(self._logger)
        network = builder.create_network(_flags(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"))
        parser = trt.OnnxParser(network, self._logger)
        parsed, lengths = onnx.ModelProto(), {}
        parsed.CopyFrom(proto)
        if self.reads_valid_slots:
            lengths = _unmask(parsed)
        file = tempfile.NamedTemporaryFile(dir=self._root, prefix="signed-", delete=False)  # noqa: SIM115 closed below
        with contextlib.ExitStack() as stack:
            stack.callback(Path(file.name).unlink)
            with file:  # closed before it is read: Windows opens no file again that goes when it is closed
                sign_weights(parsed, self._root, file)
            # Any name inside the root will do: only its directory counts, for the external weights
            file_name = str(self._root.resolve() / f"{proto.graph.name}.onnx")
            with held_signals():  # the logger is called, in which what a handler raises would be lost
                taken = parser.parse(parsed.SerializeToString(), file_name)
        if not taken:
            errors = [
                f"{error.node_operator()} {error.node_name()}: {error.desc()}"
                for error in map(parser.get_error, range(parser.num_errors))
            ]
            raise self._error("cannot parse a step graph", proto, errors or list(self._logger.lines))
        ignored = _ignored_inputs(proto, network)
        if ignored:
            raise self._error("would ignore inputs of a step graph", proto, [", ".join(ignored)])
        if hasattr(trt, "IAttentionInputLayer"):
            _set_attention(trt, network, lengths)
        return builder, network

    def build(self, proto: onnx.ModelProto, profiles: Mapping[str, Profile]) -> bytes:
        """A serialized engine with these profiles, in their order.

        Raises:
            ModelError: the library cannot build it; the message has its own words.
        """
        trt, options = self.trt, self.options
        builder, network = self.parse(proto)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32: TF32 has the mantissa of float16
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self._target == "tensorrt-rtx":
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else its contexts cannot be captured
            config.num_compute_capabilities = len(self.compute_capabilities)
            for index, capability in enumerate(self.compute_capabilities):
                config.set_compute_capability(compute_capability(trt, capability), index)
        elif options.alias and any(node.domain == PLUGIN_NAMESPACE for node in proto.graph.node):
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        symbols = {value.name: symbolic_dims(value) for value in proto.graph.input}
        for profile in profiles.values():
            config.add_optimization_profile(optimization_profile(builder, symbols, profile))
        cache = None
        if self._target == "tensorrt":  # tensorrt-rtx times nothing when it builds
            cache = config.create_timing_cache(self.timing_cache)
            if not config.set_timing_cache(cache, False):
                self._console.say(
                    "the timing cache of the earlier build was measured on another GPU or by another version, so it is "
                    "not used"
                )
                cache = config.create_timing_cache(b"")
                config.set_timing_cache(cache, False)
        what = f"{self._target}: {proto.graph.name} engine"
        with self._console.progress(what) as progress, held_signals() as signals:  # likewise
            monitor = config.progress_monitor = _progress_monitor(trt, progress, signals)
            plan = builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
        if plan is None:
            limit = options.workspace_mib
            more = "" if limit is None else f"Leave --workspace-mib {limit} out, or give more. "
            raise self._error("cannot build an engine", proto, list(self._logger.lines), more)
        unused = [line for line in self._logger.warnings if re.search(r"unused input", line, re.IGNORECASE)]
        if unused:
            raise self._error("ignored an input of a step graph", proto, unused)
        if cache is not None:
            self.timing_cache = bytes(cache.serialize())
        return bytes(plan)

    def _error(self, what: str, proto: onnx.ModelProto, lines: list[str], hint: str = "") -> ModelError:
        other = "--dtype or --attention" if self._target == "tensorrt" else "--dtype"
        return ModelError(
            f"{self._target} {what}.",
            note=f"{proto.graph.name}, version {self.version}: {' | '.join(lines[-2:]) or 'it gave no reason'}",
            hint=f"{hint}Try another {other}; if it stays, report it with the model's config.",
        )

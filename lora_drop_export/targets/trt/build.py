"""The graphs of lower_trt.py → serialized engines, by TensorRT-RTX or TensorRT.

Enters: ONNX, the bundle's root for its external weights, profiles, options. Leaves: engine bytes and a timing cache.
One module serves both libraries, whose Python interfaces are the same where it matters:

    tensorrt-rtx   parses, builds and serializes without a GPU, for the compute capabilities that are named; the native
                   form alone, since its parser ends the process on a plugin node
    tensorrt       builds for the GPU of this machine

An input that no layer of the parsed network reads is an error, and so is an input of Attention that the parser drops
without a word (nonpad_kv_seqlen): the attention would be computed over something else than was asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from lora_drop_runtime.engines.trt.library import error_logger, library
from lora_drop_runtime.engines.trt.plugin import load_plugin, plugin_path
from lora_drop_runtime.errors import InputError, ModelError

from lora_drop_export.console import Console
from lora_drop_export.weights.store import Progress

from .lower import PLUGIN_NAMESPACE

COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")  # GeForce and RTX of the Ampere, Ada and Blackwell generations
Range = tuple[int, int, int]  # smallest, most frequent, largest
Profile = Mapping[str, Range]  # symbolic size → its range


@dataclass(frozen=True)
class BuilderOptions:
    """Options of the engine build; None leaves the library's default.

    Args:
        workspace_mib: most scratch memory that a layer may use, in MiB.
        optimization_level: 0 (fast build) to 5.
        hardware_compatible: engines that also run on newer GPU generations (tensorrt; Ampere and later).
        version_compatible: engines that newer versions of the library run.
        compute_capabilities: GPU generations that a tensorrt-rtx engine is built for.
        alias: whether the plugin tells TensorRT that it updates its caches in place. If not, the builder cannot plan
            a copy of them around it; past and present are bound to one address in either case.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    compute_capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES
    alias: bool = True

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise InputError(
                "Unknown optimization level.", note=f"It is {level}, known are 0 to 5.", hint="Leave it out for 3."
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(
                "The workspace must be positive.", note=f"It is {self.workspace_mib} MiB.", hint="Leave it out."
            )
        if not self.compute_capabilities or len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            raise InputError(
                "The compute capabilities must be named once each.",
                note=f"Given are {', '.join(self.compute_capabilities) or 'none'}.",
                hint=f"Use --compute-capability {COMPUTE_CAPABILITIES[0]}.",
            )


def refresh_profiles(k: int, max_batch: int, prefill_chunk: int) -> dict[str, Profile]:
    """One profile for decode steps, of up to k + 1 tokens a row, and one for chunks of a prefill."""
    batch = (1, 1, max_batch)
    return {
        "decode": {"batch": batch, "sequence": (1, 1, k + 1), "rows": (1, 1, k + 1)},
        "prefill": {"batch": batch, "sequence": (1, prefill_chunk, prefill_chunk), "rows": (1, 1, 1)},
    }


def lora_profiles(max_batch: int) -> dict[str, Profile]:
    return {"decode": {"batch": (1, 1, max_batch)}}


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
    def compute_capabilities(self) -> tuple[str, ...]:
        """GPU generations that the engines run on; for tensorrt that of this machine's GPU."""
        if self._target == "tensorrt-rtx":
            return self.options.compute_capabilities
        from lora_drop_runtime.engines.trt.cuda_device import device_compute_capability

        return (device_compute_capability(),)

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
        # Any name inside the root will do: only its directory counts, for the external weights
        if not parser.parse(proto.SerializeToString(), str(self._root.resolve() / f"{proto.graph.name}.onnx")):
            errors = [
                f"{error.node_operator()} {error.node_name()}: {error.desc()}"
                for error in map(parser.get_error, range(parser.num_errors))
            ]
            raise self._error("cannot parse a step graph", proto, errors or list(self._logger.lines))
        ignored = _ignored_inputs(proto, network)
        if ignored:
            raise self._error("would ignore inputs of a step graph", proto, [", ".join(ignored)])
        _allow_decomposition(trt, network)
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
            config.num_compute_capabilities = len(options.compute_capabilities)
            for index, capability in enumerate(options.compute_capabilities):
                config.set_compute_capability(_compute_capability(trt, capability), index)
        elif options.alias and any(node.domain == PLUGIN_NAMESPACE for node in proto.graph.node):
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        symbols = {value.name: _dims(value) for value in proto.graph.input}
        for profile in profiles.values():
            config.add_optimization_profile(_optimization_profile(builder, symbols, profile))
        cache = None
        if self._target == "tensorrt":  # tensorrt-rtx times nothing when it builds
            cache = config.create_timing_cache(self.timing_cache)
            if not config.set_timing_cache(cache, False):
                self._console.say("the timing cache of the earlier build is of another GPU or version: not used")
        with self._console.progress(f"{self._target}: {proto.graph.name} engine") as progress:
            monitor = config.progress_monitor = _progress_monitor(trt, progress)
            plan = builder.build_serialized_network(network, config)
        if monitor.interrupted:
            raise KeyboardInterrupt
        if plan is None:
            raise self._error("cannot build an engine", proto, list(self._logger.lines))
        unused = [line for line in self._logger.warnings if re.search(r"unused input", line, re.IGNORECASE)]
        if unused:
            raise self._error("ignored an input of a step graph", proto, unused)
        if cache is not None:
            self.timing_cache = bytes(cache.serialize())
        return bytes(plan)

    def _error(self, what: str, proto: onnx.ModelProto, lines: list[str]) -> ModelError:
        return ModelError(
            f"{self._target} {what}.",
            note=f"{proto.graph.name}, version {self.version}: {' | '.join(lines[-2:]) or 'it gave no reason'}",
            hint="Try another --dtype or --attention; if it stays, report it with the model's config.",
        )


def check_buildable(target: str, options: BuilderOptions, form: str | None = None) -> Any:
    """The Python module of a target; refuses early what would end an export late.

    Raises:
        InputError: it does not build for a compute capability, or has not got an option.
        BundleError: it is not installed; the plugin form, and no plugin.
    """
    trt = library(target)
    if target == "tensorrt-rtx":
        for capability in options.compute_capabilities:
            _compute_capability(trt, capability)
        if options.hardware_compatible:
            raise InputError(
                "The target has no such option.",
                note="--hardware-compatible is of tensorrt; tensorrt-rtx builds for the capabilities that it is given.",
                hint="Name them with --compute-capability.",
            )
    elif form == "plugin":
        plugin_path()
    return trt


def _compute_capability(trt: Any, capability: str) -> Any:
    name = f"SM{capability.replace('.', '')}"
    known = [f"{key[2:-1]}.{key[-1]}" for key in vars(trt.ComputeCapability) if re.fullmatch(r"SM\d+", key)]
    if capability not in known:
        raise InputError(
            "The library does not build for that compute capability.",
            note=f"{capability!r} was asked for, tensorrt-rtx {trt.__version__} knows {', '.join(known)}.",
            hint="Name known ones with --compute-capability.",
        )
    return getattr(trt.ComputeCapability, name)


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


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attentions for which the library has no kernel of its own be built from smaller layers."""
    if not hasattr(trt, "IAttentionInputLayer"):
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to a subclass
            layer.attention.decomposable = True


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _optimization_profile(builder: Any, symbols: Mapping[str, list[int | str]], profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, dims in symbols.items():
        if any(isinstance(dim, str) for dim in dims):
            made.set_shape(name, *([profile[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)))
    return made


def _progress_monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phase that has steps; an interrupt ends the build."""

        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, tuple[int, int]] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                done, total = self.phases[phase_name]
                self.phases[phase_name] = (done + 1, total)
                if phase_name == next(iter(self.phases)):
                    progress(phase_name, done + 1, total)
            except KeyboardInterrupt:  # raised here when the user presses Ctrl-C during the build
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()

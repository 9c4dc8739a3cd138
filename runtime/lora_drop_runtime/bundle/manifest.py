"""The manifest, `lora_drop.json`, as frozen classes; `read_manifest` (manifest_reader.py) makes them of a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind

from .graph_io import MOST_PENDING, CacheShape, GraphIO, Heads, LoweredIO, Recurrence, graph_io

FORMAT_VERSION = 5
MANIFEST_NAME = "lora_drop.json"
VERIFY_NAME = "verify.json"
ADAPTERS_NAME, KV_SCALES_NAME = "adapters.safetensors", "kv_scales.safetensors"  # beside the weights
ATTENTION_FORMS = ("native", "plugin")  # of the device targets
WEIGHT_SHARINGS = ("inputs", "constants")
INTEGER_DTYPES = ("int4", "int8")  # of weights in blocks, each with a scale
CHANNEL: Final = "channel"  # their block size where one scale is for a whole row, an output channel
QUANTIZED_DTYPES = (*INTEGER_DTYPES, "float8_e4m3fn")  # of weights; of fp8 a row has a scale


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime and the cost formulas need to know of the model.

    `fingerprint` identifies the base weights whatever dtype they are stored in; `windows` holds each layer's sliding
    window in positions, of a short convolution how many it mixes, 0 for none; `dtype` is of activations and, unless
    there is a `kv_dtype`, of caches; `weight_dtype` is one of `QUANTIZED_DTYPES` where linear layers are quantized; the
    byte counts are as stored in the bundle. Of `layer_bytes`, `attention_bytes` are those of the attention's half, and
    of these `kv_bytes` what makes K and V of the layer's input; 0 where a layer has no halves. `layer_heads` has an
    entry for each layer where they differ in their heads, of a layer without attention `NO_HEADS`; the three figures
    of all layers are those of the first attention then. Where there is a `recurrence`, the `recurrent_layers` have it,
    with or without attention beside it; in `windows` they have the tokens that its convolution mixes. Of a mixture,
    `expert_bytes` of each layer are those of its experts, of which a token reads the share `expert_share`.
    """

    name: str
    model_type: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    dtype: str
    windows: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    attention_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    head_bytes: int
    embedding_row_bytes: int
    weight_dtype: str = "float32"
    kv_dtype: str | None = None
    layer_heads: tuple[Heads, ...] = ()
    expert_bytes: tuple[int, ...] = ()
    expert_share: float = 1.0
    recurrence: Recurrence | None = None
    recurrent_layers: tuple[int, ...] = ()

    @property
    def heads(self) -> tuple[Heads, ...]:
        """Of each layer."""
        return self.layer_heads or (Heads(self.num_heads, self.kv_heads, self.head_dim),) * self.num_layers

    @property
    def cache(self) -> CacheShape:
        return CacheShape(self.heads, self.dtype, self.kv_dtype, self.recurrence, self.recurrent_layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layers' weights and the head's."""
        return sum(self.layer_bytes) + self.head_bytes

    def read_bytes(self, layer: int, tokens: int = 1) -> int:
        """Bytes of a layer's weights that a step over so many tokens reads: of experts, those of all that any token is
        sent to, were each sent to any of them with the same chance."""
        if not self.expert_bytes:
            return self.layer_bytes[layer]
        unread = (1 - self.expert_share) ** tokens
        return self.layer_bytes[layer] - round(self.expert_bytes[layer] * unread)

    @property
    def convolutions(self) -> tuple[int, ...]:
        """Layers with a short convolution: their caches are halves of the stream, and they have a window."""
        halves = Heads(1, 1, self.hidden_size // 2)
        pairs = enumerate(zip(self.heads, self.windows, strict=True))
        return tuple(layer for layer, (heads, window) in pairs if heads == halves and window)

    def recurrent_row_bytes(self, paged: bool) -> int:
        """Bytes that a row has in the layers with a recurrent state, however long it is."""
        values = 0 if self.recurrence is None else len(self.recurrent_layers) * self.recurrence.row_values(paged)
        return values * BY_NAME[self.dtype].size_bytes

    def token_kv_bytes(self, layers: Iterable[int]) -> int:
        """Bytes of one token's K and V in these layers."""
        heads = self.heads
        values = sum(heads[n].kv_heads * heads[n].head_dim for n in layers)
        return 2 * values * BY_NAME[self.kv_dtype or self.dtype].size_bytes


@dataclass(frozen=True)
class Limits:
    """Largest request the bundle accepts: tokens of a row (prompt + new), of a prompt, rows of a batch."""

    max_seq_len: int
    max_prompt_len: int
    max_batch: int


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids from the generation config: where generation stops, and what pads a batch."""

    eos: tuple[int, ...] = ()
    pad: int = 0


@dataclass(frozen=True)
class FileRecord:
    """A file's size, and the SHA-256 of its content."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Calibration:
    """The threshold of an adaptive schedule, and what `lora-drop eval --calibrate` measured with it.

    Attributes:
        threshold: in logits (`margin`) or nats (`entropy`).
        k, policy: what it was found for: the most LoRA steps between two refreshes, and what refreshes do.
        wanted: the share of decode steps whose likeliest token shall be the full schedule's.
        agreement, refresh_share: what was reached on the text that it was found on, over `tokens` decode steps.
        held_out_agreement, held_out_refresh_share, held_out_tokens: the same on other text.
    """

    threshold: float
    k: int
    policy: str
    wanted: float
    agreement: float
    refresh_share: float
    tokens: int
    held_out_agreement: float
    held_out_refresh_share: float
    held_out_tokens: int


@dataclass(frozen=True)
class TargetEntry:
    """What the manifest says of a target: a class each, found by the target's name in `ENTRIES`.

    Its fields are the JSON object's keys, in their order; one whose default is None is left out where it is None.
    Files are named relative to the bundle's root.

    Attributes:
        lowered: in what its graphs differ from the neutral ones.
        on_device: whether its own engine runs on a GPU.
        is_paged: whether rows take K/V caches by blocks as they come, not all slots in advance.
        takes_cache_scales: whether 8-bit caches have the calibrated scales; else the engine finds its own as it writes.
    """

    lowered: ClassVar[LoweredIO] = LoweredIO()
    on_device: ClassVar[bool] = False
    is_paged: ClassVar[bool] = False
    takes_cache_scales: ClassVar[bool] = True

    @property
    def step_io(self) -> LoweredIO:
        """`lowered` as this entry's own files have it."""
        return self.lowered

    @property
    def files(self) -> tuple[str, ...]:
        """The files that opening it reads."""
        return ()

    @property
    def weight_table(self) -> str | None:
        """The file with the table of weights that are inputs of its graphs; None where there are none."""
        return None

    def resident(self, stored_bytes: int) -> tuple[int, str]:
        """Bytes in memory once opened, K/V cache and activations aside, and in words what they are.

        Args:
            stored_bytes: of the bundle's weights.
        """
        return stored_bytes, "the weights, once for both steps"


@dataclass(frozen=True)
class OrtEntry(TargetEntry):
    """ONNX Runtime, with activations in float32 for the CPU, in halves for a GPU.

    Attributes:
        steps: the graph that holds both steps (float32).
        graphs: step → its graph, whose weights are inputs (halves).
        weights: the table of these.
    """

    lowered = LoweredIO(joined=True, head_multiple=8)  # GroupQueryAttention takes no other heads

    steps: str | None = None
    graphs: Mapping[str, str] | None = None
    weights: str | None = None

    @property
    def step_io(self) -> LoweredIO:
        return dataclasses.replace(self.lowered, joined=self.steps is not None)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(name for name in (self.steps, *(self.graphs or {}).values(), self.weights) if name is not None)

    @property
    def weight_table(self) -> str | None:
        return self.weights


@dataclass(frozen=True)
class OpenVinoEntry(TargetEntry):
    """OpenVINO: `steps` is the graph that holds both steps, over paged caches (paged_io.py)."""

    is_paged = True
    takes_cache_scales = False

    steps: str

    @property
    def files(self) -> tuple[str, ...]:
        return (self.steps,)


@dataclass(frozen=True, kw_only=True)
class TrtEntry(TargetEntry):
    """TensorRT or TensorRT-RTX: an engine for each step.

    Attributes:
        form: of the attention, `native` or `plugin`.
        weight_sharing: whether weights are `inputs` of both engines, or `constants` in each.
        slots: capacity of each cache group, `kept` and `dropped`.
        prefill_chunk: most tokens of a row in one call of a prefill.
        refresh_profiles: name → fewest and most tokens of a row.
        graphs: step → the ONNX that its engine was built from.
        engine_bytes: step → size of its engine.
        version: of the library that built them.
        compute_capabilities: GPU generations that they run on; also later ones where `hardware_compatible`.
        version_compatible: whether later versions of the library load them.
        refresh, lora: the engines.
        ep_context: step → the engine as an EPContext node (tensorrt-rtx).
        weights: the table of weights, where those are inputs.
        weight_bytes: of all weights that the engines read or hold.
        timing_cache: what the builder measured (tensorrt).
    """

    lowered = LoweredIO(chooses_tokens=True)
    on_device = True

    form: str
    weight_sharing: str
    slots: Mapping[str, int]
    prefill_chunk: int
    refresh_profiles: Mapping[str, tuple[int, int]]
    graphs: Mapping[str, str]
    engine_bytes: Mapping[str, int]
    version: str
    compute_capabilities: tuple[str, ...]
    hardware_compatible: bool
    version_compatible: bool
    refresh: str
    ep_context: Mapping[str, str] | None = None
    lora: str
    weights: str | None = None
    weight_bytes: int
    timing_cache: str | None = None

    def engine(self, kind: StepKind) -> str:
        """The file of a step's engine."""
        return self.refresh if kind is StepKind.REFRESH else self.lora

    @property
    def files(self) -> tuple[str, ...]:
        named = (self.refresh, self.lora, *self.graphs.values(), *(self.ep_context or {}).values())
        return named + tuple(name for name in (self.weights, self.timing_cache) if name is not None)

    @property
    def weight_table(self) -> str | None:
        return self.weights

    def resident(self, stored_bytes: int) -> tuple[int, str]:
        engines, form = sum(self.engine_bytes.values()), f"attention {self.form}"
        if self.weight_sharing == "inputs":
            return engines + self.weight_bytes, f"weights once, as inputs of both engines; {form}"
        return engines, f"weights as constants, in each engine its own; {form}"


@dataclass(frozen=True)
class OtherEntry(TargetEntry):
    """Of a target that this version does not know: kept as it is, so that the bundle's other targets can be run."""

    data: Mapping[str, object]


ENTRIES: dict[str, type[TargetEntry]] = {
    "ort": OrtEntry,
    "openvino": OpenVinoEntry,
    "tensorrt": TrtEntry,
    "tensorrt-rtx": TrtEntry,
}


def _entry_to_dict(entry: TargetEntry) -> Mapping[str, object]:
    """What stands in the manifest for a target: its fields, less those that it has not got."""
    if isinstance(entry, OtherEntry):
        return entry.data
    absent = {f.name for f in dataclasses.fields(entry) if f.default is None and getattr(entry, f.name) is None}
    return {name: value for name, value in dataclasses.asdict(entry).items() if name not in absent}


def too_many_lora_steps(steps: int) -> InputError:
    """The error where so many follow each other in a model with recurrent states."""
    return InputError(
        "Too many LoRA steps follow each other.",
        note=f"They are {steps}; layers with a recurrent state take {MOST_PENDING} between two refreshes.",
        hint=f"Use k of {MOST_PENDING} or less.",
    )


@dataclass(frozen=True)
class Manifest:
    """All that a bundle says of itself.

    `quantization`: bits, block size (or `CHANNEL`; None in fp8), method, and what it cost in perplexity; empty for
    weights as they were.
    `calibration`: by the name of the adaptive schedule.
    `lora_steps`: `tokens` of a sample text behind LoRA steps, and `agreement`, the share of them at which the likeliest
    token is that of all layers.
    These two are left out of the file where they are empty.
    """

    model: ModelFacts
    plan: DropPlan
    limits: Limits
    special_tokens: SpecialTokens
    targets: dict[str, TargetEntry] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verification: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    lora_steps: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def identity(self) -> object:
        """What stays when a target is added or something is measured: the model, the plan, and the weights' files."""
        return self.model, self.plan, {name: file for name, file in self.files.items() if name.startswith("weights/")}

    def io(self, kind: StepKind, target: str | None = None) -> GraphIO:
        """The inputs and outputs of a step's graph: the neutral one, or a target's."""
        model, entry = self.model, self.targets.get(target or "")
        lowered = None if target is None else ENTRIES.get(target, TargetEntry).lowered
        if entry is not None:
            lowered = entry.step_io
        return graph_io(kind, self.plan, model.cache, model.hidden_size, model.vocab_size, lowered)

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        data["targets"] = {name: _entry_to_dict(entry) for name, entry in self.targets.items()}
        for holder, names in (
            (data, ("calibration", "lora_steps")),
            (data["model"], ("recurrence", "recurrent_layers")),
        ):
            for name in names:
                if not holder[name]:
                    del holder[name]
        return json.dumps(data, indent=1) + "\n"

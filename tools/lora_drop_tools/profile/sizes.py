"""What dropping a site saves, in bytes; when a drop list saves as much as so many whole layers.

Enters: a model under teacher forcing, the plan's policy, a context. Leaves: bytes that a LoRA step does not read,
counted as shared/costs.py counts those of a bundle. Measures no loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.bundle.manifest import INTEGER_DTYPES, QUANTIZED_DTYPES
from lora_drop_runtime.dtypes import BY_NAME, BY_SHORT
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.sites import ATTENTION, MLP, half_of, layer_of

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing

    from .settings import ProfileSettings

_BLOCK = 32  # weights of a quantized matrix that share a scale in float32


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer, as far as a token reads it; K/V per token that its cache holds."""

    weights: float
    attention: float  # of these, the attention half's
    makes_kv: float  # of these, what K and V are made with
    token_kv: float
    state: float = 0.0  # a row's recurrent state


def _beside(dtype: str) -> str:
    """What activations are beside weights of a dtype: of integers as on the CPU, of fp8 as on a GPU."""
    return {"float8_e4m3fn": "bfloat16"}.get(dtype, "float32") if dtype in QUANTIZED_DTYPES else dtype


def _bits(parameter: Any, dtype: str) -> float:
    """Of one value of a parameter in a bundle of a dtype; vectors are never quantized."""
    beside = BY_NAME[_beside(dtype)].bits  # of scales, too
    if dtype not in QUANTIZED_DTYPES or parameter.dim() < 2:
        return beside
    return BY_NAME[dtype].bits + beside / (_BLOCK if dtype in INTEGER_DTYPES else parameter.shape[-1])


def _stored(parameters: Iterable[Any], dtype: str) -> float:
    """Bytes of parameters in a bundle."""
    return sum(int(parameter.numel()) * _bits(parameter, dtype) / 8 for parameter in parameters)


def layer_bytes(forcing: TeacherForcing, dtype: str, halves: bool = True) -> list[LayerBytes]:
    """Sizes of every layer's parts that a token reads, as a bundle of this dtype stores them.

    Args:
        halves: False where they run beside each other; the attention's half then has no bytes.
    """
    cache = _beside(dtype)
    found = []
    for index in range(len(forcing)):
        parts = forcing.parameters_of(index)
        experts, share = forcing.experts_of(index)
        found.append(
            LayerBytes(
                weights=_stored(forcing.layers[index].parameters(), dtype) - (1 - share) * _stored(experts, dtype),
                attention=_stored(parts.first_half, dtype) if halves else 0.0,
                makes_kv=_stored(parts.kept, dtype),
                token_kv=parts.kv_values * BY_NAME[cache].size_bytes,
                state=parts.state_values * BY_NAME["float32"].size_bytes,
            )
        )
    return found


@dataclass(frozen=True)
class Savings:
    """What drop lists save, and by which of it sites are chosen.

    Attributes:
        plan: without sites; its policy tells whether LoRA steps write K and V.
        objective: `speed` or `kv`, see settings.
        context: tokens in the caches when a LoRA step reads them.
        adapter: bytes of a site's adapter, which a LoRA step reads.
        bare: sites that have none although others have one.
    """

    plan: DropPlan
    layers: Sequence[LayerBytes]
    objective: str
    context: int
    adapter: float = 0.0
    bare: Collection[str] = ()

    def weights(self, site: str) -> float:
        """Bytes of weights that a LoRA step does not read when the site is dropped, its adapter aside."""
        layer, half = self.layers[layer_of(site)], half_of(site)
        saved = {"": layer.weights, ATTENTION: layer.attention, MLP: layer.weights - layer.attention}[half]
        if self.plan.refresh_policy.fills and half != MLP:
            saved -= layer.makes_kv
        return saved

    def kv(self, site: str) -> float:
        """Bytes of K/V that a LoRA step does not read.

        The whole cache, as `step_bytes` has it: on a CPU engines read what lies behind a layer's window, too.
        """
        return 0 if half_of(site) == MLP else self.context * self.layers[layer_of(site)].token_kv

    def of(self, site: str) -> float:
        """What the objective counts."""
        if self.objective == "kv":
            return self.kv(site)
        state = 0 if half_of(site) == MLP else self.layers[layer_of(site)].state
        return self.kv(site) + state + self.weights(site) - (0 if site in self.bare else self.adapter)

    def candidates(self, halves: bool) -> tuple[str, ...]:
        """Sites that may be dropped and save something, in order."""
        plan = self.plan
        names = [f"{i}.{half}" if halves else f"{i}" for i in range(plan.num_layers) for half in (ATTENTION, MLP)]
        return tuple(site for site in dict.fromkeys(names) if plan.may_drop(site) and self.of(site) > 0)

    def share(self, sites: Sequence[str], what: str) -> float:
        """Share of the eligible layers' `weights` or `attentions` that a list leaves out."""
        if what == "attentions":
            return sum(half_of(site) != MLP for site in sites) / len(self.plan.counted_layers)
        return sum(self.weights(site) for site in sites) / sum(self.layers[i].weights for i in self.plan.counted_layers)

    def reaches(self, sites: Sequence[str], rho: float) -> bool:
        """Whether a list stands under ρ.

        One of whole layers, or for K/V, does with `m = floor(ρ·|eligible| + 0.5)` layers or attentions; one with halves
        when a LoRA step reads no more weights, and at the context no more bytes, than the largest m layers leave.
        """
        count = math.floor(rho * len(self.plan.counted_layers) + 0.5)
        if self.objective == "kv" or not any(map(half_of, sites)):
            return sum(half_of(site) != MLP for site in sites) >= count
        largest = sorted((self.layers[i].weights for i in self.plan.counted_layers), reverse=True)[:count]
        cached = sorted((self.kv(f"{i}") for i in self.plan.counted_layers), reverse=True)[:count]
        saved = sum(map(self.weights, sites))
        return saved >= sum(largest) and saved + sum(map(self.kv, sites)) >= sum(largest) + sum(cached)

    def list_under(self, order: Sequence[str], rho: float) -> tuple[str, ...]:
        """The shortest beginning of an order that stands under ρ; all of it where none does."""
        lengths = range(len(order) + 1)
        length = next((n for n in lengths if self.reaches(order[:n], rho)), len(order))
        return tuple(order[:length])


def savings(forcing: TeacherForcing, plan: DropPlan, settings: ProfileSettings, bare: Collection[str] = ()) -> Savings:
    """As the settings count them, and without adapters for the sites that are `bare`."""
    loaded = str(next(forcing.layers[0].parameters()).dtype).removeprefix("torch.")
    dtype = loaded if settings.bundle_dtype is None else BY_SHORT[settings.bundle_dtype].name
    layers = layer_bytes(forcing, dtype, settings.halves)
    width = forcing.model.get_input_embeddings().weight.shape[1]
    stored = BY_NAME[_beside(dtype)].size_bytes
    return Savings(plan, layers, settings.objective, settings.context, 2 * settings.rank * width * stored, bare)

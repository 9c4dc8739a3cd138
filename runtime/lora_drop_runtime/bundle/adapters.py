"""Reading a directory of fitted adapters and checking that it fits a bundle.

Enters: a PEFT-style directory. Leaves: A [r, d], s·B [d, r] and, where it is gated, G [r, d] per surrogate, as float32.

    adapter_config.json          peft_type "LORA", r, lora_alpha, and under "lora_drop": sites, surrogate,
                                 base_fingerprint, always_first and always_last, the policy that they were fitted
                                 for, whether neighbours were fitted apart, and bare_sites: those without an adapter.
                                 Version 0.1 wrote drop_layers and injection in the place of sites
    adapter_model.safetensors    …layers.4.lora_A.weight [r, d], …layers.4.lora_B.weight [d, r], of a gated surrogate
                                 …layers.4.lora_G.weight [r, d]; of halves
                                 …layers.4.self_attn.lora_A.weight and …layers.4.mlp.lora_A.weight; a model may call its
                                 list of layers otherwise, as in …h.4.lora_A.weight

The scale is `s = alpha / r` as in PEFT, folded into B here. So are neighbours into each other, for the graphs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.dtypes import MODEL_DTYPES
from lora_drop_runtime.errors import BundleError, PlanError
from lora_drop_runtime.files import is_file, read_bounded
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.sites import in_halves, listed, sorted_sites
from lora_drop_runtime.plan.surrogate import SURROGATES

from .safetensors_file import read_tensors
from .typed_json import parse_json, typed

_KEY = re.compile(r"(?:^|\.)(\d+)\.(?:(self_attn|mlp)\.)?lora_([ABG])(?:\.default)?\.weight$")
_UNSUPPORTED = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")  # each changes the scale or the matrices
_MOST_CONFIG_BYTES = 16 << 20
_TEXTS = ("surrogate", "base_fingerprint", "policy")  # of the plan that they were fitted for
_COUNTS = ("always_first", "always_last")  # of layers that it could not drop
_HALVES = {"": "", "self_attn": ".attn", "mlp": ".mlp"}
Matrices = dict[str, tuple[npt.NDArray[np.float32], ...]]  # site → A, s·B and, where it is gated, G
PARTS = ("A", "B", "BA")  # of a surrogate: two factors, or their product
GATE = "G"  # a part of a gated one beside them


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says; None where it does not say.

    `apart`: each layer's adapter stands for that layer alone, and not only with its neighbours'.
    """

    rank: int
    alpha: float
    sites: tuple[str, ...] | None
    surrogate: str | None
    base_fingerprint: str | None
    bare_sites: tuple[str, ...] = ()
    policy: str | None = None
    always_first: int | None = None
    always_last: int | None = None
    apart: bool | None = None


def _sites(plan: Mapping[str, object]) -> tuple[str, ...] | None:
    """The drop list that they were fitted for, also as version 0.1 wrote it."""
    sites = typed(tuple[str, ...] | None, plan.get("sites"), "lora_drop.sites")
    if sites is not None:
        return sorted_sites(sites)
    layers = typed(tuple[int, ...] | None, plan.get("drop_layers"), "lora_drop.drop_layers")
    if layers is None:
        return None
    injection = typed(str | None, plan.get("injection"), "lora_drop.injection")
    return in_halves(layers) if injection == "attn_mlp" else sorted_sites(layers)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The header of an adapter directory. Raises BundleError when it is none, PlanError for other kinds of LoRA."""
    path = directory / "adapter_config.json"
    try:
        data = typed(Mapping[str, object], parse_json(read_bounded(path, _MOST_CONFIG_BYTES)), "it")
        plan = typed(Mapping[str, object], data.get("lora_drop", {}), "lora_drop")
        if data.get("peft_type", "LORA") != "LORA":
            raise ValueError("it is of another type than LORA")
        rank = typed(int, data.get("r"), "r")
        if rank < 1:
            raise ValueError("r is 0")
        unknown = [name for name in _UNSUPPORTED if data.get(name)]
        if unknown:
            raise PlanError(
                "The adapters use a PEFT feature that a surrogate does not have.",
                note=f"{path} sets {unknown[0]}; the scale of every adapter is lora_alpha / r.",
                hint="Use adapters written by: lora-drop fit",
            )
        told = {name: typed(str | None, plan.get(name), f"lora_drop.{name}") for name in _TEXTS}
        for name, known in (("surrogate", SURROGATES), ("policy", POLICIES)):
            if told[name] is not None and told[name] not in known:
                raise PlanError(
                    f"The adapters were fitted for a {name} that is unknown.",
                    note=f"{path} says {told[name]!r:.40}, {', '.join(known)} are known.",
                    hint="Use the version of LoRA-Drop that wrote them, or fit them again with: lora-drop fit",
                )
        return AdapterConfig(
            rank=rank,
            alpha=typed(float, data.get("lora_alpha", rank), "lora_alpha"),
            sites=_sites(plan),
            bare_sites=sorted_sites(typed(tuple[str, ...], plan.get("bare_sites", []), "lora_drop.bare_sites")),
            **told,
            apart=typed(bool | None, plan.get("apart"), "lora_drop.apart"),
            **{name: typed(int | None, plan.get(name), f"lora_drop.{name}") for name in _COUNTS},
        )
    except (ValueError, BundleError) as error:
        reason = error.note if isinstance(error, BundleError) else f"{path}: {error}."
        raise BundleError(
            "This is not a directory of LoRA-Drop adapters.",
            note=f"{reason} Needed is a PEFT config of type LORA with a rank.",
            hint="Make one with: lora-drop fit",
        ) from None


def _short(value: object) -> str:
    if isinstance(value, str):
        return value if value in SURROGATES else value[:12]  # of a fingerprint
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value)


def _check_runs(directory: Path, config: AdapterConfig, plan: DropPlan) -> None:
    """Refuse adapters of neighbours that are one together where the plan's policy parts these, or joins others to them.

    The latter only where they are of runs (SurrogateForm.of_runs).
    """
    if config.apart is not False or config.policy is None:
        return
    ours = [set(run) for run in plan.surrogate_runs]
    for run in dataclasses.replace(plan, policy=config.policy).surrogate_runs:
        if set(run) in ours or (not plan.form.of_runs and any(set(run) < own for own in ours)):
            continue
        raise PlanError(
            f"The adapters were fitted for another policy than {plan.policy}.",
            note=f"In {directory} layers {listed(run)} are one run of neighbours under {config.policy}; under "
            f"{plan.policy} they are not.",
            hint=f"Use --policy {config.policy}, or fit adapters with: lora-drop fit --policy {plan.policy}",
        )


def read_adapters(directory: Path, plan: DropPlan, hidden_size: int, fingerprint: str) -> Matrices:
    """The matrices for every surrogate of a plan, float32: site → A [r, d] or [r, 2d], s·B [d, r] and, where it is
    gated, G [r, d].

    Raises:
        PlanError: fitted for another base model, drop list, surrogate, injection, rank, width, or runs of neighbours.
        BundleError: not an adapter directory.
    """
    config = read_adapter_config(directory)
    for what, found, wanted in (
        ("base model", config.base_fingerprint, fingerprint),
        ("drop list", config.sites, plan.sites),
        ("choice of sites without an adapter", config.bare_sites if config.sites else None, plan.bare_sites),
        ("surrogate", config.surrogate, plan.surrogate),
        ("rank", config.rank, plan.rank),
    ):
        if found is not None and found != wanted:
            raise PlanError(
                f"The adapters were fitted for another {what}.",
                note=f"{directory} has {_short(found)}, needed is {_short(wanted)}.",
                hint="Use the adapters of this plan, or fit new ones with: lora-drop fit",
            )
    _check_runs(directory, config, plan)
    path = directory / "adapter_model.safetensors"
    if not is_file(path):
        raise BundleError(
            "The adapter directory has no weights.",
            note=f"{path} is missing.",
            hint="Copy the directory again.",
        )
    found_matrices: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
    for name, ref in read_tensors(path).items():
        match = _KEY.search(name)
        if match is None or ref.dtype not in MODEL_DTYPES:
            raise PlanError(
                "The adapter file holds a tensor that is no LoRA-Drop adapter.",
                note=f"{name!r:.80} has dtype {ref.dtype:.20}; names end in <i>.lora_A.weight.",
                hint="Use a directory written by: lora-drop fit",
            )
        site = match[1] + _HALVES[match[2] or ""]
        found_matrices[site, match[3]] = np.asarray(ref.read(), np.float32)
    expected = {(site, part) for site in plan.adapted_sites for part in plan.form.matrices}
    if set(found_matrices) != expected:
        odd = sorted(set(found_matrices) ^ expected)[0]
        state = "is missing" if odd in expected else "is there but not in the plan"
        raise PlanError(
            "The adapters do not cover the dropped layers.",
            note=f"lora_{odd[1]} of layer {odd[0]} {state}; dropped are {_short(plan.sites)}.",
            hint="Fit adapters for this drop list, or export with theirs.",
        )
    scale = np.float32(config.alpha / config.rank)
    matrices: Matrices = {}
    width = plan.form.feature_size(hidden_size)
    shapes = {"A": (plan.rank, width), "B": (hidden_size, plan.rank), GATE: (plan.rank, hidden_size)}
    for site in plan.adapted_sites:
        parts = {part: found_matrices[site, part] for part in plan.form.matrices}
        if any(matrix.shape != shapes[part] for part, matrix in parts.items()):
            found, needed = (
                " and ".join(f"{part} {of[part]}" for part in parts)
                for of in ({part: matrix.shape for part, matrix in parts.items()}, shapes)
            )
            raise PlanError(
                "An adapter has the wrong shape.",
                note=f"Layer {site} has {found}, needed are {needed}.",
                hint=f"Use adapters of this base model, fitted with --surrogate {plan.surrogate} --rank {plan.rank}.",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            parts["B"] = parts["B"] * scale
        if not all(np.isfinite(matrix).all() for matrix in parts.values()):
            raise PlanError(
                "An adapter holds values that are not numbers.",
                note=f"Layer {site} of {directory} has NaN or infinity in A or in B times lora_alpha / r"
                f"{', or in G' * plan.form.gated}.",
                hint="Fit the adapters again, or copy the directory again.",
            )
        matrices[site] = tuple(parts.values())
    return matrices


def weight_name(site: str, part: str) -> str:
    """What a surrogate's weight is called in the graphs; `part` is one of `PARTS`."""
    return f"surrogate.{site}.lora_{part}"


def weight_names(site: str, stored: Container[str]) -> list[str]:
    """Those of `stored` that are a site's, in the order in which its input goes through them, its gate apart."""
    return [name for part in PARTS if (name := weight_name(site, part)) in stored]


def gate_name(site: str, stored: Container[str]) -> str | None:
    """The one of `stored` that gates what a site's A makes."""
    name = weight_name(site, GATE)
    return name if name in stored else None


def weight_shapes(plan: DropPlan, hidden_size: int) -> dict[str, tuple[int, int]]:
    """The weights of a plan's surrogates in the graphs, by name: those of a run under its first site.

    Of n sites and w features, d or 2d, they are `A [n·r, w]` and `B [d, n·r]`, or where these are no smaller than their
    product that: `[d, w]`. Gated ones have no product, and `G [n·r, d]`.
    """
    shapes: dict[str, tuple[int, int]] = {}
    width = plan.form.feature_size(hidden_size)
    for first, *others in plan.surrogate_runs:
        rank = plan.rank * (1 + len(others))
        if not plan.form.gated and rank * (width + hidden_size) >= width * hidden_size:
            shapes[weight_name(first, "BA")] = hidden_size, width
            continue
        shapes |= {weight_name(first, "A"): (rank, width), weight_name(first, "B"): (hidden_size, rank)}
        if plan.form.gated:
            shapes[weight_name(first, GATE)] = rank, hidden_size
    return shapes


def stacked(matrices: Matrices, run: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A [n·r, w] and B [d, n·r] of the one map that n surrogates whose base is the input are, one behind the other.

    `(I + B₂A₂)(I + B₁A₁) = I + [B₁ B₂] [A₁; A₂(I + B₁A₁)]`. Of w features the first d are the stream, to which B adds;
    all that B adds to goes through the first d columns of the A's behind it.
    """
    b = np.empty((len(matrices[run[0]][1]), 0))
    a = np.empty((0, matrices[run[0]][0].shape[1]))
    for site in run:
        next_a, next_b = (matrix.astype(np.float64) for matrix in matrices[site][:2])
        a, b = np.vstack([a, next_a + (next_a[:, : len(b)] @ b) @ a]), np.hstack([b, next_b])
    return a, b


def beside(matrices: Matrices, run: Sequence[str]) -> tuple[npt.NDArray[np.float32], ...]:
    """A [n·r, w], B [d, n·r] and G [n·r, d] of the one map that n gated surrogates of what their run was given are."""
    a, b, gates = zip(*(matrices[site] for site in run), strict=True)
    return np.vstack(a), np.hstack(b), np.vstack(gates)


def folded(matrices: Matrices, plan: DropPlan, hidden_size: int) -> dict[str, npt.NDArray[np.float32]]:
    """The surrogates' weights as `weight_shapes` has them, from the matrices of each adapted site.

    Raises:
        PlanError: a product is too large for a number.
    """
    shapes, weights = weight_shapes(plan, hidden_size), dict[str, npt.NDArray[np.float32]]()
    for run in plan.surrogate_runs:
        if plan.form.gated:
            whole = zip(plan.form.matrices, beside(matrices, run), strict=True)
            weights |= {weight_name(run[0], part): matrix for part, matrix in whole}
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = stacked(matrices, run)
            parts = {"BA": b @ a} if weight_name(run[0], "BA") in shapes else {"A": a, "B": b}
            found = {weight_name(run[0], part): array.astype(np.float32) for part, array in parts.items()}
        if not all(np.isfinite(array).all() for array in found.values()):
            raise PlanError(
                "The adapters multiply to values that are not numbers.",
                note=f"They are those of {listed(run)}; one of their products is too large.",
                hint="Fit the adapters again, or copy the directory again.",
            )
        weights |= found
    return weights

"""Bundles that a command compares, opened and checked together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import QUANTIZED_DTYPES, ModelFacts
from lora_drop_runtime.engines.open import check_engine
from lora_drop_runtime.errors import InputError, one_line
from lora_drop_runtime.plan.policy import policy_named


def weight_dtype(model: ModelFacts) -> str:
    """How a bundle stores the weights of its matrices; caches and activations have the model's `dtype`."""
    stored = getattr(model, "weight_dtype", model.dtype)
    return str(stored) if stored in QUANTIZED_DTYPES else model.dtype


def check_session(
    bundle: Bundle,
    target: str | None,
    provider: str | None,
    threads: int | None,
    policies: Iterable[str | None] = (),
) -> None:
    """Refuse what no session of a bundle can be opened with, and threads that none would use.

    Raises:
        BundleError: the target or the provider does not run it; NoDeviceError where another machine could.
        InputError: the engine runs on a GPU, or the bundle cannot run one of the policies; None is its own.
    """
    for policy in policies:
        if policy is not None:
            bundle.manifest.plan.check_policy(policy_named(policy))
    name = check_engine(bundle, target, provider)
    if threads is not None and provider is None and bundle.target(name)[1].on_device:
        raise InputError(
            "--threads would change nothing.",
            note=f"It is {threads}, and the engines of {name} run on the GPU.",
            hint="Leave it out, or choose a --provider of ONNX Runtime.",
        )


def paths_of(bundles: Sequence[str | Path] | str | Path) -> list[str]:
    """Of one bundle or several; one is not taken letter by letter."""
    return [str(path) for path in ([bundles] if isinstance(bundles, (str, Path)) else bundles)]


def open_bundles(paths: Sequence[str | Path]) -> dict[str, Bundle]:
    """Bundles by a short name each, on one line; they must be of one model with weights of one kind."""
    if not paths:
        raise InputError("There is no bundle to measure.", note="None was given.", hint="Give at least one.")
    opened = [Bundle.open(path) for path in paths]
    names = [one_line(Path(path).resolve().name) for path in paths]
    if len(set(names)) < len(names):
        names = [one_line(str(path)) for path in paths]
    bundles = dict(zip(names, opened, strict=True))
    if len(bundles) < len(opened):
        raise InputError("A bundle is given twice.", note=f"{', '.join(names)} were given.", hint="Give each once.")
    first = opened[0].manifest.model
    for name, bundle in bundles.items():
        model = bundle.manifest.model
        if model.fingerprint != first.fingerprint or weight_dtype(model) != weight_dtype(first):
            raise InputError(
                "The bundles are not of one model.",
                note=f"{names[0]} holds {first.name} in {weight_dtype(first)}, {name} holds {model.name} in "
                f"{weight_dtype(model)}" + (", another model's weights." if model.name == first.name else "."),
                hint="Give bundles of one checkpoint and one dtype, with different drop lists.",
            )
    return bundles

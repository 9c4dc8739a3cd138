"""`lora-drop fit`: adapters for a plan, from plain text.

Enters: what load_model takes, text files, a plan (a bundle brings its own). Leaves: a directory in PEFT's format, whole
or not at all, that `lora-drop-export --adapters` and `Session.load_adapters` take:

    adapter_config.json          runtime/lora_drop_runtime/bundle/adapters.py says what it holds
    adapter_model.safetensors
    fit.json                     settings, versions, and what each stage reached on text that it did not see

Two stages, each useful alone: regression (closed_form.py), then distillation (distill.py). What an interrupted fit has
reached lies in `<out>.partial`, from where `--resume` goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.command_line import require_export_packages
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.staging.area import resolved
from lora_drop_export.staging.directory import staged_directory
from lora_drop_tools.shared.corpus import DTYPES, window_that_fits
from lora_drop_tools.shared.results import refuse_in_bundle

from .files import require_package
from .given import Given, read_given
from .partial import Partial, begun_with_force, check_log_dir, check_place, check_same
from .peft import ADAPTERS, RESULT_NAME, save_adapters
from .plan import listed_layers, plan_to_fit
from .settings import FitSettings
from .stages import BASE, CLOSED_FORM, Work, begin, better, distilled
from .stream import identity
from .texts import Source

if TYPE_CHECKING:
    from lora_drop_export.checkpoint.drop_list import DropList
    from lora_drop_export.console import Console
    from lora_drop_export.decoder.loaded import LoadedModel

    from .distill import Workers

_VERSIONED = ("lora-drop-export", "torch", "transformers", "numpy")
# Settings as they are
_TOLD = (
    *("dataset", "text_column", "closed_form_tokens", "steps", "tokens"),
    *("offset_weights", "batch", "window", "accumulate", "seed", "dtype", "apart"),
)


@dataclass(frozen=True)
class Fit:
    """What fit.json holds: `stages` are figures on held-out text by the stage's name, `kept` is the one written."""

    model: str
    fingerprint: str
    plan: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, float]]
    kept: str
    losses: Sequence[float]
    versions: Mapping[str, str]


def _described(loaded: LoadedModel, plan: DropPlan, settings: FitSettings, given: Given | None) -> dict[str, Any]:
    """All that a fit's result depends on but for what the texts hold; a fit is resumed only where it is the same."""
    told = {
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "text": [file.name for file in settings.text],
        **{name: getattr(plan, name) for name in ("sites", "bare_sites", "surrogate")},
        "windows": settings.k,
        "policy": plan.policy,
        "policies": settings.policies or (plan.policy,),
        "rank": settings.rank,
        "alpha": settings.lora_alpha,
        **{name: getattr(settings, name) for name in _TOLD},
        "learning_rate": settings.rate(plan),
        "adapters_sha256": None if given is None else given.digest,
    }
    described: dict[str, Any] = json.loads(json.dumps(told))
    return described


def _written_by_first(out: Path, force: bool, workers: Workers) -> contextlib.AbstractContextManager[Path]:
    """The staging of the process that writes; the others write nothing."""
    return staged_directory(out, force, ADAPTERS) if workers.rank == 0 else contextlib.nullcontext(out)


def _check_early(
    loaded: LoadedModel, source: Source, listed: DropList | None, given: Given | None, settings: FitSettings
) -> None:
    """Refuse what will not fit the model, before its weights are read."""
    from lora_drop_export.checkpoint.drop_list import check_drop_list
    from lora_drop_export.compiler.early import windows_of_config
    from lora_drop_tools.teacher_forcing.forcing import check_config

    check_config(loaded.model.config)
    settings = dataclasses.replace(settings, window=window_that_fits(loaded, settings.window))
    check_drop_list(listed.fingerprint if listed else None, loaded.name, loaded.fingerprint)
    windows = windows_of_config(loaded.model.config)
    if windows is not None:
        plan = plan_to_fit(loaded, windows, settings, listed, given)
        if given is not None:
            given.pairs(plan, loaded, "cpu")
        if settings.resume:
            check_same(resolved(settings.out), _described(loaded, plan, settings, given))
    source.texts(loaded, settings, "cpu")


def _fit_loaded(
    loaded: LoadedModel,
    source: Source,
    listed: DropList | None,
    given: Given | None,
    settings: FitSettings,
    workers: Workers,
    console: Console,
    root: Path,
) -> tuple[Fit, Partial]:
    """Go through the stages, and write what they reached into `root` where this process is the first."""
    from lora_drop_export.decoder.anatomy import name_of
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing

    from .distill import Diverged

    settings = dataclasses.replace(settings, window=window_that_fits(loaded, settings.window))
    forcing = TeacherForcing(loaded.model, settings.recompute)
    plan = plan_to_fit(loaded, forcing.windows(), settings, listed, given)
    forcing.check_halves(plan)
    seen, unseen = source.texts(loaded, settings, forcing.device)
    work = Work(forcing, plan, settings, seen, unseen, console)
    text = identity(settings.text, settings.dataset)
    described = {**_described(loaded, plan, settings, given), "processes": workers.count, "text_sha256": text}
    partial = Partial(resolved(settings.out), described, settings.resume, settings.force, workers)
    kept, losses = CLOSED_FORM, list[float]()
    if settings.resume:
        pairs, scales, stages = partial.load_begin()
        work.stages.update(stages)
    else:
        pairs, scales = begin(work, None if given is None else given.pairs(plan, loaded, forcing.device))
        if settings.steps != 0:
            partial.save(pairs, scales, work.stages, root.with_name("partial"))
    if settings.steps != 0:
        try:
            learned, losses = distilled(work, pairs, scales, workers, partial.state)
        except Diverged:  # it would again; after any other error --resume goes on
            partial.remove()
            raise
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM
            console.say(f"the same command with --resume goes on from what {partial.root} has")
            raise
        kept, pairs = better(work, pairs, learned)
    if work.stages[kept]["kl"] >= work.stages[BASE]["kl"]:
        console.say(
            "warning: on held-out text these adapters are no better than none; more --closed-form-tokens, --steps or "
            "--text may help"
        )
    result = Fit(
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        plan=dataclasses.asdict(plan),
        settings=described,
        stages=work.stages,
        kept=kept,
        losses=losses,
        versions={package: importlib.metadata.version(package) for package in _VERSIONED},
    )
    if workers.rank == 0:
        save_adapters(root, pairs, plan, loaded, settings, name_of(loaded.model, forcing.layers))
        (root / RESULT_NAME).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
    return result, partial


def fit(model: str, settings: FitSettings) -> Fit:
    """Fit adapters; under torchrun all processes share the work, and the first one writes.

    Args:
        model: a Hugging Face directory, a hub id, a GGUF file, or a bundle, whose plan is then fitted.

    Raises:
        InputError, ModelError, BundleError: the output directory is as it was.
    """
    settings, given = read_given(settings)
    listed = given.listed if given else listed_layers(settings)
    if listed is not None and listed.policy is not None and not settings.policies:
        settings = dataclasses.replace(settings, policies=(listed.policy,))
    require_export_packages("fitting runs the model in PyTorch")
    if settings.log_dir is not None:
        require_package("tensorboard", "--log-dir")
        check_log_dir(settings.log_dir, settings.out)
    source = Source(settings)
    import torch

    from lora_drop_export.compiler.options import warn_of_always
    from lora_drop_export.console import Console
    from lora_drop_export.decoder.loaded import load_model

    from .distill import Workers

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    console, out = Console(), resolved(settings.out)
    force = settings.force or (settings.resume and begun_with_force(out))
    if settings.drop_list is not None and listed is not None:
        warn_of_always(settings, settings.drop_list, listed, console.say)
    with Workers.joined(settings.device) as workers:
        console.rich.quiet = workers.rank > 0
        device = workers.device(settings.device)
        with _written_by_first(out, force, workers) as root:
            if workers.rank == 0:
                refuse_in_bundle(out, "--out")
                check_place(out, settings.resume, settings.force)
            with console.phase("loading the model"):
                loaded = load_model(
                    model,
                    dtype=DTYPES[settings.dtype],
                    device=device,
                    trust_remote_code=settings.trust_remote_code,
                    log=console.say,
                    check=lambda found: _check_early(found, source, listed, given, settings),
                )
            result, partial = _fit_loaded(loaded, source, listed, given, settings, workers, console, root)
        partial.remove()
        workers.wait(device)
    console.say(f"done: {out}")
    return result

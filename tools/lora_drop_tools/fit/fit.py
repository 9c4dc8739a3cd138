"""`lora-drop fit`: adapters for a plan, from plain text.

Enters: what load_model takes, text files, a plan (a bundle brings its own). Leaves: a directory in PEFT's format, whole
or not at all, that `lora-drop-export --adapters` and `Session.load_adapters` take:

    adapter_config.json          runtime/lora_drop_runtime/adapters.py says what it holds
    adapter_model.safetensors
    fit.json                     settings, versions, and what each stage reached on text that it did not see

Two stages, each useful alone: regression (closed_form.py), then distillation (distill.py). Texts are windows from
random places; how many of a window's tokens are its prompt is random too, so that every phase of the cycle occurs
everywhere. What an interrupted fit has reached lies in `<out>.partial`, from where `resume` goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lora_drop_runtime.command_line import require_export_packages
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, Policy
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from lora_drop_tools.shared.corpus import DTYPES, Corpus, read_texts

from .partial import Partial, load_begin
from .peft import CONFIG_NAME, save_adapters
from .plan import plan_to_fit
from .settings import LEARNING_RATE, PROMPT, FitSettings

if TYPE_CHECKING:
    from lora_drop_export.console import Console
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
    from lora_drop_tools.teacher_forcing.layout import Layout
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

    from .distill import Workers

_HELD_OUT_BATCHES = 4
_VERSIONED = ("lora-drop-export", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Fit:
    """What fit.json holds: `stages` are figures on held-out text by the name of the stage."""

    model: str
    fingerprint: str
    plan: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, float]]
    losses: Sequence[float]
    versions: Mapping[str, str]


class _Texts:
    """Batches of windows by number; the same number gives the same batch."""

    def __init__(self, ids: Any, settings: FitSettings, device: Any, salt: int) -> None:
        self._ids, self._settings, self._device, self._salt = ids, settings, device, salt

    def __call__(self, number: int) -> tuple[Any, Layout]:
        import torch

        from lora_drop_tools.teacher_forcing.layout import Layout

        of = self._settings
        random = np.random.default_rng([of.seed, self._salt, number])
        starts = random.integers(0, len(self._ids) - of.window + 1, of.batch)
        k = int(random.choice(of.windows))
        prompt = PROMPT + int(random.integers(0, k + 1))
        ids = torch.stack([self._ids[start : start + of.window] for start in starts]).to(self._device)
        return ids, Layout.of(of.window, prompt, PeriodicSchedule(k), self._device)


def _begin(
    forcing: TeacherForcing, texts: _Texts, plan: DropPlan, settings: FitSettings, console: Console
) -> tuple[Surrogates, dict[str, Any]]:
    """The adapters that distillation begins with, and the root mean square of each surrogate's features."""
    import torch

    from .closed_form import Site, balanced, batches_of, solve, walk

    scales: dict[str, Any] = {}
    random = torch.Generator().manual_seed(settings.seed)

    def choose(name: str, site: Site) -> tuple[Any, Any] | None:
        scales[name] = scale = site.fit.scale.float()
        if not settings.tokens:
            return None
        solution = solve(site, plan.rank)
        console.say(f"layer {name}: leaves {solution.left:.3f} of the base's squared error, ridge {solution.ridge:g}")
        pair = balanced(solution.a, solution.b, scale)
        return pair[0].to(forcing.device), pair[1].to(forcing.device)

    count = max(1, settings.tokens // (settings.batch * settings.window))
    what = "closed form" if settings.tokens else "scales of the features"
    with console.progress(what) as update:
        batches = batches_of(forcing, (texts(number) for number in range(count)))
        pairs = walk(forcing, batches, plan, plan.refresh_policy, choose, lambda done, all_: update(what, done, all_))
    if settings.tokens:
        return pairs, scales
    width = len(next(iter(scales.values())))
    a = {name: torch.randn(plan.rank, width, generator=random) / width**0.5 / scales[name] for name in scales}
    zeros = torch.zeros(width, plan.rank)
    return {name: (a[name].to(forcing.device), zeros.to(forcing.device)) for name in scales}, scales


def _figures(
    forcing: TeacherForcing, texts: _Texts, plan: DropPlan, pairs: Surrogates, policy: Policy
) -> dict[str, float]:
    """Means over held-out text, each of whose batches is seen in its own phase."""
    from .distill import Divergence, run_batch

    sums = Divergence()
    for number in range(_HELD_OUT_BATCHES):
        ids, layout = texts(number)
        sums += run_batch(forcing, ids, layout, plan, pairs, policy)
    return sums.figures()


def _say_figures(console: Console, stage: str, figures: Mapping[str, float]) -> None:
    console.say(
        f"{stage}: KL {figures['kl']:.4f}, top-1 agreement {figures['agreement']:.3f}, perplexity "
        f"{figures['perplexity_full']:.2f} → {figures['perplexity']:.2f} (LoRA steps, held-out text)"
    )


def _written_by_first(staged: Any, out: Path, force: bool, workers: Workers) -> Any:
    """The staging of the process that writes; the others write nothing."""
    return (
        staged(out, force, CONFIG_NAME, "directory of adapters") if workers.rank == 0 else contextlib.nullcontext(out)
    )


def fit(
    model: str,
    text: Sequence[str | Path],
    out: str | Path,
    *,
    drop_layers: Sequence[int] | None = None,
    drop_list_fingerprint: str | None = None,
    drop_ratio: float | None = None,
    always_first: int | None = None,
    always_last: int | None = None,
    surrogate: str | None = None,
    injection: str | None = None,
    k: Sequence[int] = (3,),
    policy: str | None = None,
    rank: int = 16,
    alpha: float | None = None,
    tokens: int = 32768,
    steps: int = 300,
    learning_rate: float = LEARNING_RATE,
    batch: int = 4,
    window: int = 256,
    accumulate: int = 1,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "fp32",
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Fit:
    """Fit adapters; under torchrun all processes share the work.

    Args:
        model: a Hugging Face directory, a hub id, a GGUF file, or a bundle, whose plan is then fitted.
        text: UTF-8 files.
        out: a directory; must not exist unless `force`.
        drop_list_fingerprint: of the model that the drop list was made for.
        k: LoRA steps between refreshes; several are mixed.
        policy: of the refreshes at deployment, on which depends what LoRA steps find in the caches; the bundle's, else
            `skip`, when None.
        alpha: PEFT's; the rank when None, so that the scale is 1.
        tokens, steps: of the closed form and of distillation.

    Raises:
        InputError, ModelError, BundleError: `out` is as it was.
    """
    settings = FitSettings(
        windows=tuple(k),
        policy=policy or DEFAULT_POLICY,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        tokens=tokens,
        steps=steps,
        learning_rate=learning_rate,
        batch=batch,
        window=window,
        accumulate=accumulate,
        seed=seed,
        dtype=dtype,
    )
    texts = read_texts(text)
    require_export_packages("fitting runs the model in PyTorch")
    import torch

    from lora_drop_export.checkpoint.drop_list import check_drop_list
    from lora_drop_export.console import Console
    from lora_drop_export.decoder.anatomy import name_of
    from lora_drop_export.decoder.loaded import load_model
    from lora_drop_export.staging import staged_directory
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing

    from .distill import DistillOptions, Learner, Workers, distill

    if threads is not None:
        torch.set_num_threads(threads)
    console, out = Console(), Path(out).resolve()
    with Workers.joined(device) as workers, _written_by_first(staged_directory, out, force, workers) as root:
        console.rich.quiet = workers.rank > 0
        with console.phase("loading the model"):
            loaded = load_model(
                model,
                dtype=DTYPES[dtype],
                device=workers.device(device),
                trust_remote_code=trust_remote_code,
                log=console.say,
            )
        check_drop_list(drop_list_fingerprint, loaded.name, loaded.fingerprint)
        if policy is None and loaded.plan is not None:
            settings = dataclasses.replace(settings, policy=loaded.plan.policy)
        forcing = TeacherForcing(loaded.model)
        always = None
        if always_first is not None or always_last is not None:
            always = 3 if always_first is None else always_first, 1 if always_last is None else always_last
        plan = plan_to_fit(loaded, forcing, drop_layers, drop_ratio, always, surrogate, injection, settings)
        refreshes = plan.refresh_policy
        corpus = Corpus.of(loaded, texts, window)
        seen, unseen = (_Texts(ids, settings, forcing.device, i) for i, ids in enumerate((corpus.fit, corpus.held_out)))
        described = {
            "model": loaded.name,
            "fingerprint": loaded.fingerprint,
            "text": [Path(file).name for file in text],
            **{name: getattr(plan, name) for name in ("drop_layers", "surrogate", "injection")},
            **dataclasses.asdict(settings),
        }
        partial = Partial(out, json.loads(json.dumps(described)), resume, force, workers)
        losses: list[float] = []
        if resume:
            pairs, scales, stages = load_begin(partial.begin)
        else:
            stages = {"base": _figures(forcing, unseen, plan, {}, refreshes)}
            _say_figures(console, "base alone", stages["base"])
            pairs, scales = _begin(forcing, seen, plan, settings, console)
            if tokens:
                stages["closed form"] = _figures(forcing, unseen, plan, pairs, refreshes)
                _say_figures(console, "closed form", stages["closed form"])
            if workers.rank == 0 and steps:
                partial.save(pairs, scales, stages)
        if steps:
            learner = Learner(pairs, scales, forcing.device)
            with console.progress("distillation") as update:

                def report(done: int, total: int, so_far: Sequence[float]) -> None:
                    update("distillation", done, total)
                    if done % max(1, total // 20) == 0:
                        recent = so_far[-max(1, total // 20) :]
                        console.say(f"distillation: step {done} of {total}, KL {np.mean(recent):.4f}")

                options = DistillOptions(steps, learning_rate, accumulate)
                losses = distill(forcing, seen, plan, refreshes, learner, options, workers, partial.state, report)
            pairs = learner.pairs()
            stages["distillation"] = _figures(forcing, unseen, plan, pairs, refreshes)
            _say_figures(console, "distillation", stages["distillation"])
        result = Fit(
            model=loaded.name,
            fingerprint=loaded.fingerprint,
            plan=dataclasses.asdict(plan),
            settings=described,
            stages=stages,
            losses=losses,
            versions={package: importlib.metadata.version(package) for package in _VERSIONED},
        )
        if workers.rank == 0:
            layers = name_of(loaded.model, forcing.layers)
            save_adapters(root, pairs, plan, loaded, settings, layers)
            (root / "fit.json").write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    shutil.rmtree(partial.root, ignore_errors=True)
    console.say(f"done: {out}")
    return result

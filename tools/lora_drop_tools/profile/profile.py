"""`lora-drop profile`: which layers of a model, or halves of them, can be dropped, measured on text.

Enters: what load_model takes, text files. Leaves: a directory, whole or not at all:

    profile.json                 every figure, the settings, the versions
    drop-<ranking>-<ρ>.json      a drop list for `--drop-list` of the export or of a fit, with what was measured of it
    *.png                        the figures drawn, where matplotlib is installed

Rankings of the eligible sites, the first to be dropped first: `temporal` (the paper: similarity of Eq. 17, mean over
Δ, descending), `influence` (cosine of a site's input and output, descending), `sensitivity` (greedy by KL for what is
saved, see greedy.py and sizes.py), `run` (the neighbours of each length that cost least with an adapter in their place,
see runs.py). All are made from one part of the text; the drop lists are compared on another. Fitted adapters may be in
place meanwhile (fitted.py); what they stand in for is ranked then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.command_line import require_export_packages
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_runtime.plan.sites import half_of, sorted_sites
from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_export.staging.area import resolved
from lora_drop_export.staging.directory import staged_directory
from lora_drop_export.staging.owned import Kind
from lora_drop_tools.shared.corpus import DTYPES, read_texts, window_that_fits
from lora_drop_tools.shared.results import refuse_in_bundle, then_shown

from .choice import Choice, choose, plan_to_profile
from .fitted import Fitted, read_fitted
from .greedy import SCREENED, Greedy, ticks
from .measures import SiteFigures, site_figures
from .plots import FIGURE_FILES, write_plots
from .report import describe
from .result import PROFILE_NAME, Profile, RankedList, SiteProfile, profile_files
from .scoring import Scoring
from .settings import RUN, ProfileSettings
from .sizes import savings

if TYPE_CHECKING:
    from lora_drop_export.console import Console
    from lora_drop_export.decoder.loaded import LoadedModel
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

_PROMPT_SHARE = 4  # a quarter of a window is its prompt, the rest is decoded
_LISTED = (
    *("k", "policy", "adapters", "objective", "context", "bundle_dtype", "rank", "run_rank"),
    *("always_first", "always_last"),
)
_VERSIONED = ("lora-drop-export", "torch", "transformers", "numpy")


def _described(settings: ProfileSettings, plan: DropPlan) -> dict[str, Any]:
    """What profile.json says of the settings: tokens as they were measured, in whole windows."""
    window = settings.window_tokens
    return {
        "text": [file.name for file in settings.text],
        "k": plan.k,
        **{name: getattr(plan, name) for name in ("policy", "surrogate", "always_first", "always_last")},
        "adapters": None if settings.adapters is None else resolved(settings.adapters).name,
        **{name: getattr(settings, name) for name in ("sites", "objective", "context", "bundle_dtype", "rank")},
        "run_rank": settings.run_rank if RUN in settings.rankings else None,
        "tokens": settings.tokens // window * window,
        "window": window,
        "prompt": window // _PROMPT_SHARE,
        "sensitivity_tokens": settings.sensitivity_tokens // window * window,
        "seed": settings.seed,
        "dtype": settings.dtype,
    }


def _windows(loaded: LoadedModel, texts: Sequence[str], window: int, count: int, seed: int) -> Any:
    """`count` pieces of the texts, drawn without repetition, as token ids [count, window]; none spans two texts.

    Raises:
        InputError: the texts are too short.
    """
    import torch

    pieces = []
    for text in texts:
        ids = loaded.encode(text)
        pieces.append(ids[: len(ids) // window * window].reshape(-1, window))
    found = torch.cat(pieces)
    if len(found) < count:
        raise InputError(
            "The text is too short.",
            note=f"It has {len(found)} windows of {window} tokens, {count} are needed: for --tokens or "
            "--sensitivity-tokens, whichever is more, and --sensitivity-tokens to compare the lists on.",
            hint="Give more --text, or lower --tokens, --sensitivity-tokens or --window.",
        )
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]


@dataclass(frozen=True)
class _Pieces:
    """Of the text, as token ids [N, T].

    Attributes:
        figures: that the layers' figures are means over; `ranking` and `fitting` may be among them.
        ranking: that sites and lists are ranked on.
        fitting: that adapters are fitted on where `run` ranks; none of `ranking`.
        comparing: that the drop lists are compared on; none of the others.
    """

    figures: Any
    ranking: Any
    fitting: Any
    comparing: Any

    @classmethod
    def drawn(cls, loaded: LoadedModel, texts: Sequence[str], settings: ProfileSettings, device: Any) -> _Pieces:
        """Raises InputError where the texts are too short."""
        window = settings.window_tokens
        count, scored = settings.tokens // window, settings.sensitivity_tokens // window
        found = _windows(loaded, texts, window, scored + max(count, scored), settings.seed).to(device)
        comparing, others = found[:scored], found[scored:]
        return cls(others[:count], others[:scored], others[scored:count], comparing)


def _greedy(
    scoring: Scoring, windows: Any, choice: Choice, console: Console
) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """The KL of each site dropped alone, and the greedy order as far as the longest list needs it, with its KLs."""
    candidates, saved = choice.candidates, choice.saved
    screened = SCREENED if any(map(half_of, candidates)) else None
    with console.progress("sensitivity") as update:
        total, done = ticks(len(candidates), choice.rounds, len(windows), screened), 0

        def tick() -> None:
            nonlocal done
            done += 1
            update("sensitivity", done, total)

        greedy = Greedy(scoring, windows, saved.of, tick)
        console.say(f"sensitivity: {windows.numel()} tokens, {greedy.kept_bytes / 2**20:.0f} MiB of their layers kept")

        def report(site: str, kl: float) -> None:
            what = "half" if half_of(site) else "layer"
            console.say(f"sensitivity: {len(greedy.dropped)} dropped, {what} {site}, KL {kl:.4f}")

        def enough(sites: Sequence[str]) -> bool:
            return saved.reaches(sites, choice.ratios[-1])

        return greedy.order(candidates, enough, report, screened)


@dataclass(frozen=True)
class _Ranked:
    """The rankings by name, and what was measured on the way where that was asked for.

    Attributes:
        alone, greedy_kl: by `sensitivity`.
        runs: of `run`, by ρ.
    """

    orders: Mapping[str, Sequence[str]]
    alone: Mapping[str, float]
    greedy_kl: tuple[float, ...]
    runs: Mapping[float, Sequence[str]]

    def lists(self, choice: Choice) -> list[tuple[str, float, Sequence[str]]]:
        """Ranking, ρ and sites of each drop list."""
        return [
            (name, rho, self.runs[rho] if name == RUN else choice.saved.list_under(order, rho))
            for name, order in self.orders.items()
            for rho in (self.runs if name == RUN else choice.ratios)
        ]


def _rank(
    scoring: Scoring,
    figures: Mapping[str, SiteFigures],
    pieces: _Pieces,
    choice: Choice,
    settings: ProfileSettings,
    console: Console,
) -> _Ranked:
    """Rank the eligible sites, the first to be dropped first."""
    from .runs import best_runs, with_adapters

    alone, greedy, runs = dict[str, float](), list[tuple[str, float]](), dict[float, tuple[str, ...]]()
    candidates = choice.candidates
    orders: dict[str, list[str]] = {
        "temporal": sorted(candidates, key=lambda i: -sum(figures[i].similarity.values())),
        "influence": sorted(candidates, key=lambda i: -figures[i].influence_cosine),
    }
    if "sensitivity" in settings.rankings:
        alone, greedy = _greedy(scoring, pieces.ranking, choice, console)
        orders["sensitivity"] = [site for site, _ in greedy]
    if RUN in settings.rankings:
        adapted = with_adapters(scoring, settings.run_rank)
        runs = best_runs(adapted, pieces.fitting, pieces.ranking, choice, console)
        orders[RUN] = list(dict.fromkeys(site for rho in sorted(runs) for site in runs[rho]))
    names = dict.fromkeys(settings.rankings)
    return _Ranked({name: orders[name] for name in names}, alone, tuple(kl for _, kl in greedy), runs)


def _compare(
    scoring: Scoring,
    ranked: _Ranked,
    pieces: _Pieces,
    choice: Choice,
    settings: ProfileSettings,
    console: Console,
) -> tuple[RankedList, ...]:
    """The drop list of each ranking and ratio, scored on text that no ranking saw."""
    from .runs import of_lists, with_adapters

    saved, wanted, windows = choice.saved, ranked.lists(choice), pieces.comparing
    lists = [sites for *_, sites in wanted]

    def scored(scoring: Scoring, surrogates: Sequence[Surrogates] | None) -> list[float]:
        with console.progress("drop lists on other text") as update:
            done = iter(range(1, len(windows) + 1))
            return scoring.of_lists(windows, lists, lambda: update("drop lists", next(done), len(windows)), surrogates)

    kls, fitted = scored(scoring, None), list[float | None]([None] * len(lists))
    if RUN in ranked.orders:
        adapted = with_adapters(scoring, settings.run_rank)
        fitted = [*scored(adapted, of_lists(adapted, lists, pieces.fitting, console))]
    return tuple(
        RankedList(
            name, rho, sorted_sites(sites), kl, saved.share(sites, "attentions"), saved.share(sites, "weights"), best
        )
        for (name, rho, sites), kl, best in zip(wanted, kls, fitted, strict=True)
    )


def _check_early(loaded: LoadedModel, texts: Sequence[str], settings: ProfileSettings, fitted: Fitted | None) -> None:
    """Refuse what will not fit the model, before its weights are read."""
    from lora_drop_export.compiler.early import windows_of_config
    from lora_drop_tools.teacher_forcing.forcing import check_config

    check_config(loaded.model.config)
    settings = dataclasses.replace(settings, window=window_that_fits(loaded, settings.window))
    windows = windows_of_config(loaded.model.config)
    if windows is not None:
        plan = plan_to_profile(windows, settings, fitted, loaded)
        if fitted is not None:
            fitted.matrices(plan, loaded, "cpu")
    _Pieces.drawn(loaded, texts, settings, "cpu")


def _measure(
    loaded: LoadedModel,
    texts: Sequence[str],
    settings: ProfileSettings,
    fitted: Fitted | None,
    console: Console,
) -> Profile:
    """All figures, rankings and lists."""
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
    from lora_drop_tools.teacher_forcing.layout import Layout

    settings = dataclasses.replace(settings, window=window_that_fits(loaded, settings.window))
    forcing = TeacherForcing(loaded.model)
    pieces = _Pieces.drawn(loaded, texts, settings, forcing.device)
    count, window = pieces.figures.shape
    plan = plan_to_profile(forcing.windows(), settings, fitted, loaded)
    surrogates = {} if fitted is None else fitted.matrices(plan, loaded, forcing.device)
    bare = () if fitted is None else fitted.config.bare_sites
    choice = choose(savings(forcing, plan, settings, bare), settings, fitted)
    forcing.check_halves(dataclasses.replace(plan, sites=choice.candidates))
    with console.progress(f"figures of the {settings.sites}") as update:
        done = iter(range(1, count + 1))
        figures = site_figures(
            forcing, pieces.figures, settings.k, lambda: update("figures", next(done), count), settings.halves
        )
    layout = Layout.of(window, window // _PROMPT_SHARE, PeriodicSchedule(settings.k), forcing.device)
    scoring = Scoring(forcing, plan, layout, plan.refresh_policy, surrogates)
    ranked = _rank(scoring, figures, pieces, choice, settings, console)
    return Profile(
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        settings=_described(settings, plan),
        versions={package: importlib.metadata.version(package) for package in _VERSIONED},
        sites=tuple(
            SiteProfile(
                **vars(own),
                site=site,
                eligible=plan.may_drop(site),
                saved_bytes=choice.saved.of(site),
                kl_alone=ranked.alone.get(site),
            )
            for site, own in figures.items()
        ),
        rankings={name: tuple(order) for name, order in ranked.orders.items()},
        greedy_kl=ranked.greedy_kl,
        drop_lists=_compare(scoring, ranked, pieces, choice, settings, console),
    )


def _write(result: Profile, root: Path) -> None:
    """profile.json and the drop lists."""
    (root / PROFILE_NAME).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
    measured = {one.site: one for one in result.sites}
    for ranked in result.drop_lists:
        facts = {
            **dataclasses.asdict(ranked),
            **{name: result.settings[name] for name in _LISTED},
            "model": result.model,
            "fingerprint": result.fingerprint,
            "base_errors": {
                name: {site: measured[site].base_errors[name] for site in ranked.sites if not half_of(site)}
                for name, form in SURROGATES.items()
                if form.base_is_state
            },
        }
        (root / ranked.file).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _files(root: Path) -> frozenset[str] | None:
    """The files of a profile, its figures among them."""
    files = profile_files(root)
    return None if files is None else files | FIGURE_FILES


def profile(model: str, settings: ProfileSettings) -> Profile:
    """Measure a model's layers on text, rank them, and write drop lists.

    Args:
        model: a Hugging Face directory, a hub id, a GGUF file, or a bundle.

    Raises:
        InputError, ModelError, BundleError: nothing was written.
    """
    settings, fitted = read_fitted(settings)
    texts = read_texts(settings.text)
    require_export_packages("profiling runs the model in PyTorch")
    from lora_drop_export.compiler.options import warn_of_always
    from lora_drop_export.console import Console
    from lora_drop_export.decoder.loaded import load_model

    console = Console()
    if fitted is not None:
        warn_of_always(settings, fitted.directory, fitted.config, console.say)
    kind = Kind("profile", PROFILE_NAME, _files)
    with contextlib.ExitStack() as shown, staged_directory(settings.out, settings.force, kind) as root:
        refuse_in_bundle(settings.out, "--out")
        with console.phase("loading the model"):
            loaded = load_model(
                model,
                dtype=DTYPES[settings.dtype],
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
                log=console.say,
                check=lambda found: _check_early(found, texts, settings, fitted),
            )
        result = _measure(loaded, texts, settings, fitted, console)
        shown.enter_context(then_shown(lambda: print(*describe(result, settings.out), sep="\n")))
        _write(result, root)
        if importlib.util.find_spec("matplotlib") is None:
            console.say("no figures: matplotlib is not installed (pip install 'lora-drop-export[bench]')")
        else:
            write_plots(result, root)
    return result

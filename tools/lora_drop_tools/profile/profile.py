"""`lora-drop profile`: which layers of a model can be dropped, measured on text.

Enters: what load_model takes, text files. Leaves: a directory, whole or not at all:

    profile.json                 every figure, the settings, the versions
    drop-<ranking>-<ρ>.json      a drop list for `lora-drop-export --drop-list`, with what was measured of it
    *.png                        the figures drawn, where matplotlib is installed

Rankings of the eligible layers, the first to be dropped first: `temporal` (the paper: similarity of Eq. 17, mean over
Δ, descending), `influence` (cosine of a layer's input and output, descending), `sensitivity` (greedy, see
profile_measures.py). All are made from one part of the text; the drop lists are compared on another.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.command_line import require_export_packages
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan, eligible_layers
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES
from lora_drop_runtime.plan.schedule import PeriodicSchedule
from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.shared.corpus import DTYPES, check_known, check_window, read_texts
from lora_drop_tools.teacher_forcing.layout import check_policy

from .greedy import Greedy, ticks
from .measures import DELTAS, LEADING, layer_figures
from .plots import write_plots
from .report import describe
from .result import LayerProfile, Profile, RankedList
from .scoring import Scoring

if TYPE_CHECKING:
    from lora_drop_export.console import Console
    from lora_drop_export.decoder.loaded import LoadedModel

PROFILE_NAME = "profile.json"
RANKINGS = ("sensitivity", "influence", "temporal")
RATIOS = (0.25, 0.5, 0.75)
_PROMPT_SHARE = 4  # a quarter of a window is its prompt, the rest is decoded
_VERSIONED = ("lora-drop-export", "torch", "transformers", "numpy")


def _check(
    rankings: Sequence[str],
    k: int,
    policy: str,
    tokens: int,
    window: int,
    sensitivity_tokens: int,
    dtype: str,
) -> None:
    """Refuse what needs no model to be refused."""
    if k == 0:
        raise PlanError("There are no LoRA steps to profile.", note="k is 0.", hint="Use --k 3.")
    PeriodicSchedule(k)
    check_known("--policy", policy, tuple(POLICIES))
    check_policy(POLICIES[policy], k)
    check_known("--dtype", dtype, tuple(DTYPES))
    for ranking in rankings or [""]:
        check_known("--rankings", ranking, RANKINGS)
    shortest = LEADING + max(*DELTAS, k) + 2
    if window < shortest:
        raise InputError(
            "The window is too short.",
            note=f"--window is {window}; tokens up to {max(*DELTAS, k)} apart are compared, so {shortest} are needed.",
            hint=f"Use --window {max(256, shortest)}.",
        )
    for option, amount in (("--tokens", tokens), ("--sensitivity-tokens", sensitivity_tokens)):
        if amount < window:
            raise InputError(
                f"{option} is less than a window.",
                note=f"It is {amount}, --window is {window}.",
                hint=f"Use {option} {4 * window}, or a smaller --window.",
            )


def _windows(loaded: LoadedModel, texts: Sequence[str], window: int, count: int, seed: int) -> Any:
    """`count` pieces of the texts, drawn without repetition, as token ids [count, window]; none spans two texts.

    Raises:
        InputError: the texts are too short, or the model's context is.
    """
    import torch

    check_window(loaded, window)
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


def _list_length(rho: float, eligible: Sequence[int]) -> int:
    return math.floor(rho * len(eligible) + 0.5)


def _greedy(
    scoring: Scoring, windows: Any, eligible: Sequence[int], console: Console
) -> tuple[dict[int, float], list[tuple[int, float]]]:
    """The KL of each layer dropped alone, and the greedy order as far as the longest list needs it, with its KLs."""
    count = _list_length(max(RATIOS), eligible)
    with console.progress("sensitivity") as update:
        total, done = ticks(len(eligible), count, len(windows)), 0

        def tick() -> None:
            nonlocal done
            done += 1
            update("sensitivity", done, total)

        greedy = Greedy(scoring, windows, tick)
        console.say(f"sensitivity: {windows.numel()} tokens, {greedy.kept_bytes / 2**20:.0f} MiB of their layers kept")

        def report(layer: int, kl: float) -> None:
            console.say(f"sensitivity: {len(greedy.dropped)} of {count}, layer {layer}, KL {kl:.4f}")

        return greedy.order(eligible, count, report)


def _measure(
    loaded: LoadedModel, texts: Sequence[str], names: Sequence[str], settings: Mapping[str, Any], console: Console
) -> Profile:
    """All figures, rankings and lists."""
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
    from lora_drop_tools.teacher_forcing.layout import Layout

    window, k = settings["window"], settings["k"]
    count, scored = settings["tokens"] // window, settings["sensitivity_tokens"] // window
    windows = _windows(loaded, texts, window, scored + max(count, scored), settings["seed"])
    forcing = TeacherForcing(loaded.model)
    windows = windows.to(forcing.device)
    comparing, ranking = windows[:scored], windows[scored:]  # of the latter both may be the same text
    always = settings["always_first"], settings["always_last"]
    windowed = tuple(i for i, size in enumerate(forcing.windows()) if size)
    eligible = eligible_layers(len(forcing), *always, windowed)
    if not eligible:
        raise PlanError(
            "No layer of the model may be dropped.",
            note=f"Of {len(forcing)} the first {always[0]} and the last {always[1]} are always kept, and "
            f"{len(windowed)} attend to a sliding window.",
            hint="Lower --always-first or --always-last.",
        )
    with console.progress("figures of the layers") as update:
        done = iter(range(1, count + 1))
        figures = layer_figures(forcing, ranking[:count], k, lambda: update("figures", next(done), count))
    rankings = {
        "temporal": sorted(eligible, key=lambda i: -sum(figures[i].similarity.values())),
        "influence": sorted(eligible, key=lambda i: -figures[i].influence_cosine),
    }
    layout = Layout.of(window, settings["prompt"], PeriodicSchedule(k), forcing.device)
    plan = DropPlan(len(forcing), (), k, always_first=always[0], always_last=always[1], windowed_layers=windowed)
    scoring = Scoring(forcing, plan, layout, POLICIES[settings["policy"]])
    alone: dict[int, float] = {}
    greedy_kl: tuple[float, ...] = ()
    if "sensitivity" in names:
        alone, order = _greedy(scoring, ranking[:scored], eligible, console)
        rankings["sensitivity"] = [layer for layer, _ in order]
        greedy_kl = tuple(kl for _, kl in order)
    wanted = [(name, rho, rankings[name][: _list_length(rho, eligible)]) for name in names for rho in RATIOS]
    with console.progress("drop lists on other text") as update:
        done = iter(range(1, scored + 1))
        scores = scoring.of_lists(
            comparing, [layers for *_, layers in wanted], lambda: update("drop lists", next(done), scored)
        )
    return Profile(
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        settings=settings,
        versions={package: importlib.metadata.version(package) for package in _VERSIONED},
        layers=tuple(
            LayerProfile(**vars(figures[i]), layer=i, eligible=i in eligible, kl_alone=alone.get(i))
            for i in range(len(forcing))
        ),
        rankings={name: tuple(rankings[name]) for name in names},
        greedy_kl=greedy_kl,
        drop_lists=tuple(
            RankedList(name, rho, tuple(sorted(layers)), kl)
            for (name, rho, layers), kl in zip(wanted, scores, strict=True)
        ),
    )


def _write(result: Profile, root: Path) -> None:
    """profile.json and the drop lists."""
    (root / PROFILE_NAME).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    for ranked in result.drop_lists:
        facts = {
            **dataclasses.asdict(ranked),
            **{name: result.settings[name] for name in ("k", "policy")},
            "model": result.model,
            "fingerprint": result.fingerprint,
            "base_errors": {
                name: {i: result.layers[i].base_errors[name] for i in ranked.drop_layers}
                for name, form in SURROGATES.items()
                if form.has_state
            },
        }
        (root / ranked.file).write_text(json.dumps(facts, indent=1) + "\n")


def profile(
    model: str,
    text: Sequence[str | Path],
    out: str | Path,
    *,
    k: int = 3,
    policy: str = DEFAULT_POLICY,
    rankings: Sequence[str] = RANKINGS,
    tokens: int = 8192,
    window: int = 256,
    sensitivity_tokens: int = 1024,
    always_first: int = 3,
    always_last: int = 1,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "fp32",
    force: bool = False,
    trust_remote_code: bool = False,
) -> Profile:
    """Measure a model's layers on text, rank them, and write drop lists.

    Args:
        model: a Hugging Face directory, a hub id, a GGUF file, or a bundle.
        text: UTF-8 files.
        out: a directory; must not exist unless `force`.
        k: LoRA steps between two refreshes.
        policy: of the refreshes, `backfill` or `skip`.
        tokens: how much text the figures of layers are means over.
        window: tokens of a piece of text; the pieces are drawn from all over it.
        sensitivity_tokens: how much of it `sensitivity` decodes again and again, and how much other text the drop lists
            are compared on. The exact layers of the former stay in memory.

    Raises:
        InputError, ModelError, BundleError: nothing was written.
    """
    _check(rankings, k, policy, tokens, window, sensitivity_tokens, dtype)
    texts = read_texts(text)
    require_export_packages("profiling runs the model in PyTorch")
    from lora_drop_export.console import Console
    from lora_drop_export.decoder.loaded import load_model
    from lora_drop_export.staging import staged_directory

    settings = {
        "text": [Path(file).name for file in text],
        "k": k,
        "policy": policy,
        "tokens": tokens // window * window,
        "window": window,
        "prompt": window // _PROMPT_SHARE,
        "sensitivity_tokens": sensitivity_tokens // window * window,
        "always_first": always_first,
        "always_last": always_last,
        "seed": seed,
        "dtype": dtype,
    }
    console, out = Console(), Path(out)
    with staged_directory(out.resolve(), force, PROFILE_NAME, "profile") as root:
        with console.phase("loading the model"):
            loaded = load_model(
                model, dtype=DTYPES[dtype], device=device, trust_remote_code=trust_remote_code, log=console.say
            )
        result = _measure(loaded, texts, tuple(dict.fromkeys(rankings)), settings, console)
        _write(result, root)
        if importlib.util.find_spec("matplotlib") is None:
            console.say("no figures: matplotlib is not installed (pip install 'lora-drop-export[bench]')")
        else:
            write_plots(result, root)
    print(*describe(result, out), sep="\n")
    return result

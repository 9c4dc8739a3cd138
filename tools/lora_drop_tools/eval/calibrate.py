"""`lora-drop eval --calibrate`: the threshold of an adaptive schedule, found on a text and stored in the bundle.

Enters: a bundle, a text, the share of decode steps whose likeliest token shall be the full schedule's. Leaves: for each
schedule the threshold with the fewest refreshes that reaches it, in the bundle's manifest, and a table.

One half of the text's windows is searched on, the other is held out. Every window is decoded row by row as scoring.py
says, under the schedule itself: what follows a refresh depends on all that went before. Thresholds that are tried are
quantiles of what LoRA steps show under the periodic schedule; more refreshes agree more often, so few of them are.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.bundle.manifest import MANIFEST_NAME, Calibration
from lora_drop_runtime.bundle.manifest_reader import read_manifest
from lora_drop_runtime.decoding.schedules import check_adaptive
from lora_drop_runtime.decoding.session import Session
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import ADAPTIVE, LastLogits
from lora_drop_runtime.text import TextCodec

from lora_drop_export.staging.inside import change_file, check_changeable
from lora_drop_tools.shared.bundles import check_session
from lora_drop_tools.shared.progress import Progress
from lora_drop_tools.shared.results import then_shown
from lora_drop_tools.shared.table import table

from .requests import checked, text_request, text_windows
from .scoring import Floats, Window, WindowK, decode
from .settings import EvalSettings

Ids = npt.NDArray[np.int64]
QUANTILES = 64  # of what LoRA steps show
MOST_TRIED = 8  # of the thresholds that are made of them


@dataclass(frozen=True)
class Reached:
    """Over `tokens` decode steps: the share whose likeliest token is the full schedule's, and that of refreshes."""

    agreement: float
    refresh_share: float
    tokens: int


@dataclass(frozen=True)
class Calibrated:
    """What was found for one schedule.

    Attributes:
        name: of the adaptive schedule.
        periodic: the periodic schedule of the same k, on the text that was searched, and on the other.
        most: the most that the schedule reaches, every LoRA step being followed by a refresh. None where the periodic
            schedule reaches what is wanted: nothing was searched.
        stored: what the manifest got; None where the periodic schedule reaches what is wanted, or `most` does not.
        alike: a window k and what the periodic schedule of about as many refreshes reaches on the other text.
    """

    name: str
    k: int
    policy: str
    wanted: float
    periodic: tuple[Reached, Reached]
    most: Reached | None
    stored: Calibration | None
    alike: tuple[int, Reached] | None


class _Text:
    """Windows, and what the full schedule finds likeliest in them."""

    def __init__(self, session: Session, windows: Sequence[Window], progress: Progress) -> None:
        self._session, self._windows, self._progress = session, windows, progress
        self._full, _ = self._choices(0, lambda _: None)

    def _choices(self, k: WindowK, see: Callable[[Floats], None]) -> tuple[Ids, int]:
        """The likeliest token after every scored step, and how many steps were refreshes."""
        chosen, refreshes = [], 0
        for window in self._windows:
            for read in decode(self._session, [window.row(k)], k):
                chosen.append(int(read.log_probs.argmax()))
                refreshes += not read.offset
                if read.offset:
                    see(read.log_probs)
            self._progress.advance()
        return np.array(chosen, np.int64), refreshes

    def reached(self, k: WindowK, see: Callable[[Floats], None] = lambda _: None) -> Reached:
        """Decode under k; `see` gets the log-probabilities [1, V] of each LoRA step."""
        chosen, refreshes = self._choices(k, see)
        return Reached(float((chosen == self._full).mean()), refreshes / len(chosen), len(chosen))


def _thresholds(name: str, values: Sequence[float]) -> list[float]:
    """Quantiles of the margins or entropies of LoRA steps, from few refreshes to many; with the last all are unsure."""
    quantiles = np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES + 1)))
    if name == "entropy":
        return [*quantiles[::-1].tolist(), -1.0]
    return [*quantiles.tolist(), 2 * float(quantiles[-1]) + 1]


def _search(
    text: _Text, name: str, k: int, wanted: float, values: Sequence[float]
) -> tuple[Reached, tuple[float, Reached] | None]:
    """The most that the schedule reaches, and the threshold of the fewest refreshes with which it reaches `wanted`."""
    thresholds = _thresholds(name, values)
    found: dict[int, Reached] = {}

    def reaches(place: int) -> bool:
        found[place] = text.reached(ADAPTIVE[name](k, thresholds[place]))
        return found[place].agreement >= wanted

    below, above = -1, len(thresholds) - 1  # the periodic schedule does not reach it
    enough = reaches(above)
    most = found[above]
    while enough and above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if reaches(middle) else (middle, above)
    good = [place for place, one in found.items() if one.agreement >= wanted]
    if not good:
        return most, None
    best = min(good, key=lambda place: (found[place].refresh_share, -found[place].agreement))
    return most, (thresholds[best], found[best])


def _calibrated(texts: tuple[_Text, _Text], name: str, k: int, policy: str, wanted: float) -> Calibrated:
    """Search on one text, and look at the other."""
    searched, held_out = texts
    values: list[float] = []
    periodic = searched.reached(k, lambda seen: values.append(getattr(LastLogits(1, lambda: seen), name)))
    both = periodic, held_out.reached(k)
    if periodic.agreement >= wanted:
        return Calibrated(name, k, policy, wanted, both, None, None, None)
    most, found = _search(searched, name, k, wanted, values)
    if found is None:
        return Calibrated(name, k, policy, wanted, both, most, None, None)
    threshold, reached = found
    other = held_out.reached(ADAPTIVE[name](k, threshold))
    stored = Calibration(
        threshold=threshold,
        k=k,
        policy=policy,
        wanted=wanted,
        agreement=reached.agreement,
        refresh_share=reached.refresh_share,
        tokens=reached.tokens,
        held_out_agreement=other.agreement,
        held_out_refresh_share=other.refresh_share,
        held_out_tokens=other.tokens,
    )
    alike = max(1, round(1 / other.refresh_share) - 1)
    return Calibrated(name, k, policy, wanted, both, most, stored, (alike, held_out.reached(alike)))


def store_calibration(bundle: Bundle, found: dict[str, Calibration]) -> None:
    """Write thresholds into the manifest of a bundle, beside what else it says by now.

    Raises:
        InputError: it is another bundle by now, another command writes there, or it cannot be written.
    """

    def change(data: bytes) -> bytes:
        now = read_manifest(data, bundle.root / MANIFEST_NAME)
        if now.identity != bundle.manifest.identity:
            raise InputError(
                "The bundle was exported again meanwhile.",
                note=f"{bundle.root} has other weights or another plan than what was measured.",
                hint="Calibrate it again.",
            )
        return dataclasses.replace(now, calibration=now.calibration | found).to_json().encode()

    change_file(bundle.root, MANIFEST_NAME, change, "--calibrate")


def _line(name: str, threshold: str, on: Reached | None, other: Reached | None) -> tuple[str, ...]:
    cells = [
        f"{100 * share:.1f}" if one else "–"
        for one in (on, other)
        for share in ((one.agreement, one.refresh_share) if one else (0.0, 0.0))
    ]
    return name, threshold, *cells


def _verdict(one: Calibrated) -> str:
    if one.stored is not None:
        return f"{one.name}: the threshold {one.stored.threshold:.4g} is stored in the bundle"
    if one.most is None:
        return (
            f"{one.name}: not needed, the periodic schedule of k = {one.k} agrees on "
            f"{one.periodic[0].agreement:.1%} already; nothing is stored"
        )
    return (
        f"{one.name}: out of reach, with a refresh after every LoRA step ({one.most.refresh_share:.1%} refreshes) "
        f"{one.most.agreement:.1%} agree; nothing is stored"
    )


def describe(results: Sequence[Calibrated]) -> list[str]:
    """The lines of the table; what was stored is said behind it."""
    first = results[0]
    headings = ("schedule", "threshold", "agree %", "refreshes %", "other text: agree %", "refreshes %")
    cells = [_line(f"periodic, k = {first.k}", "–", *first.periodic)]
    for one in results:
        if one.stored is None:
            if one.most is not None:
                cells.append(_line(f"{one.name}, k = {one.k}, at most", "–", one.most, None))
            continue
        stored = one.stored
        on = Reached(stored.agreement, stored.refresh_share, stored.tokens)
        other = Reached(stored.held_out_agreement, stored.held_out_refresh_share, stored.held_out_tokens)
        cells.append(_line(f"{one.name}, k = {one.k}", f"{stored.threshold:.4g}", on, other))
        if one.alike is not None:
            cells.append(_line(f"  beside it: periodic, k = {one.alike[0]}", "–", None, one.alike[1]))
    tokens = [one.tokens for one in first.periodic]
    return [
        f"wanted: {first.wanted:.1%} of the likeliest tokens are the full schedule's, policy {first.policy}",
        *table(headings, cells),
        f"{tokens[0]} steps were searched on, {tokens[1]} steps of other text were held out; one row at a time",
    ]


def calibrate(bundle: str | Path, settings: EvalSettings, *, out: TextIO | None = None) -> list[Calibrated]:
    """Find thresholds for a bundle, store them in it, and print what they reach.

    Args:
        settings: `calibrate` is the share that shall agree; `schedules` are margin, entropy, or both when empty.

    Raises:
        InputError: the text is too short, or the bundle cannot be written.
        BundleError: it is damaged or cannot run here.
    """
    if (wanted := settings.calibrate) is None:
        raise InputError(
            "There is no agreement to calibrate to.",
            note="The settings say none.",
            hint="Use for example EvalSettings(calibrate=0.95, text=…).",
        )
    opened = Bundle.open(bundle)
    name, plan = opened.root.resolve().name, opened.manifest.plan
    check_session(opened, settings.target, settings.provider, settings.threads)
    k = settings.ks[-1] if settings.k is not None else plan.k
    if not k:
        raise InputError(
            "There is no LoRA step to calibrate.",
            note="The bundle's own window is k = 0, where every step is a refresh.",
            hint="Use for example --k 3.",
        )
    settings = checked({name: opened}, dataclasses.replace(settings, k=(k,)))  # windows with room for its cycle
    request = text_request(settings)
    assert request is not None
    windows = list(text_windows(request, TextCodec.open(opened.root / "tokenizer"), settings.seed).values())
    if len(windows) < 2:
        raise InputError(
            "The text is too short.",
            note=f"It has one window of {request.window} tokens; one is searched on, another is held out.",
            hint="Give a longer --text, a smaller --window, or more --windows.",
        )
    policy = settings.policies[0] if settings.policies else plan.policy
    check_changeable(opened.root, MANIFEST_NAME)
    names, half = settings.schedules or tuple(ADAPTIVE), (len(windows) + 1) // 2
    check_adaptive(" or ".join(names), policy)
    total = len(windows) + len(names) * (len(windows) + half * MOST_TRIED + 2 * (len(windows) - half))
    results = []
    with (
        Session.open(
            opened.root, policy=policy, target=settings.target, provider=settings.provider, threads=settings.threads
        ) as session,
        Progress(f"calibration, k = {k}, policy {policy}, windows", total) as progress,
    ):
        texts = _Text(session, windows[:half], progress), _Text(session, windows[half:], progress)
        results += [_calibrated(texts, one, k, policy, wanted) for one in names]
    found = {one.name: one.stored for one in results if one.stored is not None}
    lines = describe(results)
    with then_shown(lambda: print("\n".join(lines), file=out or sys.stdout)):
        if found:
            store_calibration(opened, found)
        lines += map(_verdict, results)
    return results

"""What an evaluation asks for: windows of a text, and the speed-ups beside it. Tasks have a room of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.errors import InputError, counted
from lora_drop_runtime.plan.drafting import said_policy
from lora_drop_runtime.plan.policy import DEFAULT_POLICY
from lora_drop_runtime.plan.schedule import PERIODIC
from lora_drop_runtime.text import TextCodec

from lora_drop_tools.shared.corpus import read_texts
from lora_drop_tools.shared.results import bench_file, check_bench_bundles, of_one_request

from .result import FULL
from .scoring import Window, phase_of
from .settings import EvalSettings
from .store import Key


@dataclass(frozen=True)
class TextRequest:
    """`count` windows of `window` tokens, the first `prompt` of each given."""

    text: str
    window: int
    prompt: int
    count: int


def _windows_that_fit(bundles: Mapping[str, Bundle], settings: EvalSettings) -> EvalSettings:
    """The settings with the windows that all bundles take, where none were asked for."""
    limits = [bundle.manifest.limits for bundle in bundles.values()]
    window = min(settings.window_tokens, *(one.max_seq_len for one in limits))
    changed = settings if settings.window is not None else dataclasses.replace(settings, window=window)
    prompt = min(changed.prompt_tokens, *(one.max_prompt_len for one in limits))
    return changed if settings.prompt is not None else dataclasses.replace(changed, prompt=prompt)


def checked(bundles: Mapping[str, Bundle], settings: EvalSettings) -> EvalSettings:
    """Refuse before any work what the bundles do not allow; the settings, with windows that fit the bundles.

    Raises:
        InputError: labels or aims for other bundles, a bundle without a tokenizer, windows longer than one takes.
    """
    labels = settings.labels
    if labels and len(labels) != len(bundles):
        raise InputError(
            "The labels do not fit the bundles.",
            note=f"{', '.join(labels)} are given for {len(bundles)} bundles.",
            hint="Give a different --label for each bundle, in their order, or none.",
        )
    if len(settings.aim) > 1 and len(settings.aim) != len(bundles):
        raise InputError(
            "The aims do not fit the bundles.",
            note=f"--aim is {', '.join(f'{aim:g}' for aim in settings.aim)}, for {len(bundles)} bundles.",
            hint="Give one --aim for all, or one for each bundle, in their order.",
        )
    for name, bundle in bundles.items():
        path = bundle.root / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                "A bundle has no tokenizer.",
                note=f"{name}: {path} does not exist; texts and tasks need one.",
                hint="Export again from a checkpoint that has its tokenizer.json.",
            )
    if settings.text is None:
        return settings
    settings = _windows_that_fit(bundles, settings)
    for name, bundle in bundles.items():
        limits = bundle.manifest.limits
        for what, asked, most, option in (
            ("window", settings.window_tokens, limits.max_seq_len, "--max-seq-len"),
            ("prompt", settings.prompt_tokens, limits.max_prompt_len, "--max-prompt-len"),
        ):
            if asked > most:
                raise InputError(
                    f"A {what} is longer than a bundle allows.",
                    note=f"--{what} is {asked}, {name} allows {most}.",
                    hint=f"Use a smaller one, or export with a larger {option}.",
                )
    return settings


def text_request(settings: EvalSettings) -> TextRequest | None:
    """The text, read; None where none was given.

    Raises:
        InputError: it cannot be read.
    """
    if settings.text is None:
        return None
    (text,) = read_texts([settings.text])
    return TextRequest(text, settings.window_tokens, settings.prompt_tokens, settings.windows)


def text_windows(request: TextRequest, codec: TextCodec, seed: int) -> dict[int, Window]:
    """Windows of the text by their place, drawn by the seed; special tokens the tokenizer adds lead each of them.

    Raises:
        InputError: the text is shorter than one window.
    """
    prefix = codec.encode("")
    ids = codec.encode(request.text)[len(prefix) :]
    size = request.window - len(prefix)
    places = len(ids) // size
    if not places:
        raise InputError(
            "The text is too short.",
            note=f"It has {counted(len(ids), 'token')}, a window takes {size}.",
            hint="Give a longer --text" + (", or a smaller --window." if len(ids) > 1 else "."),
        )
    drawn = np.random.default_rng([seed, places]).permutation(places)[: request.count].tolist()
    return {
        place: Window(
            np.concatenate([prefix, ids[place * size : (place + 1) * size]]),
            request.prompt,
            phase_of(seed, "text", place),
        )
        for place in drawn
    }


def read_speedups(path: str | Path | None, names: Sequence[str]) -> tuple[dict[Key, float], str]:
    """Measured speed-ups by bundle, policy, k and schedule from `lora-drop bench --json`, and what they were measured
    on.

    Of several requests it is the smallest batch, and of those the longest context. Which windows and policies were
    measured is said as the tables name them: others have no speed-up.
    """
    if path is None:
        return {}, "not measured (--bench)"
    path = Path(path)
    with bench_file(path, "speed-ups"):
        data = json.loads(path.read_text(encoding="utf-8"))
        policy = said_policy(data.get("policy", DEFAULT_POLICY), data.get("lenience"))
        rows, batch, context = of_one_request(data["rows"])
        found: dict[Key, float] = {
            (
                row["bundle"],
                row.get("policy", policy) if row["k"] else FULL,
                row["k"],
                row.get("schedule", PERIODIC),
            ): float(row["speedup"])
            for row in rows
        }
        arms = (f"k={k} {arm}" + ("" if schedule == PERIODIC else f" {schedule}") for _, arm, k, schedule in found if k)
        measured = ", ".join(dict.fromkeys(arms)) or "k=0"
    check_bench_bundles(path, "speed-ups", {str(bundle) for bundle, *_ in found}, names)
    engine = f", engine {data['engine']}" if data.get("engine") else ""
    return found, f"measured by lora-drop bench for {measured} over k = 0, context {context}, batch {batch}{engine}"

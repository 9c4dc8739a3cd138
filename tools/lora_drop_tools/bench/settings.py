"""The options of `lora-drop bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.command_line import check_known, check_options, option, refuse_unused
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.schedule import ADAPTIVE, PERIODIC, SCHEDULES

from lora_drop_tools.bench.peers.options import PEERS
from lora_drop_tools.shared.options import (
    draft_option,
    json_option,
    lenience_option,
    plots_option,
    policy_option,
    provider_option,
    refuse_idle_drafts,
    refuse_idle_windows,
    target_option,
    threads_option,
)

FEWEST_CYCLES = 2  # in a request, for each k
_REPEATS = Bounds(2, 10**6)  # the noise is what repeats differ by


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how.

    Attributes:
        k: windows; 0, the full schedule, is always measured too; `auto` under a policy that verifies.
        contexts: tokens of the prompts; 128 and 2048 when None, or as many of them as all bundles allow.
        batches: rows of a request.
        new_tokens: of each row; the first comes from the prefill, so there is one step less.
        policy: of the refreshes; the first bundle's when None.
        schedules: of `SCHEDULES`; an adaptive one runs as the bundle was calibrated for it. `periodic` when empty.
        draft, lenience: where drafts come from and how they are judged, under a policy that verifies them.
        repeats: how often each arm runs; at least 2.
        json_file: gets all figures, every step's time among them.
        plots: a directory for figures; needs matplotlib.
        peers: other runtimes to measure in the same run, at batch 1; empty for all of them, None for none.
        model: what the peers load: a Hugging Face directory, a .gguf file, or one of each.
        peer_cache: where what peers build from it is kept; a temporary directory when None.
        peer_python: `NAME=PATH`, the Python that a peer is installed in, where it is not this one.
        target, provider: as for `Session.open`.
        threads: of ONNX Runtime, the peers and the bandwidth measurement; one per physical core when None.

    Raises:
        InputError, PlanError: a value out of range.
    """

    k: tuple[int | Literal["auto"], ...] = option(
        (1, 3, 5),
        metavar="K,…",
        bounds=bounds.K,
        help="measure these windows (default 1,3,5); 0 always runs; auto: as many as pay, under lossless",
    )
    contexts: tuple[int, ...] | None = option(
        None,
        metavar="T,…",
        bounds=bounds.TOKENS,
        help="give prompts of so many tokens (default 128,2048, or what the bundles allow)",
    )
    batches: tuple[int, ...] = option(
        (1,), metavar="B,…", bounds=bounds.BATCH, help="run so many rows at once (default 1)"
    )
    new_tokens: int = option(
        64, metavar="N", bounds=bounds.TOKENS, help="generate so many tokens in each row (default 64)"
    )
    policy: str | None = policy_option()
    schedules: tuple[str, ...] = option(
        (),
        flag="--schedule",
        metavar="NAME,…",
        help=f"measure these schedules: {', '.join(SCHEDULES)} (default {PERIODIC})",
    )
    draft: str | None = draft_option()
    lenience: float | None = lenience_option()
    repeats: int = option(5, metavar="R", bounds=_REPEATS, help="run everything so many times (default 5)")
    json_file: Path | None = json_option("write every figure and every step's time")
    plots: Path | None = plots_option()
    peers: tuple[str, ...] | None = option(
        None,
        nargs="?",
        const=(),
        metavar="NAME,…",
        help=f"measure other runtimes in the same run: {', '.join(PEERS)} (without names: all)",
    )
    model: tuple[Path, ...] = option(
        (),
        repeat=True,
        metavar="DIR|FILE.gguf",
        help="what the peers load, the same weights; a directory, a GGUF file, or repeated for both",
    )
    peer_cache: Path | None = option(None, metavar="DIR", help="keep there what peers build from the model")
    peer_python: tuple[str, ...] = option(
        (), repeat=True, metavar="NAME=PATH", help="the Python that a peer is installed in"
    )
    target: str | None = target_option()
    provider: str | None = provider_option()
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        check_options(self)
        if self.peers is None:
            refuse_unused(self, ("model", "peer_cache", "peer_python"), "--peers was not given", "add --peers")
        elif 1 not in self.batches:
            raise InputError(
                "The peers would not be measured.",
                note=f"They run batches of 1; --batches is {', '.join(map(str, self.batches))}.",
                hint="Add 1 to --batches, or leave --peers out.",
            )
        for schedule in self.schedules:
            check_known("schedule", schedule, SCHEDULES, "--schedule")
        refuse_idle_windows(self)
        if self.windows == [0] and not set(self.schedules) & set(ADAPTIVE):
            refuse_unused(
                self, ("policy", "draft", "lenience"), "with --k 0 every step is a refresh", "use a larger --k"
            )
        refuse_idle_drafts(self, self.policy)
        if self.contexts == () or not self.batches:
            raise InputError(
                "There is nothing to measure.", note="No context or no batch was given.", hint="Use --contexts 128."
            )
        self.check_cycles(max(window for window in self.windows if isinstance(window, int)))

    def check_cycles(self, longest: int) -> None:
        """Refuse fewer new tokens than a few cycles of so many LoRA steps have."""
        needed = FEWEST_CYCLES * (longest + 1) + 1
        if self.new_tokens < needed:
            raise InputError(
                "There are too few new tokens to measure.",
                note=f"--new-tokens is {self.new_tokens}; {FEWEST_CYCLES} cycles of k = {longest} take {needed}.",
                hint=f"Use at least --new-tokens {needed}, or a smaller --k.",
            )

    @property
    def windows(self) -> list[int | str]:
        """All windows that are measured under the periodic schedule, ascending; the first is 0, and `auto` the last."""
        given = self.k if PERIODIC in (self.schedules or SCHEDULES) else ()
        return sorted({0, *given}, key=lambda window: (isinstance(window, str), window))

"""The options of `lora-drop profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.command_line import check_known, check_options, option, refuse_unused
from lora_drop_runtime.dtypes import WEIGHT_SHORTS
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES
from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.shared.corpus import DTYPES, WINDOW
from lora_drop_tools.shared.options import trust_remote_code_option
from lora_drop_tools.teacher_forcing.layout import check_policy

from .measures import DELTAS, LEADING

RANKINGS = ("sensitivity", "influence", "temporal")
RUN = "run"  # a ranking that is made where it is asked for
RUN_SURROGATE = next(name for name, form in SURROGATES.items() if form.with_change)
RUN_RANK = 64  # of each layer's part where --rank names none
SITES = ("layers", "halves")
OBJECTIVES = ("speed", "kv")
CONTEXT = 1024


@dataclass(frozen=True)
class ProfileSettings:
    """What is measured, and where it goes.

    Attributes:
        text: UTF-8 files.
        out: a directory; must not exist unless `force`.
        k: LoRA steps between two refreshes.
        policy: that will be decoded under, one of POLICIES; the adapters', the bundle's or `skip` when None.
        sites: what is ranked, `layers`, or `halves`: their attentions and MLPs apart.
        objective: what a drop list is to save, and what the greedy ranking weighs KL against: `speed`, the bytes that a
            LoRA step does not read, weights and K/V; or `kv`, the bytes of K/V that are not stored.
        context: tokens in the caches when `speed` counts K/V.
        bundle_dtype: that weights are counted in, as loaded when None.
        rank: of the adapters whose bytes are counted, and of those that `run` finds; of the latter RUN_RANK when 0.
        adapters: of `lora-drop fit`. What they stand in for is ranked, and each list has them in place.
        always_first, always_last: layers that are kept; as the adapters say, or 3 and 1, when None.
        tokens: how much text the figures of layers are means over. `run` fits adapters on what `sensitivity_tokens`
            leaves of it.
        window: tokens of a piece of text, 256 when None, or as many as the model and the bundle allow; the pieces are
            drawn from all over it.
        sensitivity_tokens: how much of it `sensitivity` decodes again and again, and how much other text the drop lists
            are compared on. The exact layers of the former stay in memory.

    Raises:
        InputError, PlanError: a value out of range.
    """

    text: tuple[Path, ...] = option(repeat=True, metavar="FILE", help="measure on this text; repeat for more")
    out: Path = option(metavar="DIR", help="write figures and drop lists there")
    k: int = option(3, bounds=Bounds(1, bounds.K.most), help="put so many LoRA steps between two refreshes (default 3)")
    policy: str | None = option(
        None,
        choices=tuple(POLICIES),
        help=f"what refreshes do (default: as the adapters or the bundle say, or {DEFAULT_POLICY})",
    )
    adapters: Path | None = option(
        None, metavar="DIR", help="rank what these adapters of lora-drop fit stand in for, with them in place"
    )
    sites: str = option(
        SITES[0],
        choices=SITES,
        help="rank whole layers, or attentions and MLPs apart (default: as --adapters, or layers)",
    )
    objective: str = option(
        OBJECTIVES[0],
        choices=OBJECTIVES,
        help="save bytes that LoRA steps read, weights and K/V, or K/V that is stored (default speed)",
    )
    context: int = option(
        CONTEXT,
        metavar="T",
        bounds=bounds.TOKENS,
        help=f"count the K/V that a LoRA step reads after so many tokens (default {CONTEXT})",
    )
    bundle_dtype: str | None = option(
        None,
        choices=WEIGHT_SHORTS,
        help="count weights as a bundle of this dtype stores them (default: as they are loaded)",
    )
    rank: int = option(
        0,
        metavar="R",
        bounds=Bounds(0, bounds.RANK.most),
        help="count the bytes of adapters of this rank, which LoRA steps read (default: the adapters', or 0); "
        f"{RUN} finds adapters of it (default {RUN_RANK})",
    )
    rankings: tuple[str, ...] = option(
        RANKINGS,
        metavar="NAME,…",
        help=f"rank by some of {', '.join(RANKINGS)} (default all of these), and {RUN}: neighbours that cost least "
        "with an adapter in their place",
    )
    tokens: int = option(
        8192, metavar="N", bounds=bounds.COUNT, help="take the layers' figures on so many tokens (default 8192)"
    )
    window: int | None = option(
        None,
        metavar="T",
        bounds=bounds.TOKENS,
        help=f"cut the text into pieces of so many tokens (default {WINDOW}, or what the model or the bundle allows)",
    )
    sensitivity_tokens: int = option(
        1024,
        metavar="N",
        bounds=bounds.COUNT,
        help="rank by sensitivity, which takes longest, on so many, and compare the lists on as many others "
        "(default 1024)",
    )
    always_first: int | None = option(
        None, metavar="N", bounds=bounds.LAYERS, help="never drop the first N (default: the adapters', or 3)"
    )
    always_last: int | None = option(
        None, metavar="N", bounds=bounds.LAYERS, help="never drop the last N (default: the adapters', or 1)"
    )
    seed: int = option(0, metavar="N", bounds=bounds.SEED, help="choose pieces of the text by this number (default 0)")
    device: str = option("cpu", metavar="NAME", help="run on this device of PyTorch (default cpu)")
    dtype: str = option("fp32", choices=tuple(DTYPES), help="load the model in this dtype (default fp32)")
    force: bool = option(False, help="replace an existing profile at --out")
    trust_remote_code: bool = trust_remote_code_option()

    def __post_init__(self) -> None:
        check_options(self)
        if self.policy is not None:
            self.check_under(self.policy)
        check_known("dtype", self.dtype, tuple(DTYPES), "--dtype")
        check_known("choice of sites", self.sites, SITES, "--sites")
        check_known("objective", self.objective, OBJECTIVES, "--objective")
        self._check_objective()
        for ranking in self.rankings or ("",):
            check_known("ranking", ranking, (*RANKINGS, RUN), "--rankings")
        self._check_run()
        farthest = max(*DELTAS, self.k)
        shortest = LEADING + farthest + 2
        if self.window_tokens < shortest:
            raise InputError(
                "The window is too short.",
                note=f"--window is {self.window_tokens}; tokens up to {farthest} apart are compared, so {shortest} are "
                "needed.",
                hint=f"Use --window {max(256, shortest)}.",
            )
        for flag, amount in (("--tokens", self.tokens), ("--sensitivity-tokens", self.sensitivity_tokens)):
            if amount < self.window_tokens:
                raise InputError(
                    f"{flag} is less than a window.",
                    note=f"It is {amount}, --window is {self.window_tokens}.",
                    hint=f"Use {flag} {4 * self.window_tokens}, or a smaller --window.",
                )

    def check_under(self, policy: str) -> None:
        """Refuse a policy that cannot be profiled under, or under which there is no saving of the objective's."""
        check_known("refresh policy", policy, tuple(POLICIES), "--policy")
        check_policy(POLICIES[policy], self.k)
        if RUN in self.rankings and POLICIES[policy].fills:
            raise InputError(
                f"The ranking {RUN} is of neighbours that one adapter stands for.",
                note=f"Under {policy} a LoRA step makes K and V of each dropped layer's own input.",
                hint=f"Leave {RUN} out of --rankings.",
            )
        if self.objective == "kv" and not POLICIES[policy].leaves_holes:
            raise InputError(
                "No K/V is saved under this policy.",
                note=f"--objective is {self.objective}; under {policy} every token is stored in every layer.",
                hint=f"Use --policy {DEFAULT_POLICY}, or leave --objective out.",
            )

    def _check_objective(self) -> None:
        """Refuse options that would change nothing."""
        if self.objective == "speed":
            check_known("dtype", self.bundle_dtype or WEIGHT_SHORTS[0], WEIGHT_SHORTS, "--bundle-dtype")
            return
        hint = "use --objective speed"
        unused = ("bundle_dtype",) if RUN in self.rankings else ("bundle_dtype", "rank")
        refuse_unused(self, unused, f"--objective {self.objective} counts no weights", hint)
        refuse_unused(self, ("context",), f"--objective {self.objective} counts what each token stores", hint)

    def _check_run(self) -> None:
        """Refuse what `run` does not rank."""
        if RUN not in self.rankings:
            return
        odd = ("--sites is halves", "--sites") if self.halves else ("--adapters was given", "--adapters")
        if self.halves or self.adapters is not None:
            raise InputError(
                f"The ranking {RUN} is of whole layers, with adapters that it finds itself.",
                note=f"{odd[0]}, and --rankings has {RUN}.",
                hint=f"Leave {odd[1]} out, or {RUN}.",
            )
        if self.tokens < 2 * self.sensitivity_tokens:
            raise InputError(
                f"There is too little text for the adapters of {RUN}.",
                note=f"They are fitted on what --sensitivity-tokens {self.sensitivity_tokens} leaves of --tokens "
                f"{self.tokens}.",
                hint=f"Use --tokens {8 * self.sensitivity_tokens}, or fewer --sensitivity-tokens.",
            )

    @property
    def halves(self) -> bool:
        return self.sites == SITES[1]

    @property
    def run_rank(self) -> int:
        """Of the adapters that `run` finds."""
        return self.rank or RUN_RANK

    @property
    def window_tokens(self) -> int:
        return WINDOW if self.window is None else self.window

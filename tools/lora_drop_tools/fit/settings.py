"""The options of `lora-drop fit`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.command_line import check_known, check_options, option, refuse_unused
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES
from lora_drop_runtime.plan.sites import ATTENTION, INJECTIONS, MLP, parse_sites, sorted_sites
from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.shared.corpus import DTYPES, WINDOW
from lora_drop_tools.shared.options import trust_remote_code_option
from lora_drop_tools.teacher_forcing.layout import check_policy

ADAPTED = ("all", ATTENTION, MLP)
LEARNING_RATE = 0.015  # of few sites and a small rank
STEPS = 300
PROMPT = 8  # tokens at least, before the first decode step
_PLAN, _HOW = "the plan (of a bundle: its own)", "how"  # groups of --help


def _amount(text: str) -> int:
    """A whole number, also as `15e9`."""
    try:
        value = float(text)
        if value == int(value):
            return int(value) if "e" in text.lower() else int(text)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 500000 or 15e9")


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,1,0.5") from None


@dataclass(frozen=True)
class FitSettings:
    """What adapters are fitted to and how; what stands under `_PLAN` a bundle brings itself.

    Attributes:
        text: UTF-8 files, which are read whole, or what is streamed: directories, JSON lines and Parquet.
        dataset: a name on the Hub or a directory, maybe with a configuration: `NAME:CONFIG`; its split `train`.
        text_column: where JSON lines, Parquet and the dataset have their text.
        out: a directory; must not exist unless `force`.
        drop_layers, drop_list: the sites to drop, or a file of `lora-drop profile` that says them; at most one.
        adapters: of an earlier fit, from which distillation goes on; they bring the plan, the rank and the policy.
        adapters_for: `attn` and `mlp` leave the other halves without an adapter.
        k: LoRA steps between refreshes; of several each batch draws one.
        policies: of the refreshes at deployment, on which depends what LoRA steps find in the caches; the bundle's or
            `skip` when empty. Distillation takes several in turns; the adapters are written for the first one.
        alpha: PEFT's; the rank when None, so that the scale is 1.
        apart: fit each site for itself, although the surrogates of neighbours are one linear map together.
        closed_form_tokens: that the closed form sees, 0 to begin with adapters that do nothing.
        steps: of distillation, 0 for none, 300 when None; each of `accumulate` batches of `batch` texts of `window`
            tokens, which are 256 when None, or as many as the model and the bundle allow.
        tokens: that distillation sees, in place of `steps`.
        learning_rate: the highest; `rate` of the plan when None.
        offset_weights: of the loss at the first, second, … LoRA step after a refresh; all alike when None.
        recompute: keep the layers' inputs alone and run them again for the gradients, which takes less memory.
        checkpoint_minutes: between two writes of what distillation has reached.
        log_dir: for TensorBoard.

    Raises:
        InputError, PlanError: a value out of range.
    """

    out: Path = option(metavar="DIR", help="write the adapters there, in PEFT's format")
    text: tuple[Path, ...] = option(
        (),
        repeat=True,
        metavar="FILE",
        help="fit on this .txt, .jsonl (.gz, .zst) or .parquet, or on all in a directory; repeat for more",
    )
    dataset: str | None = option(
        None, metavar="NAME", help="fit on this dataset of the Hub, streamed; NAME:CONFIG for one of several"
    )
    text_column: str = option("text", metavar="NAME", help="the text's column in them (default text)")

    drop_ratio: float | None = option(
        None,
        group=_PLAN,
        metavar="ρ",
        bounds=bounds.SHARE,
        help="drop this share, as lora-drop-export does (default 0.5)",
    )
    drop_layers: Sequence[int | str] | None = option(
        None,
        group=_PLAN,
        parse=parse_sites,
        metavar="4,9.attn",
        help="drop these layers, counted from 0, or halves of them (9.attn, 9.mlp)",
    )
    drop_list: Path | None = option(
        None, group=_PLAN, metavar="FILE", help="drop the layers of a file of lora-drop profile"
    )
    adapters: Path | None = option(
        None,
        group=_PLAN,
        metavar="DIR",
        help="go on from these adapters of lora-drop fit: their plan and rank, and no closed form",
    )
    always_first: int | None = option(
        None,
        group=_PLAN,
        metavar="N",
        bounds=bounds.LAYERS,
        help="never drop the first N (default: as the drop list says, or 3)",
    )
    always_last: int | None = option(
        None,
        group=_PLAN,
        metavar="N",
        bounds=bounds.LAYERS,
        help="never drop the last N (default: as the drop list says, or 1)",
    )
    surrogate: str | None = option(
        None, group=_PLAN, choices=tuple(SURROGATES), help="what stands for a dropped layer (default residual)"
    )
    injection: str | None = option(
        None, group=_PLAN, choices=INJECTIONS, help="replace whole blocks, or attention and MLP apart (default block)"
    )
    adapters_for: str | None = option(
        None,
        group=_PLAN,
        choices=ADAPTED,
        help="fit adapters for all that is dropped, or for dropped attentions or MLPs alone; the other halves are "
        "skipped (default all)",
    )
    k: tuple[int, ...] = option(
        (3,),
        group=_HOW,
        metavar="K,…",
        bounds=Bounds(1, bounds.K.most),
        help="windows, mixed if several (default 3)",
    )
    policies: tuple[str, ...] = option(
        (),
        flag="--policy",
        group=_PLAN,
        metavar="NAME,…",
        help=f"what refreshes do at deployment: {', '.join(POLICIES)}; mixed if several "
        f"(default: what the drop list was chosen for, else {DEFAULT_POLICY})",
    )
    rank: int = option(16, group=_HOW, metavar="R", bounds=bounds.RANK, help="fit matrices of this rank (default 16)")
    alpha: float | None = option(
        None,
        group=_HOW,
        metavar="A",
        bounds=Bounds(0.001, 10**6),
        help="write this alpha of PEFT's; the scale is alpha / r (default: the rank)",
    )

    apart: bool = option(
        False,
        group=_HOW,
        help="fit each layer for itself, as lora-drop profile --adapters wants; else neighbours are fitted as one",
    )

    closed_form_tokens: int = option(
        32768,
        group=_HOW,
        metavar="N",
        bounds=bounds.COUNT_OR_NONE,
        help="show the closed form so many tokens, 0 to skip it (default 32768)",
    )
    steps: int | None = option(
        None,
        group=_HOW,
        metavar="N",
        bounds=bounds.COUNT_OR_NONE,
        help=f"distil so many steps, 0 to skip it (default {STEPS})",
    )
    tokens: int | None = option(
        None,
        group=_HOW,
        metavar="N",
        parse=_amount,
        bounds=Bounds(1, 10**14),
        help="distil until so many tokens were seen, in place of --steps; also as 15e9",
    )
    learning_rate: float | None = option(
        None,
        group=_HOW,
        metavar="X",
        bounds=Bounds(0, 1000, open=True),
        help=f"how fast distillation learns (default {LEARNING_RATE}, less for many layers apart or a large rank)",
    )
    offset_weights: tuple[float, ...] | None = option(
        None,
        group=_HOW,
        parse=_weights,
        metavar="W,…",
        bounds=Bounds(0, 1000),
        help="weigh the first, second, … LoRA step after a refresh so in distillation (default: all alike)",
    )
    batch: int = option(
        4, group=_HOW, metavar="B", bounds=bounds.BATCH, help="put so many texts into a batch (default 4)"
    )
    window: int | None = option(
        None,
        group=_HOW,
        metavar="T",
        bounds=bounds.TOKENS,
        help=f"take so many tokens of a text (default {WINDOW}, or what the model or the bundle allows)",
    )
    accumulate: int = option(
        1, group=_HOW, metavar="N", bounds=bounds.COUNT, help="take so many batches in a step (default 1)"
    )
    seed: int = option(
        0, group=_HOW, metavar="N", bounds=bounds.SEED, help="choose pieces of the text by this number (default 0)"
    )
    device: str = option("cpu", group=_HOW, metavar="NAME", help="run on this device of PyTorch (default cpu)")
    dtype: str = option(
        "fp32",
        group=_HOW,
        choices=tuple(DTYPES),
        help="load the model in this dtype; adapters stay fp32 (default fp32)",
    )
    threads: int | None = option(
        None,
        group=_HOW,
        metavar="N",
        bounds=bounds.THREADS,
        help="run PyTorch on N threads of the CPU (default: its own choice)",
    )
    recompute: bool = option(
        False, group=_HOW, help="run layers again for the gradients, which takes less memory and more time"
    )
    checkpoint_minutes: float = option(
        10.0,
        group=_HOW,
        metavar="N",
        bounds=Bounds(0, 10**4),
        help="write what distillation has reached every N minutes (default 10)",
    )
    log_dir: Path | None = option(None, group=_HOW, metavar="DIR", help="write curves for TensorBoard there")
    resume: bool = option(False, group=_HOW, help="go on where an interrupted fit with these options stopped")
    force: bool = option(False, group=_HOW, help="replace adapters at --out, and begin anew")
    trust_remote_code: bool = trust_remote_code_option(group=_HOW)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.text and self.dataset is None:
            raise InputError(
                "There is no text.",
                note="Neither --text nor --dataset was given, and the model is run over it.",
                hint="Use --text FILE.",
            )
        given = [flag for flag in ("drop_ratio", "drop_layers", "drop_list") if getattr(self, flag) is not None]
        if len(given) > 1:
            raise InputError(
                "The drop list is given twice.",
                note=f"{' and '.join('--' + flag.replace('_', '-') for flag in given)} exclude each other.",
                hint="Give one of --drop-ratio, --drop-layers and --drop-list.",
            )
        self._check_adapters()
        policies = self.policies or (DEFAULT_POLICY,)
        for policy in policies:
            check_known("refresh policy", policy, tuple(POLICIES), "--policy")
        check_known("dtype", self.dtype, tuple(DTYPES), "--dtype")
        check_known("choice of adapters", self.adapters_for or ADAPTED[0], ADAPTED, "--adapters-for")
        if self.drop_layers is not None:
            object.__setattr__(self, "drop_layers", sorted_sites(self.drop_layers))
        if not self.k:
            raise PlanError("There are no LoRA steps to fit.", note="--k names no window.", hint="Use --k 3.")
        for policy in policies:
            for k in self.k:
                check_policy(POLICIES[policy], k)
        if len({POLICIES[policy].fills for policy in policies}) > 1:
            raise InputError(
                "These policies cannot be mixed.",
                note=f"--policy is {', '.join(policies)}: LoRA steps under fill write K/V, those of others do not.",
                hint="Fit twice, or leave one out.",
            )
        self._check_weights()
        shortest = PROMPT + 2 * max(self.k) + 2
        if self.window_tokens < shortest:
            raise InputError(
                "The window is too short.",
                note=f"--window is {self.window_tokens}; a prompt of {PROMPT} and two cycles take {shortest} tokens.",
                hint=f"Use a smaller --k, or --window {max(256, shortest)} if the model allows it.",
            )
        if self.tokens is not None and self.steps is not None:
            raise InputError(
                "How long distillation takes is said twice.",
                note=f"--tokens is {self.tokens}, --steps is {self.steps}. The closed form's are --closed-form-tokens.",
                hint="Give one of them.",
            )
        if not self.closed_form_tokens and self.steps == 0:
            raise InputError(
                "Nothing would be fitted.", note="--closed-form-tokens and --steps are 0.", hint="Give one of them."
            )
        if self.steps == 0:
            because = "--steps is 0, so nothing is distilled"
            unused = (
                "learning_rate",
                "accumulate",
                "offset_weights",
                "recompute",
                "checkpoint_minutes",
                "log_dir",
                "resume",
            )
            refuse_unused(self, unused, because, "give --steps")

    def _check_adapters(self) -> None:
        """Refuse what adapters that are given bring."""
        if self.adapters is None:
            return
        brought = (
            *("drop_ratio", "drop_layers", "drop_list", "always_first", "always_last"),
            *("surrogate", "injection", "adapters_for", "rank", "closed_form_tokens"),
        )
        refuse_unused(self, brought, "--adapters brings it", "leave --adapters out")
        if self.steps == 0:
            raise InputError(
                "Nothing would be fitted.",
                note="--steps is 0, and --adapters stand in the place of the closed form.",
                hint="Give --steps or --tokens.",
            )

    def runs(self, plan: DropPlan) -> tuple[tuple[str, ...], ...]:
        """The adapted sites, neighbours that are fitted as one together."""
        return tuple((site,) for site in plan.adapted_sites) if self.apart else plan.surrogate_runs

    def rate(self, plan: DropPlan) -> float:
        """The highest learning rate for the surrogates of a plan.

        A step moves each value of A and B by about the rate, in units of their size. Sums over r such values move by
        √r of it, and so do n runs of neighbours one after the other by the sum of theirs. 0.015 is right for 7 layers
        apart of rank 64 (DECISIONS.md).
        """
        if self.learning_rate is not None:
            return self.learning_rate
        moved = sum(math.sqrt(plan.rank * len(run)) for run in self.runs(plan))
        return LEARNING_RATE * min(1.0, 7 * math.sqrt(64) / moved)

    def _check_weights(self) -> None:
        weights = self.offset_weights
        if weights is None:
            return
        if len(weights) != max(self.k) or not any(weights):
            raise InputError(
                "The weights do not fit the cycle.",
                note=f"--offset-weights has {len(weights)}, --k has {max(self.k)} as its largest; "
                f"the largest weight is {max(weights, default=0):g}.",
                hint="Give one for each of them, at least one above 0.",
            )

    def steps_of(self, workers: int) -> int:
        """Steps of distillation where so many processes share it."""
        if self.tokens is None:
            return STEPS if self.steps is None else self.steps
        return -(-self.tokens // (self.batch * self.window_tokens * self.accumulate * workers))

    @property
    def closed_form_batches(self) -> int:
        """Those that the closed form sees; without it one, for the features' scales."""
        return max(1, self.closed_form_tokens // (self.batch * self.window_tokens))

    @property
    def window_tokens(self) -> int:
        return WINDOW if self.window is None else self.window

    @property
    def lora_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

"""The stages of a fit, each judged on text that it did not see.

Enters: a model under teacher forcing, a plan, texts. Leaves: adapters, and the figures of each stage. Knows no files.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import POLICIES, Policy

from .settings import FitSettings
from .texts import Texts

if TYPE_CHECKING:
    from pathlib import Path

    from lora_drop_export.console import Console, Progress
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

    from .distill import Workers

_HELD_OUT_BATCHES = 4
_REPORTS = 20  # lines that distillation says on its way
_TOO_FAST = 1.5  # times the KL that distillation began with
BASE, GIVEN, CLOSED_FORM, DISTILLATION = "base", "given adapters", "closed form", "distillation"  # the stages by name


@dataclass(frozen=True)
class Work:
    """What all stages have in common; `stages` collects their figures by name.

    Attributes:
        seen, unseen: texts to learn from, and to be judged by.
    """

    forcing: TeacherForcing
    plan: DropPlan
    settings: FitSettings
    seen: Texts
    unseen: Texts
    console: Console
    stages: dict[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def policies(self) -> list[Policy]:
        return [POLICIES[name] for name in self.settings.policies or (self.plan.policy,)]

    @property
    def runs(self) -> Sequence[Sequence[str]]:
        return self.settings.runs(self.plan)

    @property
    def before(self) -> str:
        """The stage whose adapters distillation begins with."""
        return next((stage for stage in (CLOSED_FORM, GIVEN) if stage in self.stages), BASE)

    def judge(self, stage: str, pairs: Surrogates) -> None:
        """Note means over held-out text, each of whose batches is seen in its own phase, under each policy.

        Raises:
            InputError: the KL is not finite.
        """
        from .distill import Diverged, Divergence, run_batch
        from .learner import together

        sums, pairs = Divergence(), together(pairs, self.runs if pairs else ())
        for number in range(_HELD_OUT_BATCHES):
            ids, layout = self.unseen(number)
            for policy in self.policies:
                sums += run_batch(self.forcing, ids, layout, self.plan, pairs, policy)
        figures = sums.figures()
        name = "base alone" if stage == BASE else stage
        exact = all(policy.exact_refreshes for policy in self.policies)
        what = "LoRA steps" if exact else "LoRA steps and inexact refreshes"
        if not math.isfinite(figures["kl"]):
            raise Diverged(
                "The KL divergence is not finite.",
                note=f"It is {figures['kl']} on held-out text ({name}); --dtype is {self.settings.dtype}.",
                hint="Use --dtype fp32." if stage == BASE else "Use --dtype fp32, or a smaller --learning-rate.",
            )
        self.stages[stage] = figures
        self.console.say(
            f"{name}: KL {figures['kl']:.4f}, top-1 agreement {figures['agreement']:.3f}, perplexity "
            f"{figures['perplexity_full']:.2f} → {figures['perplexity']:.2f} ({what}, held-out text)"
        )


def _blank(work: Work, scales: Mapping[str, Any]) -> Surrogates:
    """Adapters that do nothing yet: random A in units of the features, B of zeros."""
    import torch

    from .learner import drawn

    rank, device = work.plan.rank, work.forcing.device
    random = torch.Generator().manual_seed(work.settings.seed)
    features = len(next(iter(scales.values())))
    width = features // work.plan.form.feature_size(1)
    of_site = {site: scales[run[-1]] for run in work.runs for site in run}
    a = {site: drawn(rank, scale, random) for site, scale in of_site.items()}
    nothing = [torch.zeros(width, rank), *(torch.zeros(rank, width) for _ in range(work.plan.form.gated))]
    return {site: tuple(matrix.to(device) for matrix in (a[site], *nothing)) for site in of_site}


def begin(work: Work, given: Surrogates | None = None) -> tuple[Surrogates, dict[str, Any]]:
    """The adapters that distillation begins with, and the root mean square of each run's features by its last site.

    Args:
        given: adapters that stand in the place of the closed form.
    """
    from lora_drop_tools.teacher_forcing.closed_form import Site, balanced, batches_of, solve, walk

    from .gates import gated, widened
    from .learner import apart, together

    forcing, plan, settings, console = work.forcing, work.plan, work.settings, work.console
    work.judge(BASE, {})
    scales: dict[str, Any] = {}
    runs = {run[-1]: run for run in work.runs}
    whole = {} if given is None else together(given, work.runs)

    def choose(name: str, site: Site) -> tuple[Any, ...] | None:
        run = runs[name]
        scales[name] = scale = site.fit.scale.float()
        if not settings.closed_form_tokens:
            return whole.get(name)
        rank = plan.rank * len(run)
        solution = solve(site, rank)
        which = f"layer {name}" if len(run) == 1 else f"layers {run[0]} to {name} as one"
        console.say(f"{which}: leaves {solution.left:.3f} of the base's squared error, ridge {solution.ridge:g}")
        a, b = (matrix.to(forcing.device) for matrix in balanced(solution.a, solution.b, scale))
        if not plan.form.gated:
            return a, b
        begun, size = widened(a, b, rank, scale, settings.seed), scale.to(forcing.device)
        matrices, left = gated(site, begun, size, settings.seed, lambda *counts: update(f"gates of {which}", *counts))
        console.say(f"{which}, gated: leaves {left:.3f} of the closed form's error, each dimension's over its size")
        return matrices

    count = settings.closed_form_batches
    what = "closed form" if settings.closed_form_tokens else "scales of the features"
    with console.progress(what) as update:
        batches = batches_of(forcing, (work.seen(number) for number in range(count)))
        found = walk(
            forcing, batches, plan, plan.refresh_policy, work.runs, choose, lambda *counts: update(what, *counts)
        )
    if given is not None:
        work.judge(GIVEN, given)
        return given, scales
    blank = _blank(work, scales)
    if not settings.closed_form_tokens:
        return blank, scales
    pairs = apart(found, work.runs, plan.rank)
    # Where nothing was found A says nothing either, and from B = 0 and a tiny A distillation goes nowhere
    pairs = {site: pair if pair[1].any() else blank[site] for site, pair in pairs.items()}
    work.judge(CLOSED_FORM, pairs)
    return pairs, scales


class Report:
    """Says how far distillation is, and writes curves where they are wanted.

    Args:
        tokens: of a step.
        log_dir: for TensorBoard.
        begun_kl: of what distillation begins with, on held-out text.
        highest: learning rate.
        resumed: an interrupted fit goes on: what it had drawn of steps that are done again is drawn no more.
    """

    def __init__(
        self,
        console: Console,
        update: Progress,
        tokens: int,
        log_dir: Path | None,
        begun_kl: float,
        highest: float,
        resumed: bool = False,
    ) -> None:
        self._begun_kl, self._highest = begun_kl, highest
        self._console, self._update, self._tokens = console, update, tokens
        self._log_dir, self._resumed = log_dir, resumed
        self._writer: Any = None
        self._first: int | None = None  # of the steps that it is told of
        self._losses: list[float] = []
        self._begun = time.monotonic()

    def _open_writer(self, first: int) -> None:
        """For curves from this step on."""
        if self._log_dir is not None and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._log_dir), purge_step=first if self._resumed else None)

    def __call__(self, done: int, total: int, loss: float, rate: float) -> None:
        self._first = self._first or done
        self._open_writer(done)
        self._update("distillation", done, total, self._first - 1)
        self._losses.append(loss)
        if done % max(1, total // _REPORTS) and done != total:
            return
        now = time.monotonic()
        steps_per_second = len(self._losses) / max(now - self._begun, 1e-9)
        mean, speed = float(np.mean(self._losses)), steps_per_second * self._tokens
        left = str(timedelta(seconds=round((total - done) / steps_per_second)))
        self._console.say(f"distillation: step {done} of {total}, KL {mean:.4f}, {speed:.0f} tokens/s, {left} left")
        if mean > _TOO_FAST * self._begun_kl:
            self._console.say(
                f"warning: distillation learns too fast: KL {mean:.4f}, {self._begun_kl:.4f} before it; "
                f"--learning-rate {self._highest / 4:.1g} may help (it is {self._highest:.2g})"
            )
            self._begun_kl = math.inf  # it is said once
        figures = {"kl": mean, "learning_rate": rate, "tokens_per_second": speed}
        for name, value in figures.items() if self._writer else ():
            self._writer.add_scalar(name, value, done)
        self._losses, self._begun = [], now

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def distilled(
    work: Work, pairs: Surrogates, scales: Mapping[str, Any], workers: Workers, state_file: Path
) -> tuple[Surrogates, list[float]]:
    """What distillation made of adapters, and its losses.

    Raises:
        InputError: the KL is not finite.
    """
    from .distill import DistillOptions, distill
    from .learner import Learner

    settings = work.settings
    learner = Learner(pairs, scales, work.runs, work.forcing.device)
    rate = settings.rate(work.plan)
    options = DistillOptions(
        settings.steps_of(workers.count),
        rate,
        accumulate=settings.accumulate,
        first=settings.closed_form_batches,
        offset_weights=settings.offset_weights,
        checkpoint_seconds=60 * settings.checkpoint_minutes,
    )
    tokens = settings.batch * settings.window_tokens * settings.accumulate * workers.count
    log_dir, begun = settings.log_dir if workers.rank == 0 else None, work.stages[work.before]["kl"]
    with (
        work.console.progress("distillation") as update,
        contextlib.closing(Report(work.console, update, tokens, log_dir, begun, rate, settings.resume)) as report,
    ):
        losses = distill(
            work.forcing, work.seen, work.plan, work.policies, learner, options, workers, state_file, report
        )
    learned = learner.pairs()
    work.judge(DISTILLATION, learned)
    return learned, losses


def better(work: Work, begun: Surrogates, learned: Surrogates) -> tuple[str, Surrogates]:
    """The stage whose adapters have the lower KL on held-out text, and these: distillation may make them worse."""
    kept = min((DISTILLATION, work.before), key=lambda stage: work.stages[stage]["kl"])
    if kept != DISTILLATION:
        work.console.say(
            f"warning: distillation made the adapters worse, KL {work.stages[work.before]['kl']:.4g} → "
            f"{work.stages[DISTILLATION]['kl']:.4g}; those before it are kept. A smaller --learning-rate or more "
            "--text may help."
        )
    return kept, learned if kept == DISTILLATION else begun

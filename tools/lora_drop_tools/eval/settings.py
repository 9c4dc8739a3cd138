"""The options of `lora-drop eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_drop_runtime import bounds
from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.command_line import check_known, check_options, option, refuse_unused
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import ADAPTIVE, PERIODIC, SCHEDULES

from lora_drop_tools.eval.paper import PAPER
from lora_drop_tools.shared.options import (
    json_option,
    lenience_option,
    plots_option,
    provider_option,
    refuse_idle_windows,
    target_option,
    threads_option,
)

WINDOW, PROMPT = 512, 32  # tokens, where bundles allow as many
WINDOWS_K = (1, 3)
_WANTED = Bounds(0, 1, open=True)
_SHOTS = Bounds(0, 1000)
_AIM = Bounds(0, 100, open=True)  # percentage points
_OF_TASKS = ("include_path", "num_fewshot", "limit", "aim", "lenience", "unsafe_code")


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated, and how.

    Attributes:
        labels: names for the tables, one for each bundle; the directories' names when empty.
        k: LoRA steps between refreshes; 0, the full schedule, is always evaluated too. 1 and 3 when None; with
            `calibrate` it is one, the bundle's own when None.
        schedules: of `SCHEDULES`; an adaptive one runs as the bundle was calibrated for it. `periodic` when empty; with
            `calibrate` the adaptive ones.
        calibrate: find the thresholds of adaptive schedules at which this share of the likeliest tokens is the full
            schedule's, and store them in the bundle; nothing is evaluated.
        policies: of `POLICIES`, one or several; each bundle's own when empty.
        lenience: of policies that verify drafts, for texts that tasks want written; scores are the full schedule's.
        text: a UTF-8 file for perplexity, agreement and KL.
        window, prompt: tokens of a window of the text, and of those how many are given; 512 and 32 when None, or as
            many of them as all bundles allow. A cycle of more than 31 LoRA steps makes the prompt k + 1 then, a window
            of fewer than 64 tokens makes it half of that window.
        windows: how many windows at most.
        tasks: tasks, groups and tags that lm-eval knows by these names.
        include_path: directories with definitions of tasks of one's own, YAML files as lm-eval reads them; they stand
            before lm-eval's.
        num_fewshot: examples in a task's prompt, where its definition does not say 0; the definition's when None.
        limit: items of each task at most.
        aim: percentage points that the average may lie below the full schedule's, one for all bundles or one for each;
            an interval that is wider than that is warned of.
        paper: of `PAPER`, a table or figure of the paper to make of the bundles. It brings its own tasks and windows k,
            where none are given.
        unsafe_code: run programs that a model writes without cutting them off from this machine.
        seed: of the subsets, the places in the cycle, and the bootstrap.
        out_dir: where every item's result is kept and looked for; not at all when None.
        bench_file: what `lora-drop bench --json` wrote, for the speed-ups.
        json_file: gets all figures.
        plots: a directory for figures; needs matplotlib.
        ray: the address of a Ray cluster whose workers score the items; this process does when None.
        target, provider, threads: as for `Session.open`.

    Raises:
        InputError, PlanError: a value out of range, or neither a text nor a task.
    """

    labels: tuple[str, ...] = option(
        (),
        flag="--label",
        repeat=True,
        metavar="NAME",
        help="name a bundle in the tables, once for each of them (default: directories)",
    )
    k: tuple[int, ...] | None = option(
        None, metavar="K,…", bounds=bounds.K, help="evaluate these windows (default 1,3); 0 always runs"
    )
    schedules: tuple[str, ...] = option(
        (),
        flag="--schedule",
        metavar="NAME,…",
        help=f"evaluate these schedules: {', '.join(SCHEDULES)} (default {PERIODIC}); the others after --calibrate",
    )
    calibrate: float | None = option(
        None,
        metavar="SHARE",
        bounds=_WANTED,
        help="find and store the threshold at which so many of the likeliest tokens are the full schedule's",
    )
    policies: tuple[str, ...] = option(
        (),
        flag="--policy",
        metavar="NAME,…",
        help=f"evaluate these policies: {', '.join(POLICIES)} (default: each bundle's)",
    )
    lenience: float | None = lenience_option()
    text: Path | None = option(None, metavar="FILE", help="score a text: perplexity, agreement and KL")
    window: int | None = option(
        None,
        metavar="T",
        bounds=bounds.TOKENS,
        help=f"cut it into pieces of so many tokens (default {WINDOW}, or what the bundles allow)",
    )
    prompt: int | None = option(
        None,
        metavar="T",
        bounds=bounds.TOKENS,
        help="give so many of them without scoring them, more than k, and leave room for a cycle "
        f"(default {PROMPT}, or as a long cycle needs; at most half a piece)",
    )
    windows: int = option(32, metavar="N", bounds=bounds.COUNT, help="score at most so many pieces (default 32)")
    tasks: tuple[str, ...] = option((), metavar="NAME,…", help="run these tasks, groups and tags of lm-eval")
    include_path: tuple[Path, ...] = option(
        (), metavar="DIR", repeat=True, help="know the tasks of a directory with YAML files; may be repeated"
    )
    num_fewshot: int | None = option(
        None, metavar="N", bounds=_SHOTS, help="show N solved examples in a prompt (default: as the task says)"
    )
    limit: int = option(
        300, metavar="N", bounds=bounds.COUNT, help="take at most so many items of a task (default 300)"
    )
    aim: tuple[float, ...] = option(
        (),
        repeat=True,
        metavar="PP",
        bounds=_AIM,
        help="say whether the average is within so many points of the full schedule's; once, or once for each bundle",
    )
    paper: str | None = option(
        None, choices=tuple(PAPER), help="print this table or figure of the paper for the bundles (fig3: with --plots)"
    )
    unsafe_code: bool = option(
        False, help="run programs that a model writes without cutting them off from your files and the network"
    )
    seed: int = option(0, metavar="N", bounds=bounds.SEED, help="choose subsets and phases by this number (default 0)")
    out_dir: Path | None = option(
        None, flag="--out", metavar="DIR", help="keep every item's result there; a rerun goes on from there"
    )
    bench_file: Path | None = option(
        None, flag="--bench", metavar="FILE", help="read speed-ups, as lora-drop bench --json wrote them"
    )
    json_file: Path | None = json_option("write every figure")
    plots: Path | None = plots_option()
    ray: str | None = option(
        None, metavar="ADDRESS", help="spread items over this Ray cluster, auto for this machine's (extra ray)"
    )
    target: str | None = target_option()
    provider: str | None = provider_option()
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        check_options(self)
        if self.ks == [0] and not set(self.schedules) & set(ADAPTIVE):
            refuse_unused(
                self, ("policies", "lenience", "aim", "plots"), "with --k 0 every step is a refresh", "use a larger --k"
            )
        if self.calibrate is None:
            refuse_idle_windows(self)
        for policy in self.policies:
            check_known("refresh policy", policy, tuple(POLICIES), "--policy")
        if self.policies and not any(POLICIES[policy].verifies for policy in self.policies):
            because = f"--policy {','.join(self.policies)} verifies no drafts"
            refuse_unused(self, ("lenience",), because, "add lossless to --policy")
        for schedule in self.schedules:
            check_known("schedule", schedule, SCHEDULES, "--schedule")
        if self.calibrate is not None:
            self._check_calibration()
        if self.paper is not None and self._takes_nothing_new():
            return
        if self.tasks and set(self.schedules) & set(ADAPTIVE):
            raise InputError(
                "Tasks are evaluated under the periodic schedule alone.",
                note=f"--schedule is {', '.join(self.schedules)}: an adaptive one refreshes a batch by all its rows.",
                hint="Leave --tasks or --schedule out.",
            )
        if self.text is None and not self.tasks:
            raise InputError(
                "There is nothing to evaluate.",
                note="Neither a text nor a task was given.",
                hint="Use --text FILE, or --tasks with a name that lm-eval knows, such as arc_easy.",
            )
        if self.text is None:
            refuse_unused(self, ("window", "prompt", "windows"), "--text was not given", "add --text FILE")
        else:
            self.check_cycle(self.ks[-1])
        if not self.tasks:
            refuse_unused(self, _OF_TASKS, "--tasks was not given", "add --tasks NAME")

    @property
    def measures(self) -> bool:
        """Whether anything is: some parts of the paper are made of what there is."""
        return self.paper is None or bool(PAPER[self.paper].tasks)

    def _takes_nothing_new(self) -> bool:
        """Whether what is made of the paper measures nothing; else its tasks and windows k stand where none are given.

        Raises:
            InputError: an option that it has no use for, or no file of latencies for Table IV.
        """
        assert self.paper is not None
        check_known("table or figure of the paper", self.paper, tuple(PAPER), "--paper")
        made = PAPER[self.paper]
        if made.tasks:
            if not self.tasks:
                object.__setattr__(self, "tasks", made.tasks)
            if self.k is None:
                object.__setattr__(self, "k", made.ks)
            return False
        asked = ("labels", "k", "schedules", "policies", "text", "tasks", *_OF_TASKS, "seed")
        unused = (*asked, "out_dir", "json_file", "ray", "target", "provider", "threads")
        because = f"--paper {self.paper} measures nothing"
        if self.paper == "table4":
            refuse_unused(self, (*unused, "plots"), because, "leave --paper out")
            if self.bench_file is None:
                raise InputError(
                    "Table IV is made of measured latencies.",
                    note="--bench was not given.",
                    hint="Use --bench FILE, which lora-drop bench --json writes.",
                )
        else:
            refuse_unused(self, (*unused, "bench_file"), because, "leave --paper out")
        return True

    def _check_calibration(self) -> None:
        unused = ("labels", "tasks", "paper", *_OF_TASKS, "out_dir", "bench_file", "json_file", "plots", "ray")
        refuse_unused(self, unused, "--calibrate measures agreement on a text", "leave --calibrate out")
        if self.text is None:
            raise InputError(
                "There is nothing to calibrate on.", note="--text was not given.", hint="Use --text FILE, of prose."
            )
        if PERIODIC in self.schedules:
            raise InputError(
                "The periodic schedule has no threshold.",
                note=f"--schedule is {', '.join(self.schedules)}.",
                hint=f"Use --schedule {' or '.join(ADAPTIVE)}, or leave it out for both.",
            )
        given: tuple[tuple[str, tuple[object, ...]], ...] = (("--k", self.k or ()), ("--policy", self.policies))
        for flag, several in given:
            if len(several) > 1:
                raise InputError(
                    f"{flag} names several, and a threshold is found for one.",
                    note=f"It is {', '.join(map(str, several))}.",
                    hint="Name one, or leave it out for the bundle's own.",
                )
        if self.k == (0,):
            raise InputError(
                "There is no LoRA step to calibrate.",
                note="--k is 0, where every step is a refresh.",
                hint="Use for example --k 3.",
            )

    def check_cycle(self, longest: int) -> None:
        """Refuse windows of the text without room for a cycle of so many LoRA steps."""
        window, prompt = self.window_tokens, self.prompt_tokens
        if prompt <= longest or window < prompt + longest + 2:
            long_enough = max(PROMPT, longest + 1)
            room = max(window, long_enough + longest + 2)
            raise InputError(
                "A window has no room for a prompt and a whole cycle.",
                note=f"--window is {window}, --prompt is {prompt}; k = {longest} takes a prompt of "
                f"{longest + 1} tokens and {longest + 2} more.",
                hint=f"Use a smaller --k, or --window {room} --prompt {long_enough} if the bundle allows these.",
            )

    def aim_of(self, place: int) -> float | None:
        """What the bundle at this place aims at, as a share; None where nothing was said."""
        if not self.aim:
            return None
        return (self.aim[0] if len(self.aim) == 1 else self.aim[place]) / 100

    def lenience_under(self, policy: str) -> float | None:
        """None where it is that of the full schedule."""
        return self.lenience if POLICIES[policy].verifies else None

    @property
    def window_tokens(self) -> int:
        return WINDOW if self.window is None else self.window

    @property
    def prompt_tokens(self) -> int:
        least = max(PROMPT, self.ks[-1] + 1)
        return min(least, self.window_tokens // 2) if self.prompt is None else self.prompt

    @property
    def ks(self) -> list[int]:
        """All windows k that are evaluated, ascending; the first is 0."""
        return sorted({0, *(WINDOWS_K if self.k is None else self.k)})

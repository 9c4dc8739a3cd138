"""The options of `lora-drop fit`."""

from __future__ import annotations

from dataclasses import dataclass

from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from lora_drop_tools.shared.corpus import DTYPES, check_known
from lora_drop_tools.teacher_forcing.layout import check_policy

LEARNING_RATE = 0.015
PROMPT = 8  # tokens at least, before the first decode step


@dataclass(frozen=True)
class FitSettings:
    """What a fit depends on, besides the model and the texts; the README explains the options.

    Attributes:
        windows: of k; each batch draws one.
        tokens: that the closed form sees, 0 to begin with adapters that do nothing.
        steps: of distillation, 0 for none; each of `accumulate` batches of `batch` texts of `window` tokens.
    """

    windows: tuple[int, ...]
    policy: str
    rank: int
    alpha: float
    tokens: int
    steps: int
    learning_rate: float
    batch: int
    window: int
    accumulate: int
    seed: int
    dtype: str

    def __post_init__(self) -> None:
        check_known("--policy", self.policy, tuple(POLICIES))
        check_known("--dtype", self.dtype, tuple(DTYPES))
        for k in self.windows:
            PeriodicSchedule(k)
            check_policy(POLICIES[self.policy], k)
        if not self.windows or 0 in self.windows:
            raise PlanError("There are no LoRA steps to fit.", note=f"k is {self.windows}.", hint="Use --k 3.")
        shortest = PROMPT + 2 * max(self.windows) + 2
        if self.window < shortest:
            raise InputError(
                "The window is too short.",
                note=f"--window is {self.window}; a prompt of {PROMPT} and two cycles take {shortest} tokens.",
                hint=f"Use --window {max(256, shortest)}.",
            )
        for option, value, least in (
            ("--rank", self.rank, 1),
            ("--tokens", self.tokens, 0),
            ("--steps", self.steps, 0),
            ("--batch", self.batch, 1),
            ("--accumulate", self.accumulate, 1),
        ):
            if value < least:
                raise InputError(f"{option} is too small.", note=f"It is {value}.", hint=f"Use {least} or more.")
        if not self.learning_rate > 0 or not self.alpha > 0:
            raise InputError(
                "--learning-rate and --alpha must be positive.",
                note=f"They are {self.learning_rate} and {self.alpha}.",
                hint="Leave them out for the defaults.",
            )
        if not self.tokens and not self.steps:
            raise InputError("Nothing would be fitted.", note="--tokens and --steps are 0.", hint="Give one of them.")

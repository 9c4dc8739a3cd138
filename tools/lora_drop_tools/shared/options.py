"""Fields that the settings of several commands have; each is an option of theirs."""

from __future__ import annotations

from typing import Any

from lora_drop_runtime.bounds import LENIENCE, THREADS
from lora_drop_runtime.command_line import option, refuse_unused
from lora_drop_runtime.plan.drafting import DRAFTS
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import PERIODIC, SCHEDULES


def policy_option() -> Any:
    """`str | None`; None is the bundle's."""
    what = (
        "what refreshes do: skip leaves holes, backfill fills them, lossless also verifies what the LoRA steps chose, "
        "so that the text is the full schedule's; fill, which only a bundle exported with it runs, has no holes "
        "(default: the bundle's)"
    )
    return option(None, help=what, choices=tuple(POLICIES))


def schedule_option() -> Any:
    """`str | None`; None is periodic."""
    what = "refresh periodically (default), or after unsure logits (see lora-drop eval --calibrate)"
    return option(None, help=what, choices=SCHEDULES)


def draft_option() -> Any:
    """`str | None`; None is what suits the bundle."""
    what = (
        "under --policy lossless, where drafts come from: lora, ngram (looked up in the text so far), or both: looked "
        "up first (default lora, or ngram where no layer is dropped)"
    )
    return option(None, help=what, choices=tuple(DRAFTS))


def lenience_option() -> Any:
    """`float | None`; None accepts what the full schedule chooses."""
    what = (
        "under --policy lossless, accept drafts with this share of the likeliest token's probability, too: sooner, and "
        "no longer the full schedule's text (default 1)"
    )
    return option(None, metavar="L", bounds=LENIENCE, help=what)


def refuse_idle_drafts(settings: Any, policy: str | None) -> None:
    """Refuse `--draft` and `--lenience` beside a policy that verifies no drafts; None is the bundle's, not known yet.

    Raises:
        InputError: one was given.
    """
    if policy is not None and policy in POLICIES and not POLICIES[policy].verifies:
        refuse_unused(settings, ("draft", "lenience"), f"--policy {policy} verifies no drafts", "use --policy lossless")


def refuse_idle_windows(settings: Any) -> None:
    """Refuse `--k` beside adaptive schedules alone, whose k is that of their calibration; 0 runs in any case.

    Raises:
        InputError: one was given.
    """
    if settings.schedules and PERIODIC not in settings.schedules and any(settings.k or ()):
        because = f"--schedule is {', '.join(settings.schedules)}, whose k is that of its calibration"
        refuse_unused(settings, ("k",), because, f"add {PERIODIC} to --schedule")


def target_option() -> Any:
    """`str | None`; None is the bundle's first."""
    return option(None, metavar="NAME", help="run one of the bundle's targets (default: its first)")


def provider_option() -> Any:
    """`str | None`, of ONNX Runtime."""
    what = "choose ONNX Runtime's provider (default cpu for ort; another target runs its own engines without it)"
    return option(None, metavar="cpu|cuda|rtx", help=what)


def threads_option() -> Any:
    """`int | None`; None is one per physical core."""
    return option(None, metavar="N", bounds=THREADS, help="run on N threads (default: one per physical core)")


def json_option(what: str) -> Any:
    """`Path | None`: a file that gets every figure."""
    return option(None, flag="--json", metavar="FILE", help=what)


def plots_option() -> Any:
    """`Path | None`: a directory that gets figures as PNG files."""
    return option(None, metavar="DIR", help="write figures; needs matplotlib")


def trust_remote_code_option(group: str | None = None) -> Any:
    """`bool`."""
    return option(False, group=group, help="run the code that the model brings")

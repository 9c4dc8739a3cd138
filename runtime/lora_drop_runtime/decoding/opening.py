"""Opening a bundle for decoding: what the user asked for, checked before an engine is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.engine import Engine
from lora_drop_runtime.engines.open import check_engine, open_engine
from lora_drop_runtime.plan.drafting import draft_source, scheduled
from lora_drop_runtime.plan.policy import Policy, policy_named
from lora_drop_runtime.plan.schedule import Schedule

from . import checks
from .schedules import named_schedule


@dataclass(frozen=True)
class Opened:
    """A bundle with its engine, and what rows of it do by default."""

    bundle: Bundle
    engine: Engine
    schedule: Schedule
    policy: str


def checked_policy(bundle: Bundle, name: str | None) -> Policy:
    """The policy that is asked for, or the bundle's own. Raises InputError where the bundle cannot run it."""
    policy = policy_named(bundle.manifest.plan.policy if name is None else name)
    bundle.manifest.plan.check_policy(policy)
    return policy


class Asked(TypedDict):
    """What a bundle is opened with, as `Session.open` has it."""

    k: int | str | Schedule | None
    schedule: str | None
    policy: str | None
    draft: str | None
    lenience: float | None
    target: str | None
    provider: str | None
    threads: int | None


def check_opening(path: str | Path, **asked: Unpack[Asked]) -> tuple[Bundle, Schedule, str]:
    """Refuse what `open_bundle` would, as far as that is known before an engine is made.

    Returns:
        The bundle, the schedule, and the policy's name.
    """
    for name in ("policy", "draft", "target", "provider", "schedule"):
        checks.check_name(f"The {name}", asked[name], "Leave it out, or give its name as text.")
    bundle = Bundle.open(path)
    k, policy = named_schedule(bundle.manifest, asked["schedule"], asked["k"], asked["policy"])
    verifier = checked_policy(bundle, policy)
    chosen = scheduled(k, verifier)
    draft_source(asked["draft"], verifier, len(bundle.manifest.plan.sites), asked["lenience"])
    checks.checked_threads(asked["threads"])
    check_engine(bundle, asked["target"], asked["provider"])
    return bundle, chosen, policy


def open_bundle(path: str | Path, *, check: bool, **asked: Unpack[Asked]) -> Opened:
    """Arguments and errors as for `Session.open`."""
    check = checks.flag("check", check)
    bundle, chosen, policy = check_opening(path, **asked)
    if check:
        bundle.check_unchanged()
    threads = checks.checked_threads(asked["threads"])
    return Opened(bundle, open_engine(bundle, asked["target"], asked["provider"], threads), chosen, policy)

"""The schedule that a user named, with the threshold that the bundle was calibrated to.

Enters: a manifest, the name of a schedule, what was said of window and policy. Leaves: a schedule and a policy's name.
"""

from __future__ import annotations

from typing import Any

from lora_drop_runtime.bundle.manifest import Calibration, Manifest
from lora_drop_runtime.command_line import check_known
from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drafting import scheduled
from lora_drop_runtime.plan.policy import Policy, policy_named
from lora_drop_runtime.plan.schedule import ADAPTIVE, SCHEDULES, AdaptiveSchedule, Schedule


def _calibration(manifest: Manifest, name: str) -> Calibration:
    found = manifest.calibration.get(name)
    if found is None:
        stored = ", ".join(manifest.calibration) or "none"
        raise InputError(
            f"The bundle is not calibrated for the {name} schedule.",
            note=f"A threshold is stored for: {stored}.",
            hint=f"Use: lora-drop eval BUNDLE --calibrate 0.95 --schedule {name} --text FILE",
        )
    return found


def _check_same(name: str, what: str, asked: Any, calibrated: Any) -> None:
    if asked is not None and asked != calibrated:
        raise InputError(
            f"The bundle is calibrated for another {what}.",
            note=f"The threshold of the {name} schedule was found for {calibrated}; {asked} was asked for.",
            hint=f"Leave the {what} out, or calibrate again: lora-drop eval BUNDLE --calibrate 0.95 "
            f"--schedule {name} --{what} {asked} --text FILE",
        )


def check_adaptive(name: str, policy: str | None) -> None:
    """Refuse an adaptive schedule beside a policy that decides by itself when to refresh.

    Raises:
        InputError: the policy verifies drafts, or is unknown.
    """
    if policy is not None and policy_named(policy).verifies:
        raise InputError(
            f"The policy {policy} follows no {name} schedule.",
            note="It verifies drafts, and decides by itself how many come before a refresh.",
            hint="Use --policy backfill, or leave --schedule or --calibrate out.",
        )


def named_schedule(
    manifest: Manifest,
    name: str | None,
    k: int | str | Schedule | None,
    policy: str | None,
    usual: tuple[Schedule, str] | None = None,
) -> tuple[int | str | Schedule, str]:
    """What `k` and the policy of a session are.

    Args:
        name: one of SCHEDULES; None is `periodic`, or the schedule that `k` is.
        k: LoRA steps between two refreshes, at most where the schedule is adaptive; None is the usual window, or the
            one that the bundle was calibrated for.
        policy: None likewise.
        usual: schedule and policy; the bundle's own when None.

    Raises:
        InputError: an unknown name, a name beside a schedule object, or no threshold for this window and policy.
    """
    check_known("schedule", name, SCHEDULES)
    if name is not None and hasattr(k, "kind"):
        raise InputError(
            "The schedule is given twice.",
            note=f"schedule is {name!r}, and k is a schedule of its own, {type(k).__name__}.",
            hint="Leave schedule out, or give k as a number.",
        )
    if name is None or name not in ADAPTIVE:
        usual_k, usual_policy = (manifest.plan.k, manifest.plan.policy) if usual is None else usual
        return usual_k if k is None else k, usual_policy if policy is None else policy
    check_adaptive(name, policy)
    found = _calibration(manifest, name)
    _check_same(name, "k", k, found.k)
    _check_same(name, "policy", policy, found.policy)
    return ADAPTIVE[name](found.k, found.threshold), found.policy


def row_schedule(manifest: Manifest, usual: Schedule, k: int | str | Schedule | None, policy: Policy) -> Schedule:
    """What a row of a batch runs under its policy: `k`, or else the batch's usual schedule.

    Raises:
        InputError: the usual schedule has the bundle's threshold, which was found for another policy; or what
            `scheduled` refuses.
        PlanError: k out of range.
    """
    if k is None and isinstance(usual, AdaptiveSchedule):
        name, found = usual.name, manifest.calibration.get(usual.name)
        if found is not None and usual == ADAPTIVE[name](found.k, found.threshold):
            check_adaptive(name, policy.name)
            _check_same(name, "policy", policy.name, found.policy)
    return scheduled(usual if k is None else k, policy)

"""How near LoRA steps come to all layers: verification says that a bundle does what its plan says, not what it costs.

Enters: a bundle. Leaves: in how many places of a sample text the most likely token is that of all layers, said aloud.
"""

from __future__ import annotations

import functools

import numpy as np
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.plan.policy import policy_named
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

from lora_drop_export.console import Console

from .reference import reference_of
from .sample import sample_ids

ROWS, PROMPT, STEPS = 8, 24, 16  # texts, tokens of their prompts, and the most steps after them
LEAST_AGREEMENT = 0.5


def report_lora_steps(bundle: Bundle, console: Console, *, trust_remote_code: bool = False) -> dict[str, float]:
    """Run the bundle's schedule in PyTorch over texts that are given, and all layers over the same.

    Returns:
        `tokens`, how many places after LoRA steps there were, and `agreement`, in what share of them both have the same
        most likely token; empty where no step is a LoRA step, or there is no tokenizer to measure with.
    """
    plan, room = bundle.manifest.plan, bundle.manifest.limits.max_seq_len
    sample = sample_ids(bundle.root, bundle.manifest.model.vocab_size)
    steps = min(2 * (plan.k + 1), STEPS, room - 2)  # two cycles, or what of them has room
    if not plan.k or not plan.sites or sample is None or not len(sample) or steps < 1:
        return {}
    prompt = min(PROMPT, room - 1 - steps)
    texts = np.resize(sample, (ROWS, prompt + steps + 1))
    kinds = [PeriodicSchedule(plan.k).kind(step) for step in range(1, steps + 1)]
    lengths = np.full(ROWS, prompt, np.int64)
    reference = reference_of(bundle, trust_remote_code)
    what = "LoRA steps on a sample text"
    with console.progress(what) as progress:
        tick, policy = functools.partial(progress, what), policy_named(plan.policy).in_steps
        logits = reference.run(texts[:, :prompt], lengths, texts[:, prompt:-1].T, kinds, tick, policy)
        _, likeliest = reference.on_text(texts, tick)
    ours = np.stack([step.argmax(axis=1) for step in logits[1:]])  # [steps, ROWS]
    theirs = likeliest.reshape(ROWS, -1)[:, -steps:].T
    same = (ours == theirs)[[kind is StepKind.LORA for kind in kinds]]
    found = {"tokens": same.size, "agreement": float(same.mean())}
    console.say(f"{what}: the most likely token is that of all layers in {same.mean():.0%} of {same.size} places")
    if same.mean() < LEAST_AGREEMENT:
        verifies = plan.refresh_policy.verifies
        why = "hardly a draft would be accepted" if verifies else "its own text would be another than the model's"
        fit = "choose layers (lora-drop profile) and fit adapters for them (lora-drop fit), "
        tools = "" if plan.kv_sources else fit  # which refuse layers with the K and V of others
        console.say(f"so few that {why}: {tools}drop fewer, or decode with --k 0")
    return found

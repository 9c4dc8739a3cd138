"""Bundles of small random models, and what all engines are asked: do steps agree with PyTorch, and how long is one.

Enters: a job, a target, a provider. Leaves: plain JSON values. Knows no engine by name.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu_check.job import Job, Skip

WINDOWS = (0, 3)
NEW_TOKENS, WARM_TOKENS = 65, 17
TINY_LENGTHS = {"prompt": 8, "new_tokens": 9}  # over stand-ins
PROMPT = 32


def need_exporter() -> None:
    """Raises Skip with the name of a package that exports and references need."""
    for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnx_graphsurgeon", "polygraphy"):
        try:
            __import__(name)
        except ImportError:
            raise Skip(f"{name} is not installed (extra export)") from None


def small_checkpoint(job: Job) -> Path:
    """A Llama of 8 layers with heads of 64 (3 layers with heads of 16 over stand-ins), in float32; saved once for all
    stages."""
    from tests.support.models import llama, quartered

    directory = job.work / "small"
    if not directory.is_dir():
        model = quartered(llama(num_hidden_layers=3) if job.stand_in else llama(head_dim=64))
        part = job.work / "small.part"
        model.save_pretrained(part)
        part.rename(directory)
    return directory


def exported(job: Job, model: Path, name: str, **options: Any) -> Path:
    """A bundle that is not verified yet. Raises Skip where the exporter refuses the combination."""
    from lora_drop_runtime.errors import InputError

    from lora_drop_export.compiler import export as exporter
    from lora_drop_export.compiler.options import ExportOptions
    from tests.support.bundles import traced_once

    setattr(exporter, "trace", partial(traced_once, f"gpu_check.{model.name}"))  # noqa: B010 - one for all stages
    out = job.work / name
    try:
        few = {"always_first": 1, "always_last": 0} if job.stand_in else {}
        chosen = ExportOptions(verify=False, **{"k": 3, "max_seq_len": 256, "max_batch": 2} | few | options)
        exporter.export(str(model), out, chosen)
    except InputError as error:
        raise Skip(f"{error.fact} {error.note}") from None
    return out


def agreement(bundle: Path, target: str, provider: str | None) -> dict[str, Any]:
    """Every step of a teacher-forced run against PyTorch, as `lora-drop compare`; AssertionError where one is off."""
    from lora_drop_runtime.bundle.bundle import Bundle

    from lora_drop_export.check.verify import compare

    result = compare(Bundle.open(bundle), target=target, provider=provider, k=3)
    summary = result.summary() | {"max_rel_error": max(step.max_rel_error for step in result.steps)}
    assert result.passed, f"steps are not PyTorch's: {summary}"
    return summary


def same_tokens(bundle: Path, target: str, provider: str | None) -> str:
    """Two requests of a session, the second of which runs out of captured graphs, have the same greedy tokens; and a
    fork that is fed what its session is has the same logits."""
    from lora_drop_runtime import Session

    prompt = [7, 3, 11, 19, 2]
    with Session.open(bundle, target=target, provider=provider, k=3) as session:
        first, again = (session.generate(prompt, 16, stop_token_ids=())[0].tolist() for _ in range(2))
        assert first == again, f"a second request has other tokens: {first} and {again}"
        session.prefill(np.array([prompt]), max_new_tokens=len(first) + 1)
        for token in first[:6]:
            session.step(np.array([token]))
        with session.fork() as fork:
            for token in first[6:]:
                logits, of_fork = (one.step(np.array([token])).copy() for one in (session, fork))
                np.testing.assert_allclose(of_fork, logits, atol=1e-3 * np.abs(logits).max(), err_msg="a fork's logits")
    return f"two requests have the same {len(first)} tokens, and a fork has the same logits"


def timed(bundle: Path, target: str, provider: str | None, k: int, **lengths: int) -> dict[str, Any]:
    """Times of a greedy request, as `lora-drop bench` takes them, after one that warms up; `prompt` and `new_tokens`
    tokens.

    Returns:
        tokens/s of the decode steps; whether `steps` were timed one by one, or `cycles` that run without the host; the
        median milliseconds of each kind of these; the bytes that a step reads.
    """
    from lora_drop_runtime.bundle.bundle import Bundle
    from lora_drop_tools.bench.arms import SessionOptions, TimedSession
    from lora_drop_tools.shared import costs

    prompt, new_tokens = lengths.get("prompt", PROMPT), lengths.get("new_tokens", NEW_TOKENS)
    tokens = np.array([[1 + 7 * i % 97 for i in range(prompt)]], np.int64)
    opened = Bundle.open(bundle)
    options = SessionOptions(opened.manifest.plan.policy, target=target, provider=provider)
    with TimedSession.open(opened, options) as session:
        notes = session.session.engine_notes()
        session.run(tokens, min(WARM_TOKENS, new_tokens), k)
        run = session.run(tokens, new_tokens, k)
    moved = costs.bytes_of_steps(opened.manifest, prompt, costs.periodic_kinds(new_tokens - 1, k))
    by_kind: dict[str, list[float]] = {}
    for kind, seconds in run.timed_parts:
        by_kind.setdefault(kind, []).append(1e3 * seconds)
    return {
        "tokens_per_s": (new_tokens - 1) / run.decode_seconds,
        "timed": run.form,
        "step_ms": {kind: statistics.median(values) for kind, values in by_kind.items()},
        "bytes_per_token": sum(moved) / len(moved),
        "notes": notes,
    }


def timed_windows(job: Job, bundle: Path, target: str, provider: str | None) -> Mapping[str, Any]:
    lengths = TINY_LENGTHS if job.stand_in else {}
    return {f"k={k}": timed(bundle, target, provider, k, **lengths) for k in WINDOWS}

"""Runs a bundle on the CUDA provider, over whatever CUDA libraries the loader finds, and tells what happened.

    python -m tests.support.cuda_stub.worker BUNDLE OUT

Runs where onnxruntime-gpu is installed, so without torch and the exporter. OUT gets a JSON list, an object for each
policy and batch: what was copied in the opening, in the prefill and in each step, and where outputs and nodes lay.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from lora_drop_runtime import Session
from lora_drop_runtime.engines.ort import engine

STEPS, WINDOW = 9, 2
NEW_TOKENS = 50  # that caches have room for, so that a copy of one is larger than any other that a step makes
LENGTHS = {1: [5], 3: [5, 2, 4]}  # of the prompts of a batch


class Counters(ctypes.Structure):
    """What cudart.cpp counts, in its order."""

    _fields_ = tuple(
        (name, ctypes.c_longlong)
        for name in (
            "to_device_calls", "to_device_bytes", "to_host_calls", "to_host_bytes", "on_device_calls",
            "on_device_bytes", "on_device_largest", "kernels", "waits", "captures", "replays", "replayed_kernels",
            "variables", "held_bytes", "held_graphs",
        )
    )  # fmt: skip


def taken(library: ctypes.CDLL) -> dict[str, int]:
    """What happened since the last call."""
    counters = Counters()
    library.stub_take(ctypes.byref(counters))
    return {name: getattr(counters, name) for name, _ in Counters._fields_}


class Watch:
    """Stands before ONNX Runtime's bindings: which addresses each output was bound to, and where it was then found."""

    def __init__(self) -> None:
        self.bound: dict[int, dict[str, int]] = {}
        self.addresses: dict[str, set[int]] = {}
        self.on_host: set[str] = set()
        self.moved: list[str] = []
        bind_input, bind_output = onnxruntime.IOBinding.bind_input, onnxruntime.IOBinding.bind_output
        run = onnxruntime.InferenceSession.run_with_iobinding

        def binding_input(binding: Any, name: str, *arguments: Any) -> None:
            self.addresses.setdefault(name, set()).add(arguments[-1])
            if arguments[0] == "cpu":
                self.on_host.add(name)
            bind_input(binding, name, *arguments)

        def binding_output(binding: Any, name: str, *arguments: Any) -> None:
            self.bound.setdefault(id(binding), {})[name] = arguments[-1]
            self.addresses.setdefault(name, set()).add(arguments[-1])
            bind_output(binding, name, *arguments)

        def running(session: Any, binding: Any, *arguments: Any) -> None:
            run(session, binding, *arguments)
            for (name, address), value in zip(self.bound[id(binding)].items(), binding.get_outputs(), strict=True):
                if value.data_ptr() != address:
                    self.moved.append(name)

        onnxruntime.IOBinding.bind_input, onnxruntime.IOBinding.bind_output = binding_input, binding_output
        onnxruntime.InferenceSession.run_with_iobinding = running


def placed(profile: Path) -> dict[str, dict[str, int]]:
    """Provider → op type → how often it ran, in the branches too."""
    found: dict[str, Counter[str]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        arguments = event.get("args", {})
        if event["name"].endswith("_kernel_time") and "provider" in arguments:
            found.setdefault(arguments["provider"], Counter())[arguments["op_name"]] += 1
    profile.unlink()
    return found


def decode(bundle: str, policy: str, batch: int, library: ctypes.CDLL, watch: Watch) -> dict[str, Any]:
    watch.bound.clear()
    watch.addresses.clear()
    watch.on_host.clear()
    taken(library)
    with Session.open(bundle, provider="cuda", policy=policy, k=WINDOW) as session:
        opening = taken(library)
        lengths = np.array(LENGTHS[batch])
        session.prefill(np.ones((batch, lengths.max()), np.int64), lengths, max_new_tokens=NEW_TOKENS)
        prefill, steps = taken(library), []
        for _ in range(STEPS):
            kind = session.next_step
            logits = session.step(np.full(batch, 3))
            steps.append({"kind": kind.value, **taken(library)})
        caches = session._request.caches
        parts = [((file, at), size) for w in session.bundle.weight_inputs("ort").values() for file, at, size in w.parts]
        in_place = all(
            watch.addresses[name] == watch.addresses[name.replace("past_", "present_")]
            and min(watch.addresses[name]) == cache.address
            for name, cache in caches.items()
        )
        providers = {kind.value: placed(Path(one.end_profiling())) for kind, one in session._engine._sessions.items()}
        return {
            "policy": policy, "batch": batch, "opening": opening, "prefill": prefill, "steps": steps,
            "cache_bytes": min(cache.nbytes for cache in caches.values()), "logits_bytes": logits.nbytes,
            "layers": session.bundle.manifest.plan.num_layers,
            "weight_bytes": sum(dict(parts).values()), "on_host": sorted(watch.on_host),
            "sides": 1 + session._request.slots.buffers.are_double, "in_place": in_place, "moved": watch.moved,
            "placed": providers,
        }  # fmt: skip


def main(bundle: str, out: str) -> None:
    options = engine.session_options

    def profiled(*arguments: Any) -> Any:
        made = options(*arguments)
        made.enable_profiling, made.profile_file_prefix = True, f"{out}.profile"
        return made

    engine.session_options = profiled
    library, watch = ctypes.CDLL("libcudart.so.13"), Watch()
    runs = [decode(bundle, policy, batch, library, watch) for policy in ("skip", "backfill") for batch in LENGTHS]
    Path(out).write_text(json.dumps(runs), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The buffers that steps share, and how they are bound: caches and states of some rows, and what one step reads.

Enters: a bundle, an engine, how many slots a row needs. Leaves: buffers by name, and prepared steps. Knows no schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.engines.engine import BindingEngine, Buffer
from lora_drop_runtime.plan.schedule import StepKind

States = dict[str, Buffer]  # by site, [B, d]


@dataclass(frozen=True)
class RowBuffers:
    """Caches and states of some rows, by the names of the step graphs.

    A state that LoRA steps update is double-buffered: they read one of `states` and write the other. Else both are one.
    So are the recurrent states of layers and the entries of their last tokens, `recurrences`, of which a refresh writes
    the side that it does not read.
    """

    bundle: Bundle
    engine: BindingEngine
    caches: dict[str, Buffer]
    states: tuple[States, States]
    recurrences: tuple[dict[str, Buffer], dict[str, Buffer]]

    @classmethod
    def allocate(cls, bundle: Bundle, engine: BindingEngine, rows: int, slots: Mapping[str, int]) -> RowBuffers:
        """Args:
        slots: {"slots_kept": n, "slots_dropped": m}, of each row.
        """
        manifest, sizes = bundle.manifest, {"batch": rows, "rows": 1, **slots}
        io = manifest.io(StepKind.REFRESH, engine.target)

        def allocated(*prefixes: str, end: str = "") -> dict[str, Buffer]:
            return {
                spec.name: engine.allocate_resident(f"{spec.name}{end}", spec.sized(sizes), spec.dtype)
                for spec in io.inputs
                if spec.name.startswith(prefixes)
            }

        caches, of_states = allocated("past_key.", "past_value."), ("past_recent.", "past_recurrence.")
        recurrences = allocated(*of_states, end=".0"), allocated(*of_states, end=".1")
        outputs = {spec.name: spec for spec in io.outputs}
        states: list[States] = []
        for side in range(2 if manifest.plan.updated_states else 1):
            states.append({})
            for site in manifest.plan.states:
                if side and site not in manifest.plan.updated_states:
                    states[side][site] = states[0][site]
                    continue
                spec = outputs[f"present_state.{site}"]
                states[side][site] = engine.allocate_resident(f"state.{site}.{side}", spec.sized(sizes), spec.dtype)
        return cls(bundle, engine, caches, (states[0], states[-1]), recurrences)

    @property
    def are_double(self) -> bool:
        """Whether LoRA steps change sides."""
        return self.states[0] is not self.states[1]

    def bindings(
        self,
        kind: StepKind,
        rows: slice,
        inputs: Mapping[str, Any],
        logits: Buffer,
        next_token: Any,
        before: States,
        after: States,
        side: int = 0,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the engine's graph of this step reads, and what it writes.

        Args:
            rows: of the caches and states; the rest is of these rows already.
            inputs: ids, index and lengths.
            before, after: the states that it reads and writes.
            side: of the recurrent states and entries, that it reads.
        """
        io = self.bundle.manifest.io(kind, self.engine.target)
        read = dict(inputs)
        read |= {f"past_state.{site}": state[rows] for site, state in before.items()}
        read |= {name: cache[rows] for name, cache in (self.caches | self.recurrences[side]).items()}
        written: dict[str, Any] = {"logits": logits, "next_token": next_token}
        written |= {f"present_state.{site}": state[rows] for site, state in after.items()}
        # A LoRA step leaves recurrent states alone, and writes entries where they are
        cached = self.caches | self.recurrences[1 - side if kind is StepKind.REFRESH else side]
        written |= {f"present_{name.removeprefix('past_')}": cache[rows] for name, cache in cached.items()}
        return (
            {spec.name: read[spec.name] for spec in io.inputs},
            {spec.name: written[spec.name] for spec in io.outputs},
        )

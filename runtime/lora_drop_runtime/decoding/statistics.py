"""What a request under a policy that verifies has counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cycle:
    """A refresh of all rows that were going, and the LoRA steps before it.

    Attributes:
        lora_steps: runs of the LoRA graph.
        drafted: drafts of each row that were verified.
        accepted: of them, those that became tokens.
        made: tokens that each row got, a stop token among them; 0 for a row that was over.
    """

    lora_steps: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    made: tuple[int, ...]


@dataclass(frozen=True)
class Statistics:
    """Of one request, all rows together; the first token of each row, which the prefill gives, is not counted.

    Attributes:
        cycles: in order.
        note: what `k="auto"` found about drafts that do not pay; else empty.
    """

    cycles: tuple[Cycle, ...] = ()
    note: str = ""

    @property
    def tokens(self) -> int:
        return sum(sum(cycle.made) for cycle in self.cycles)

    @property
    def refreshes(self) -> int:
        """Of rows: a refresh of three rows counts three times."""
        return sum(made > 0 for cycle in self.cycles for made in cycle.made)

    @property
    def lora_steps(self) -> int:
        return sum(cycle.lora_steps for cycle in self.cycles)

    @property
    def drafted(self) -> int:
        return sum(sum(cycle.drafted) for cycle in self.cycles)

    @property
    def accepted(self) -> int:
        return sum(sum(cycle.accepted) for cycle in self.cycles)

    @property
    def accepted_lengths(self) -> tuple[int, ...]:
        """How many refreshes accepted 0, 1, 2, … drafts."""
        lengths = [
            accepted for cycle in self.cycles for accepted, made in zip(cycle.accepted, cycle.made, strict=True) if made
        ]
        return tuple(lengths.count(length) for length in range(max(lengths, default=-1) + 1))

    @property
    def tokens_per_refresh(self) -> float:
        return self.tokens / max(1, self.refreshes)

    def describe(self) -> str:
        """One line."""
        if not self.cycles:
            return "no refresh ran after the prompt"
        share = f" ({self.accepted / self.drafted:.0%})" if self.drafted else ""
        lengths = ", ".join(f"{length}: {count}" for length, count in enumerate(self.accepted_lengths) if count)
        return (
            f"{self.tokens_per_refresh:.2f} tokens per refresh; {self.refreshes} refreshes, {self.lora_steps} LoRA "
            f"steps; {self.accepted} of {self.drafted} drafts accepted{share}; refreshes by accepted drafts: {lengths}"
        )

"""What stands for a dropped site on a LoRA step: the one place that knows the surrogate forms by name.

Enters: nothing. Leaves: a table of forms. Knows no graph and no tensor: the graph builder, the reference and the
teacher forcing each turn a form's facts into their own formula.

Every surrogate is `y_t = base + s·B·A·feature`; forms differ in the base, in what A multiplies, the site's input `x_t`,
or with it what the site did at the anchor, and in whether what A makes is gated by `x_t`. What is of another position
is kept between steps, as a *state* [B, d]. Every refresh sets it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Base(enum.Enum):
    """What a surrogate's product is added to."""

    INPUT = "the site's input now"
    PREVIOUS = "the site's own output at the previous position, itself approximated after a LoRA step"
    ANCHOR = "the site's own output at the anchor"


@dataclass(frozen=True)
class SurrogateForm:
    """A row of the table; `name` is as users write it and manifests store it.

    Attributes:
        with_change: A [r, 2d] multiplies x_t and, behind it, the change at the anchor: what the run of neighbours that
            the site belongs to (DropPlan.surrogate_runs) added to the stream there. That is the run's state, then; the
            base is the input.
        gated: what A makes is multiplied by `1 + silu(G n)` before B, where n is `x_t` over its root mean square, and
            G [r, d] is as A is. The adapters of a run then all multiply what the run was given: together they are one
            of the sum of their ranks. The base is the input.
    """

    name: str
    base: Base
    with_change: bool = False
    gated: bool = False

    def __post_init__(self) -> None:
        assert not self.of_runs or self.base is Base.INPUT

    @property
    def of_runs(self) -> bool:
        """Whether an adapter says nothing without those of its neighbours."""
        return self.with_change or self.gated

    @property
    def matrices(self) -> str:
        """An adapter's, by their letters, in the order in which they are given."""
        return "ABG" if self.gated else "AB"

    @property
    def base_is_state(self) -> bool:
        """Whether the base is a state, rather than the input."""
        return self.base is not Base.INPUT

    def feature_size(self, hidden_size: int) -> int:
        """The width of what A multiplies."""
        return (1 + self.with_change) * hidden_size

    @property
    def updates_state(self) -> bool:
        """Whether a LoRA step, too, sets the state to the site's output."""
        return self.base is Base.PREVIOUS


DEFAULT_SURROGATE = "residual"
GATE_EPSILON = 1e-6  # added to the mean square of x_t before its root is taken
SURROGATES: dict[str, SurrogateForm] = {
    form.name: form
    for form in (
        SurrogateForm(DEFAULT_SURROGATE, Base.INPUT),
        SurrogateForm("recurrent", Base.PREVIOUS),  # the paper's Eq. 4
        SurrogateForm("anchor", Base.ANCHOR),  # the authors' code
        SurrogateForm("residual-delta", Base.INPUT, with_change=True),  # ours, and so are those below
        SurrogateForm("residual-gated", Base.INPUT, gated=True),
        SurrogateForm("residual-delta-gated", Base.INPUT, with_change=True, gated=True),
    )
}

"""What stands for a dropped site on a LoRA step: the one place that knows the surrogate forms by name.

Enters: nothing. Leaves: a table of forms. Knows no graph and no tensor: the graph builder, the reference and the
teacher forcing each turn a form's facts into their own formula.

Every surrogate is `y_t = base + s·B·A·x_t` with the site's input `x_t`; forms differ in the base. A base that is not
made of the input is kept between steps, as the site's *state* [B, d]. Every refresh sets it to the site's output.
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
    """A row of the table; `name` is as users write it and manifests store it."""

    name: str
    base: Base

    @property
    def has_state(self) -> bool:
        """Whether the base is a state, rather than the input."""
        return self.base is not Base.INPUT

    @property
    def updates_state(self) -> bool:
        """Whether a LoRA step, too, sets the state to the site's output."""
        return self.base is Base.PREVIOUS


DEFAULT_SURROGATE = "residual"
SURROGATES: dict[str, SurrogateForm] = {
    form.name: form
    for form in (
        SurrogateForm(DEFAULT_SURROGATE, Base.INPUT),
        SurrogateForm("recurrent", Base.PREVIOUS),  # the paper's Eq. 4
        SurrogateForm("anchor", Base.ANCHOR),  # the authors' code
    )
}

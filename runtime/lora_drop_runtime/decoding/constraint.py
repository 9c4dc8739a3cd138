"""What a row may write next, such as JSON by a schema.

Enters: the tokens of a row, one after another. Leaves: which tokens may follow. Knows no logits, no engine and no text;
lora_drop_runtime/grammars makes constraints of schemas and grammars.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Constraint(Protocol):
    """Follows a row token by token. One's own may be any object with these four.

    A request works on a fork of the one that it is given, so one may be given to many requests.
    """

    @property
    def is_over(self) -> bool:
        """Whether no further token may follow: the row then ends without an end token."""
        ...

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [V], at least one: tokens that may come next. An end token (`stop_token_ids`) where the text may end.

        Only read, and only until the next call.
        """
        ...

    def accept(self, token: int) -> None:
        """The token has come; it was allowed."""
        ...

    def fork(self) -> Constraint:
        """Another one in the same state, which goes its own way."""
        ...
